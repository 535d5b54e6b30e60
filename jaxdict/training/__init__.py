"""`jaxdict train sae`: from a store to a run, one dictionary or many in one pass.

`train` is the whole of it, read from top to bottom.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
