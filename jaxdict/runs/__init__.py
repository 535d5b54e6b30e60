"""A run's folder: its settings, its log, its checkpoints, its curve.

What is written here is what `--resume`, `export` and `inspect` read.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
