from .arrays import FeatureIndex as FeatureIndex
from .arrays import load_index as load_index
from .ground_truth import POOLINGS as POOLINGS
