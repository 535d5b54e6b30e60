from .demo import DemoConfig as DemoConfig
