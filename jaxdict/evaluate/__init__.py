"""`jaxdict eval`: how well a dictionary rebuilds held-out rows, beside baselines.

Nothing here changes what it measures.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
