"""The sparse coder of sparsify, by its own `Trainer.fit`, whole and unchanged.

The library trains on a hooked module of a language model. Here the model is a module that hands
out rows, its tokens are numbers of batches, and one token sequence is one batch. `fit` is a
single loop: it runs in a thread of its own, and the data set holds it back at a batch until more
steps are asked for. The decoder is the one that the library chooses without Triton, torch's
embedding_bag.
"""

from __future__ import annotations

import tempfile
import threading
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from serve import Batches, Job, serve

SITE = "site"


class Gate:
    """A data set of numbered batches that lets its reader go only as far as it has been told."""

    def __init__(self, torch: Any, job: Job) -> None:
        """Closed, at batch 0."""
        self._torch, self._job = torch, job
        self._left, self._more, self.reached = 0, threading.Semaphore(0), threading.Semaphore(0)

    def __len__(self) -> int:
        """Batches in all."""
        return self._job.steps

    def __getitem__(self, t: int) -> dict[str, Any]:
        """Token ids of batch t, all t; waits until it is wanted."""
        if not self._left:
            if t:
                self.reached.release()
            self._more.acquire()
        self._left -= 1
        return {"input_ids": self._torch.full((self._job.n,), t)}

    def open(self, steps: int) -> None:
        """Lets the next batches through."""
        self._left = steps
        self._more.release()


def model_of(torch: Any, batches: Batches) -> Any:
    """A torch module with what the trainer asks of a language model, and a site for its hook."""

    class Rows(torch.nn.Module):
        device, dummy_inputs = torch.device("cpu"), {"input_ids": torch.zeros((1, 1), dtype=int)}

        def __init__(self) -> None:
            super().__init__()
            setattr(self, SITE, torch.nn.Identity())

        @property
        def base_model(self) -> Any:
            return self

        def forward(self, input_ids: Any) -> Any:
            rows = torch.from_numpy(batches(int(input_ids[0, 0])))
            return getattr(self, SITE)(rows[None])

    return Rows()


class Sparsify:
    """Trainer.fit, a few steps at a time.

    Variants: "" trains with Adam; "signum" with the library's default optimizer.
    """

    def versions(self) -> dict[str, str]:
        """Imports the library."""
        import sparsify
        import torch

        self.torch, self.library = torch, sparsify
        self.folder = tempfile.TemporaryDirectory(prefix="bench-sparsify-")
        return {name: version(name) for name in ("eai-sparsify", "torch")}

    def start(self, job: Job, rows: np.ndarray) -> float:
        """A new trainer, with its loop waiting at the first batch."""
        model = model_of(self.torch, Batches(rows, job))
        self.gate, self.asked, self.job = Gate(self.torch, job), 0, job
        rate = job.rate or job.factor * _rate_of(self._trainer(job, model, None))
        self.trainer = self._trainer(job, model, rate)
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._fit, daemon=True)
        self.thread.start()
        return rate

    def _trainer(self, job: Job, model: Any, rate: float | None) -> Any:
        # By default it has no AuxK loss, and counts a feature as dead after 10 million rows.
        reviving = {"auxk_alpha": 1 / 32, "dead_feature_threshold": job.dead_rows}
        settings = self.library.TrainConfig(
            self.library.SaeConfig(num_latents=job.m, k=job.k),
            batch_size=1,
            optimizer=job.variant or "adam",
            lr=rate,
            lr_warmup_steps=5 if job.flat else min(1000, job.steps // 10),
            hookpoints=[SITE],
            init_seeds=[job.seed],
            log_to_wandb=False,
            save_dir=self.folder.name,
            save_every=10**9,
            run_name="run",
            **(reviving if job.dead_rows else {}),
        )
        return self.library.Trainer(settings, self.gate, model)

    def _fit(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:
            self.failure = error
        self.gate.reached.release()

    def run(self, steps: int) -> None:
        """The next steps of the loop."""
        self.gate.open(steps)
        self.gate.reached.acquire()
        self.asked += steps
        if self.failure is not None:
            raise self.failure
        if self.asked == self.job.steps:
            self.thread.join()

    def reconstruct(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """By the coder's own forward pass; after the last step, by the coder that was saved."""
        coder = self.trainer.saes[SITE]
        if not self.thread.is_alive():
            coder = self.library.SparseCoder.load_from_disk(Path(self.folder.name) / "run" / SITE)
        with self.torch.no_grad():
            out = coder(self.torch.from_numpy(x))
        active = self.torch.bincount(
            out.latent_indices[out.latent_acts > 0], minlength=coder.num_latents
        )
        return out.sae_out.numpy(), active.numpy()


def _rate_of(trainer: Any) -> float:
    group = trainer.optimizers[0].param_groups[0]
    return group.get("initial_lr", group["lr"])


if __name__ == "__main__":
    serve(Sparsify())
