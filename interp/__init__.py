"""What the features of a dictionary mean: an index over a store, ground-truth scores, a report to look at.

Importing this package loads nothing heavy; the names below load what they need.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
