"""Rows of an activation store: chosen, ordered, read ahead and normalized.

Row number i of a training is a function of the seed and i alone.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
