"""`jaxdict demo`: the whole journey on the embedded model.

A chain of the verbs that a person would type.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
