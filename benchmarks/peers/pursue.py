"""What the pursuits' processes share: one request, answered with codes; then timed runs. NumPy only.

Speaks the protocol of serve.py. A contender gets rows [n, d], unit atoms [m, d] and k when it is
opened (in one .npz file), and pursues once a step; `measure` gives the relative squared error of
the codes it found, computed here in float64 from the reconstruction it returns.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from serve import Job, serve


class Pursuer(Protocol):
    """One way to pursue."""

    def versions(self) -> dict[str, str]:
        """Imports what is needed and says in which versions."""
        ...

    def give(self, x: np.ndarray, atoms: np.ndarray, k: int) -> None:
        """Takes the problem, in the layout it likes; this is not timed."""
        ...

    def pursue(self) -> np.ndarray:
        """Weights [n, m], dense."""
        ...


class Serving:
    """A pursuer as serve.py wants it: its `rows` are those of the problem, its atoms beside them."""

    def __init__(self, pursuer: Pursuer) -> None:
        """Of one pursuer."""
        self._pursuer = pursuer
        self.versions = pursuer.versions

    def start(self, job: Job, rows: np.ndarray) -> float:
        """Job.variant is the file of the atoms."""
        self._atoms = np.load(Path(job.variant))
        self._k = job.k
        self._pursuer.give(rows[: job.n], self._atoms, job.k)
        return 0.0

    def run(self, steps: int) -> None:
        """So many times the whole problem."""
        for _ in range(steps):
            self._pursuer.pursue()

    def reconstruct(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """x_hat in float64, and how many rows use each atom."""
        self._pursuer.give(x, self._atoms, self._k)
        weights = self._pursuer.pursue().astype(np.float64)
        return weights @ self._atoms.astype(np.float64), (weights != 0).sum(0)


def serve_pursuer(pursuer: Pursuer) -> None:
    """Answers requests until one says stop."""
    serve(Serving(pursuer))
