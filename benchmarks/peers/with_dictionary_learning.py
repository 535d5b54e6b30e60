"""The TopK autoencoder of dictionary_learning, by its own `TopKTrainer.update`."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from serve import Batches, Job, serve


class DictionaryLearning:
    """Hands batches to TopKTrainer.update, as the library's own trainSAE does."""

    def versions(self) -> dict[str, str]:
        """Imports the library."""
        import torch
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.torch, self.kind = torch, TopKTrainer
        return {name: version(name) for name in ("dictionary-learning", "torch")}

    def start(self, job: Job, rows: np.ndarray) -> float:
        """A new trainer: Adam, gradients clipped at norm 1, unit atoms, AuxK of weight 1/32."""
        self.batches, self.at = Batches(rows, job), 0
        own = {"layer": 0, "lm_name": "rows", "device": "cpu"}
        # The library's default rate depends on the number of atoms alone; a tiny trainer tells it.
        default = self.kind(steps=2, activation_dim=1, dict_size=job.m, k=1, warmup_steps=0, **own)
        rate = job.rate or job.factor * default.lr
        # By default it warms up for 1000 steps, too many for a short run, and decays only if told.
        warmup = 5 if job.flat else min(1000, job.steps // 10)
        self.trainer = self.kind(
            steps=job.steps,
            activation_dim=rows.shape[1],
            dict_size=job.m,
            k=job.k,
            lr=rate,
            warmup_steps=warmup,
            decay_start=None if job.flat else int(0.8 * job.steps),
            seed=job.seed,
            **own,
        )
        if job.dead_rows:
            self.trainer.dead_feature_threshold = job.dead_rows
        return rate

    def run(self, steps: int) -> None:
        """The next steps."""
        for t in range(self.at, self.at + steps):
            self.trainer.update(t, self.torch.from_numpy(self.batches(t)))
        self.at += steps

    def reconstruct(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By the autoencoder's own encode and decode."""
        with self.torch.no_grad():
            codes = self.trainer.ae.encode(self.torch.from_numpy(x))
            return self.trainer.ae.decode(codes).numpy(), (codes != 0).sum(0).numpy()


if __name__ == "__main__":
    serve(DictionaryLearning())
