"""The embedded model `shapes`: a small, true FLUX pipeline trained on drawn pictures.

Their ground truth is known, and `check` reads it back from any picture's pixels.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
