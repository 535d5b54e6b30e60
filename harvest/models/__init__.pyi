from .compiled import uncompiled as uncompiled
from .compiled import unwrapped as unwrapped
from .files import read_config as read_config
from .pipelines import DTYPES as DTYPES
from .pipelines import LoadedModel as LoadedModel
from .pipelines import load_model as load_model
from .quantize import KEPT_WHOLE as KEPT_WHOLE
from .quantize import to_nf4 as to_nf4
