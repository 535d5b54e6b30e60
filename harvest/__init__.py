"""Prompts to activations: run a FLUX pipeline, keep what its blocks compute in a Zarr store.

Importing this package loads neither torch nor zarr; the names below load what they need.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
