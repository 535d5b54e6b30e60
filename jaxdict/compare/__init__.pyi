from .config import CompareConfig as CompareConfig
