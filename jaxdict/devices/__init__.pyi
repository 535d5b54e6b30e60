from . import huge_pages as huge_pages
from . import mesh as mesh
from .huge_pages import ask as ask
from .mesh import DATA as DATA
from .mesh import FEATURES as FEATURES
from .mesh import own_indices as own_indices
from .precision import FULL_PRECISION as FULL_PRECISION
from .processes import Processes as Processes
