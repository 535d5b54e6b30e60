"""The encoder's product alone, in torch."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from serve import Batches, Job, serve


class Product:
    """x @ encoder.T."""

    def versions(self) -> dict[str, str]:
        """Imports torch."""
        import torch

        self.torch = torch
        return {"torch": version("torch")}

    def start(self, job: Job, rows: np.ndarray) -> float:
        """Random weights, and a check of the answer."""
        weights = np.random.default_rng(job.seed).standard_normal(
            (job.m, rows.shape[1]), np.float32
        )
        self.x = self.torch.from_numpy(Batches(rows, job)(0))
        self.encoder = self.torch.from_numpy(weights)
        found = self.torch.nn.functional.linear(self.x[:8], self.encoder).numpy()
        assert np.allclose(found, rows[:8] @ weights.T, rtol=1e-3, atol=1e-2)
        return 0.0

    def run(self, steps: int) -> None:
        """So many times."""
        for _ in range(steps):
            self.torch.nn.functional.linear(self.x, self.encoder)


if __name__ == "__main__":
    serve(Product())
