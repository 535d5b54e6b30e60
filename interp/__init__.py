"""What the features of a dictionary mean: an index over a store, ground-truth scores, and a report to look at.

Importing this package loads nothing heavy; import the module you need, for example `interp.index` or `interp.report`.
"""
