from .config import EvalConfig as EvalConfig
