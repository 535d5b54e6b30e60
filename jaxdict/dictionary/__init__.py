"""A learned dictionary of any kind: in memory, on disk, and its encoder and decoder in JAX.

`arrays` and `files` need NumPy and safetensors only; torch reads the same files through `steer.coder`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
