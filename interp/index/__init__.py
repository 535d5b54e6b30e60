"""`jaxdict interp index`: what makes each feature fire.

An index is arrays beside a JSON file, read by `load_index`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
