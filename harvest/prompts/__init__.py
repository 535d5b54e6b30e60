"""Prompts: read from files and data sets, split, and encoded once.

A prompt's split depends on its text alone, an image's seed on the run's seed and the image's number.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
