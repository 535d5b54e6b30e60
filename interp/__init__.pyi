from .index.arrays import load_index as load_index
