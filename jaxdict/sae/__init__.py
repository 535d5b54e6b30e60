"""Sparse autoencoders: their kinds, and one training step of them.

Pure functions of arrays; the loop around a step is in `jaxdict.training`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
