"""Dictionary -> pictures: edit features while a picture is made, and measure what happens.

Importing this package loads neither torch nor diffusers; the names below do.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
