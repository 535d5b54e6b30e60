__version__: str

from .dictionary.coder import decode as decode
from .dictionary.coder import encode as encode
from .dictionary.files import load_dictionary as load_dictionary
from .dictionary.files import save_dictionary as save_dictionary
from .itda.train import train_itda as train_itda
from .pursuit import gradient_pursuit as gradient_pursuit
from .pursuit import prepare_atoms as prepare_atoms
from .sae.module import SAE as SAE
from .training.saved_run import load_sae as load_sae
from .training.train import train_sae as train_sae
