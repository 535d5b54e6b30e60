"""SIGTERM and Ctrl-C as a flag that a training checks between two steps."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


class Stop:
    """Whether a signal has asked the process to stop."""

    def __init__(self) -> None:
        """Start without a signal."""
        self.signal: int | None = None

    def __bool__(self) -> bool:
        """True once a signal has come."""
        return self.signal is not None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGTERM and the first Ctrl-C into a flag; the handlers before are restored at the end.

    Outside the main thread Python allows no handlers, and the flag stays down.
    """
    stop = Stop()
    before: dict[int, Any] = {}

    def ask(number: int, _frame: Any) -> None:
        stop.signal = number
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError):
                before[number] = signal.getsignal(number)
                signal.signal(number, ask)
        yield stop
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):
                signal.signal(number, handler)
