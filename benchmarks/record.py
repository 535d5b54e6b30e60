"""Where a benchmark's numbers go: JSON under results/, with machine, versions, shapes and commit."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harvest.atomic import write_json
from jaxdict.devices import huge_pages

RESULTS = Path(__file__).parent / "results"


def interleaved(runs: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each function; see `timings`."""
    return {name: statistics.median(found) for name, found in timings(runs, rounds).items()}


def timings(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function over `rounds` rounds, one call of each in every round.

    Each function must block until its result is there; each is called once before, to warm up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for function in runs.values():
        function()
    for _ in range(rounds):
        for name, function in runs.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def answer(
    question: str,
    measure: Callable[..., dict[str, Any]],
    shapes: Iterable[tuple[Any, ...]],
    *,
    quick: Iterable[tuple[Any, ...]],
) -> None:
    """Measure at every shape, print each row and write results/<question>.json.

    With --quick on the command line the `quick` shapes are measured instead, and nothing is written.
    """
    trying = "--quick" in sys.argv
    rows = []
    for shape in quick if trying else shapes:
        rows.append(measure(*shape))
        print(rows[-1], flush=True)
    if not trying:
        save(question, rows)


def save(question: str, rows: list[dict[str, Any]]) -> Path:
    """Write results/<question>.json; its path."""
    document = {
        "question": question,
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "system": platform.platform(),
            "malloc": os.environ.get(huge_pages.VARIABLE, ""),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("jax", "jaxlib", "numpy")},
        "commit": commit(),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = write_json(RESULTS / f"{question}.json", document)
    print(f"wrote {path}")
    return path


def commit() -> str:
    """Short name of the commit that is checked out."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
