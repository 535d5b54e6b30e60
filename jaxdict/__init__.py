"""JAX dictionary learning on the activations of image models: activations in, dictionaries out.

Importing this package loads nothing heavy; import the module you need, for example
`jaxdict.export` or `jaxdict.train`.
"""

from __future__ import annotations

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Look the installed version up only when somebody asks for it."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("jaxdict")
        except PackageNotFoundError:
            return "0+unknown"
    raise AttributeError(f"module 'jaxdict' has no attribute {name!r}")
