from .huge_pages import ask as ask
from .mesh import DATA as DATA
from .mesh import FEATURES as FEATURES
