"""How the embedded model's weights were made; nothing here is needed to use it.

`python -m harvest.shapes.training.train --help` makes them again.
"""
