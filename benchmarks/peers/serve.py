"""What all contenders' processes share: requests on stdin, answers on stdout, a JSON line each.

A contender is a class with `versions`, `start`, `run` and `reconstruct` (see `Contender`), a floor one
without the last (see `Computation`); this file does the rest: it keeps what the libraries print away from the answers, pins the process to
as many cores as it may use, times the steps and measures memory and the fraction of variance
unexplained, in the same way for all. Needs only NumPy.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

BLOCK = 2048
"""Rows that are reconstructed together when the error is measured."""


@dataclass(frozen=True)
class Job:
    """What a contender is to train, or, for a floor, to compute.

    Attributes:
        n: rows in a batch.
        m: atoms.
        k: active atoms a row.
        steps: optimizer steps of the whole run, which schedules refer to.
        rate: peak learning rate; 0 for `factor` times the contender's own default.
        factor: see `rate`.
        flat: five steps of warm-up and no decay, in place of the contender's own schedule.
        shuffle: draw the batches in a new order every epoch; else in the order of the file.
        dead_rows: rows without firing after which a feature is dead and AuxK, switched on where it
            is not, may revive it; 0 for the contender's own defaults.
        seed: of weights and order.
        variant: which of its ways a contender goes; empty for its default.
    """

    n: int
    m: int
    k: int
    steps: int
    rate: float = 0.0
    factor: float = 1.0
    flat: bool = False
    shuffle: bool = False
    dead_rows: int = 0
    seed: int = 0
    variant: str = ""


class Computation(Protocol):
    """Something to be timed."""

    def versions(self) -> dict[str, str]:
        """Imports what is needed and says in which versions."""
        ...

    def start(self, job: Job, rows: np.ndarray) -> float:
        """Builds all afresh for rows [rows, d]; returns the peak learning rate, 0 without one."""
        ...

    def run(self, steps: int) -> None:
        """Takes the next steps and waits until they are done."""
        ...


@runtime_checkable
class Contender(Computation, Protocol):
    """One way to train an autoencoder."""

    def reconstruct(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x_hat [n, d] of rows [n, d], and for each atom in how many of them it is active, [m]."""
        ...


class Batches:
    """The batches that every contender gets: batch number t is a function of (seed, t)."""

    def __init__(self, rows: np.ndarray, job: Job) -> None:
        """Over rows, or anything else with one entry a row."""
        self._rows, self._job, self._epoch = rows, job, -1
        self._order = np.arange(len(rows))
        self.each = len(rows) // job.n
        """Whole batches in an epoch."""

    def __call__(self, t: int) -> np.ndarray:
        """Batch number t, from 0: [n, ...]; no copy where the order is the file's."""
        epoch, place = divmod(t, self.each)
        part = slice(place * self._job.n, (place + 1) * self._job.n)
        if not self._job.shuffle:
            return self._rows[part]
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._job.seed, epoch]).permutation(
                len(self._rows)
            )
            self._epoch = epoch
        return self._rows[self._order[part]]


def serve(contender: Computation) -> None:
    """Answers requests until one says stop.

    open (rows, a job) -> rate; run (steps) -> seconds; measure (rows) -> fvu, l0, unused, or an
    error of what trains nothing; memory -> bytes before and at the peak.
    """
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    threads = int(os.environ["OMP_NUM_THREADS"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    print(json.dumps({"versions": contender.versions()}), file=answers)
    before = 0
    for line in sys.stdin:
        request = json.loads(line)
        match request.pop("do"):
            case "open":
                rows = np.load(request.pop("rows"))
                before = _forget_peak()
                answer: dict[str, Any] = {"rate": contender.start(Job(**request), rows)}
            case "run":
                started = time.perf_counter()
                contender.run(request["steps"])
                answer = {"seconds": time.perf_counter() - started}
            case "measure" if isinstance(contender, Contender):
                answer = _measure(contender, np.load(request["rows"], mmap_mode="r"))
            case "measure":
                answer = {
                    "error": "expected a contender, which rebuilds rows, got "
                    f"{type(contender).__name__}, which trains nothing; ask it for run alone"
                }
            case "memory":
                answer = {"before": before, "peak": _peak()}
            case _:
                return
        print(json.dumps(answer), file=answers)


def _measure(contender: Contender, rows: np.ndarray) -> dict[str, float]:
    """How well, and with which atoms, rows are rebuilt.

    fvu = sum ||x - x_hat||^2 / sum ||x - mean||^2; l0: active atoms a row; unused: share of atoms
    that are never active.
    """
    mean = rows.mean(0, dtype=np.float64)
    error = spread = 0.0
    counts: np.ndarray | int = 0
    for first in range(0, len(rows), BLOCK):
        x = np.ascontiguousarray(rows[first : first + BLOCK])
        x_hat, active = contender.reconstruct(x)
        error += float(np.square(x - x_hat.astype(np.float64)).sum())
        spread += float(np.square(x - mean).sum())
        counts = counts + np.asarray(active, np.int64)
    counts = np.asarray(counts)
    return {
        "fvu": error / spread,
        "l0": float(counts.sum() / len(rows)),
        "unused": float((counts == 0).mean()),
    }


def _forget_peak() -> int:
    """Lets the kernel's peak start anew where it can; returns the bytes resident now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1024
