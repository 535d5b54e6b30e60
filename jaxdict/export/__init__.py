"""`jaxdict export` and `jaxdict prune`: a run becomes a dictionary, a dictionary a smaller one.

Dictionaries are read and written by `jaxdict.dictionary`, whose names are handed on here.
"""

from jaxdict.dictionary import load_dictionary as load_dictionary
from jaxdict.dictionary import save_dictionary as save_dictionary
