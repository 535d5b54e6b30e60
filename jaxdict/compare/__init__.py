"""`jaxdict compare`: which dictionaries, layers and models are alike.

By the sources of ITDA atoms, and by CKA and SVCCA of the rows.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
