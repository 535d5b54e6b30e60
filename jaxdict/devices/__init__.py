"""Devices and memory: meshes, processes, huge pages.

Knows nothing of a model; how a train state is split is said by `jaxdict.sae.sharding`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
