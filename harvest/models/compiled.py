"""Compiled modules, run as they were written while hooks are set on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


def unwrapped(module: Any) -> Any:
    """The module that `torch.compile(module)` wraps; any other module as it is.

    A hook set on the wrapper sees the module's inputs and outputs, but `modules()` of the wrapper
    and what the compiled code calls are the module itself.
    """
    return getattr(module, "_orig_mod", module)


@contextmanager
def uncompiled(module: nn.Module) -> Iterator[None]:
    """Run a module, and all modules in it, without `torch.compile` while the context lasts.

    A compiled graph does not call the hooks that were set after it was made, and `fullgraph=True`
    takes none that read the step. So the compiled code is left out, and is there again afterwards.
    A module that is not compiled is not touched. While the context lasts, other compiled modules of
    the process run as they were written, too.

    Args:
        module: a module that is compiled in any way, in whole or in parts, or not at all.
    """
    stance: AbstractContextManager[Any] = nullcontext()
    if any(map(_is_compiled, module.modules())):
        stance = torch.compiler.set_stance("force_eager")
    with stance:
        yield


def _is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()`, `torch.compile(module)` or a compiled `forward` made it."""
    return module._compiled_call_impl is not None or hasattr(
        module.forward, "_torchdynamo_orig_callable"
    )
