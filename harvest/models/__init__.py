"""FLUX pipelines: found, loaded and quantized.

A `LoadedModel` is a diffusers pipeline and what a harvest needs to know about it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
