from .huge_pages import ask as ask
from .mesh import DATA as DATA
from .mesh import FEATURES as FEATURES
from .precision import FULL_PRECISION as FULL_PRECISION
from .processes import Processes as Processes
