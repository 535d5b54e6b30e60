from .config import EvalConfig as EvalConfig
from .rows import check_width as check_width
from .rows import target_rows as target_rows
