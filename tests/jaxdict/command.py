"""`jaxdict` as users run it: a process of its own, to be waited for, asked to stop or killed."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdict.runs.folder import METRICS, read_lines, read_run
from jaxdict.training.saved_run import read_sae

ROOT = Path(__file__).parents[2]


def words(**settings: Any) -> list[str]:
    """Flags of `train sae`; a tuple gives several words, None leaves a flag out, True is a switch."""
    found = []
    for name, value in settings.items():
        if value is None:
            continue
        found.append(f"--{name.replace('_', '-')}")
        if value is not True:
            found += map(str, value if isinstance(value, tuple | list) else (value,))
    return found


class Command:
    """A `jaxdict VERB ...` that runs, on the CPU; what it prints goes to a file, so that it never waits.

    It compiles as for users; `as_here` as this process does, to be equal with it to the bit.
    """

    def __init__(self, *verb: str, devices: int = 1, as_here: bool = False) -> None:
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        flags = os.environ.get("XLA_FLAGS", "") if as_here else ""
        env["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxdict", *verb],
            cwd=ROOT,
            env=env,
            stdout=self._printed,
            stderr=subprocess.STDOUT,
        )

    @property
    def printed(self) -> str:
        """Output and errors so far."""
        self._printed.seek(0)
        return self._printed.read()

    def end(self, *, status: int = 0, seconds: float = 300) -> str:
        """Wait until it ends, as it should; what it printed."""
        try:
            self.process.wait(timeout=seconds)
        finally:
            self.process.kill()
            self.process.wait()
        code = self.process.returncode
        assert code == status, f"status {code}, not {status}\n{self.printed[-4000:]}"
        return self.printed

    def until(self, seen: Callable[[], bool], seconds: float = 300) -> None:
        """Wait for something that it does; kill it and fail if it ends or takes too long."""
        deadline = time.monotonic() + seconds
        while not seen():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(self.printed[-4000:])
            time.sleep(0.004)


def last_step(run: Path) -> int:
    """Step of the newest line of metrics.jsonl, 0 without one."""
    try:
        lines = read_lines(run / METRICS)
    except FileNotFoundError:
        return 0
    return lines[-1]["step"] if lines else 0


def curve(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what time passed."""
    lines = read_lines(run / METRICS)
    return [{name: v for name, v in line.items() if name != "seconds"} for line in lines]


def weights(run: Path, *, checkpoint: str = "newest") -> tuple[int, list[np.ndarray]]:
    """Step and weights of a run, as exported."""
    trained = read_sae(run, read_run(run), checkpoint=checkpoint)
    return trained.step, [np.asarray(leaf) for leaf in jax.tree.leaves(trained.params)]


def raw(arrays: list[np.ndarray]) -> list[bytes]:
    """Arrays to the bit."""
    return [array.tobytes() for array in arrays]
