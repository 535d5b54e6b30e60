"""Compiling is most of the tests' time: it is done without LLVM's costly passes, and once for a whole run.

Processes that a test starts as users do (`tests.jaxdict.command`) compile in full.
"""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest

_CACHE = "JAX_COMPILATION_CACHE_DIR"


def pytest_configure(config: pytest.Config) -> None:
    """Before anything imports jax; the processes that share the work inherit the environment."""
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    if _CACHE in os.environ:
        return
    folder = tempfile.mkdtemp(prefix="jaxdict-compiled-")
    os.environ[_CACHE] = folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
