from .config import TrainITDAConfig as TrainITDAConfig
from .labels import label as label
from .labels import pictures as pictures
from .labels import positions as positions
from .labels import select_sources as select_sources
from .saved_run import run_to_dictionary as run_to_dictionary
from .sheet import draw_most_used as draw_most_used
from .train import train_itda as train_itda
