from .coder import Coder as Coder
from .coder import Codes as Codes
from .edits import Edit as Edit
from .hooks import steering as steering
from .splice import splicing as splicing
