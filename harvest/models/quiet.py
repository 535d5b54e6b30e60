"""What libraries say while they load and run a model goes to the log, and their progress bars are hidden."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_WARNINGS = "py.warnings"
"""The logger that takes Python's warnings, as `logging.captureWarnings` has it."""
_LOGGERS = ("accelerate", "bitsandbytes", "diffusers", "huggingface_hub", "transformers", _WARNINGS)


@contextmanager
def logged() -> Iterator[None]:
    """Send libraries' log lines to the handlers of the root logger alone; without any, nobody sees them."""
    _configured()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(log.handlers, log.propagate) for log in loggers]
    try:
        for log in loggers:
            log.handlers, log.propagate = [logging.NullHandler()], True
        yield
    finally:
        for log, (handlers, propagate) in zip(loggers, before, strict=True):
            log.handlers, log.propagate = handlers, propagate


@contextmanager
def quiet(*, bars: bool = False) -> Iterator[None]:
    """As `logged`, for Python's warnings too, and without the libraries' progress bars.

    Args:
        bars: leave the progress bars, as for a download.
    """
    both = _configured()
    shown = [log for log in both if log.is_progress_bar_enabled() and not bars]
    try:
        for log in shown:
            log.disable_progress_bar()
        with logged(), warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = _to_log
            yield
    finally:
        for log in shown:
            log.enable_progress_bar()


def _configured() -> tuple[Any, Any]:
    """The logging modules of diffusers and transformers, whose loggers have their handlers by now."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for log in (of_diffusers, of_transformers):
        log.get_verbosity()
    return of_diffusers, of_transformers


def _to_log(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any
) -> None:
    """Logs a warning, in the place of `warnings.showwarning`."""
    text = warnings.formatwarning(message, category, filename, lineno)
    logging.getLogger(_WARNINGS).warning("%s", text.strip())
