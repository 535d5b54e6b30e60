"""The activation store: a Zarr v3 group with rows, prompts, pictures and statistics.

Needs NumPy, ml_dtypes and zarr only, so that every package may read one.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
