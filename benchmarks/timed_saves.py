"""A verb as `jaxdict` runs it, which prints how long each save of a checkpoint held the training up.

python benchmarks/timed_saves.py VERB ...
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxdict import cli
from jaxdict.runs import Checkpoints


def timed(save: Callable[..., None]) -> Callable[..., None]:
    """The method that saves a checkpoint, timed from a state that is ready on."""

    def timed_save(
        checkpoints: Checkpoints, step: int, state: Any, *rest: Any, **options: Any
    ) -> None:
        jax.block_until_ready(state)
        checkpoints.wait()  # of the save before; here the steps are too few to hide it
        before, started = _peak(), time.perf_counter()
        save(checkpoints, step, state, *rest, **options)
        wait = round(time.perf_counter() - started, 3)
        print(json.dumps({"wait": wait, "resident before": before}), flush=True)

    return timed_save


def _peak() -> int:
    """Peak of the resident memory so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)


if __name__ == "__main__":
    Checkpoints.save = timed(Checkpoints.save)
    cli.main(sys.argv[1:])
