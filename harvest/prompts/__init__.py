"""Prompts: read from files and data sets, split, and encoded once.

A prompt's split and an image's seed depend on nothing but the prompt and the number.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
