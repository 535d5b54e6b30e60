from .config import InspectConfig as InspectConfig
