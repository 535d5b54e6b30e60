"""`jaxdict train itda`: dictionaries made of the activations themselves.

`train` is the whole of it, read from top to bottom; `labels` says where an atom came from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
