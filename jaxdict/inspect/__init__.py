"""`jaxdict inspect`: what a store, a run or a dictionary holds.

Reads only; a store's table comes from its headers and statistics.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
