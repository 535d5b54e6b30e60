"""JAX dictionary learning on the activations of image models: activations in, dictionaries out.

Importing this package loads neither jax nor torch; the names below load what they need.
"""

import lazy_loader

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    """A public name, or the installed version, looked up when somebody asks for it."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("jaxdict")
        except PackageNotFoundError:
            return "0+unknown"
    return _attribute(name)
