"""Sparse codes, k slots a row, and the kernels that work on them.

No [n, m] matrix is made here; `Codes.dense` makes one when asked for it by name.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
