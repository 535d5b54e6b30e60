from .batches import Fitted as Fitted
from .saved_run import first_state as first_state
from .saved_run import read_sae as read_sae
from .sweep import Member as Member
from .sweep import resolve as resolve
from .train import train_sae as train_sae
