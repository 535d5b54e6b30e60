"""A verb as `jaxdict` runs it, which prints how long each save of a checkpoint held the training up.

python benchmarks/timed_saves.py VERB ...
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from jaxdict import cli
from jaxdict.runs import Checkpoints


class TimedCheckpoints(Checkpoints):
    """Checkpoints whose saves are timed, from a state that is ready on."""

    def save(self, step: int, state: Any, *arguments: Any, **options: Any) -> None:
        """Save, and print the seconds until the next step may begin."""
        jax.block_until_ready(state)
        self.wait()  # of the save before; here the steps are too few to hide it
        before, started = _peak(), time.perf_counter()
        super().save(step, state, *arguments, **options)
        wait = round(time.perf_counter() - started, 3)
        print(json.dumps({"wait": wait, "resident before": before}), flush=True)


def _peak() -> int:
    """Peak of the resident memory so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)


if __name__ == "__main__":
    from jaxdict.training import train

    train.Checkpoints = TimedCheckpoints
    cli.main(sys.argv[1:])
