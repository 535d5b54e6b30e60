"""The TopK autoencoder of SAELens, by its own `SAETrainer.step`."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from serve import Batches, Job, serve


class SAELens:
    """Calls SAETrainer.step on each batch, the seam that the library offers to outside loops.

    Variants: "" is the library's default, dense codes; "sparse" switches its sparse codes on. For
    these torch has, on the CPU, no backward pass through the scaling by the decoder's norms: that
    is switched off with them.
    """

    def versions(self) -> dict[str, str]:
        """Imports the library."""
        import sae_lens
        import torch
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.torch, self.library = torch, sae_lens
        self.settings, self.kind = SAETrainerConfig, SAETrainer
        return {name: version(name) for name in ("sae-lens", "torch")}

    def start(self, job: Job, rows: np.ndarray) -> float:
        """A new trainer: Adam, gradients clipped at norm 1."""
        batches = Batches(rows, job)
        self.torch.manual_seed(job.seed)
        # By default it counts a feature as dead after 1000 steps.
        window = {"dead_feature_window": job.dead_rows // job.n} if job.dead_rows else {}
        sae = self.library.TopKTrainingSAE(
            self.library.TopKTrainingSAEConfig(
                d_in=rows.shape[1],
                d_sae=job.m,
                k=job.k,
                use_sparse_activations=job.variant == "sparse",
                rescale_acts_by_decoder_norm=job.variant != "sparse",
            )
        )
        amount = {"total_training_samples": job.steps * job.n, "train_batch_size_samples": job.n}
        rate = job.rate or job.factor * self.settings(**amount).lr
        self.data = (self.torch.from_numpy(batches(t)) for t in range(job.steps))
        # Its default schedule is flat; its tutorial lets the rate fall over the last fifth.
        self.trainer = self.kind(
            cfg=self.settings(
                **amount,
                **window,
                lr=rate,
                lr_end=rate,
                lr_warm_up_steps=5 if job.flat else 0,
                lr_decay_steps=0 if job.flat else job.steps // 5,
            ),
            sae=sae,
            data_provider=self.data,
        )
        return rate

    def run(self, steps: int) -> None:
        """The next steps."""
        for _ in range(steps):
            self.trainer.step(next(self.data))
            self.trainer.n_training_steps += 1

    def reconstruct(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By the autoencoder's own encode and decode."""
        with self.torch.no_grad():
            codes = self.trainer.sae.encode(self.torch.from_numpy(x))
            x_hat = self.trainer.sae.decode(codes)
            return x_hat.numpy(), (codes.to_dense() != 0).sum(0).numpy()


if __name__ == "__main__":
    serve(SAELens())
