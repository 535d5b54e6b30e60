"""SIGTERM and Ctrl-C as a flag that a training looks at."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


class Stop:
    """Whether somebody asked the process to stop."""

    def __init__(self) -> None:
        """Nobody has yet."""
        self.signal: int | None = None

    def __bool__(self) -> bool:
        """True once a signal came."""
        return self.signal is not None


@contextlib.contextmanager
def stop_signals() -> Iterator[Stop]:
    """Turn SIGTERM and the first Ctrl-C into a flag; handlers are put back at the end.

    Off the main thread, where Python allows no handlers, the flag simply stays down.
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
