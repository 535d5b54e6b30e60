"""The contenders' processes, seen from the benchmark: start one, ask it, end it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = Path(sys.executable)
PEERS = HERE.parents[1] / ".venv-peers" / "bin" / "python"
THREADS = min(2, os.cpu_count() or 1)


@dataclass(frozen=True)
class Way:
    """A file beside this one, the interpreter that it needs, and which of its variants is meant."""

    file: str
    python: Path
    variant: str = ""


class Worker:
    """The process of one contender; it computes only between a request and its answer."""

    def __init__(self, name: str, way: Way) -> None:
        """Start it and wait until it has imported what it needs."""
        self.name, self.way = name, way
        self._complaints = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        settings = {
            **dict.fromkeys(pools, str(THREADS)),
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            # Triton has no CPU back end; sparsify would still choose it where it is installed.
            "SPARSIFY_DISABLE_TRITON": "1",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
        }
        self._process = subprocess.Popen(
            [way.python, HERE / way.file],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            env=os.environ | settings,
        )
        self.versions: dict[str, str] = self._answer()["versions"]

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for the answer.

        Raises:
            RuntimeError: the process has ended, with the last of what it complained about; or it
                cannot do what it was asked for.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._complaints.seek(0)
            raise RuntimeError(f"{self.name} ended:\n{self._complaints.read()[-4000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def stop(self) -> None:
        """End it: with no more to read it leaves by itself and clears up, else it is killed."""
        try:
            self._process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
        self._complaints.close()


@contextmanager
def workers(ways: dict[str, Way]) -> Iterator[dict[str, Worker]]:
    """A process for each name; all are ended in the end, whatever is raised inside."""
    with ExitStack() as stack:
        found = {}
        for name, way in ways.items():
            found[name] = Worker(name, way)
            stack.callback(found[name].stop)
        yield found


def merged(versions: Any) -> dict[str, str]:
    """All in one, sorted."""
    return dict(sorted({name: value for one in versions for name, value in one.items()}.items()))
