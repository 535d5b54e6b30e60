from .prompts import PromptList as PromptList
from .prompts import image_seed as image_seed
from .prompts import prompts_hash as prompts_hash
from .prompts import read_prompts as read_prompts
from .prompts import split_of as split_of
from .readers import Prompt as Prompt
from .text_cache import TextCache as TextCache
