from .config import DemoConfig as DemoConfig
