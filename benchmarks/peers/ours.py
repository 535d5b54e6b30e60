"""Our TopK autoencoder, by `jaxdict.sae.step.make_train_step`."""

from __future__ import annotations

from importlib.metadata import version
from math import sqrt

import jax
import jax.numpy as jnp
import numpy as np
from serve import Batches, Job, serve

from jaxdict.devices import huge_pages
from jaxdict.rows import Normalizer
from jaxdict.sae import (
    AdamConfig,
    Batch,
    Hyperparams,
    ScheduleConfig,
    StepConfig,
    initial_state,
    make_train_step,
    model,
)


class Ours:
    """One call of the compiled update a batch, as the trainer does it."""

    def versions(self) -> dict[str, str]:
        """Versions of jaxdict and of JAX."""
        return {name: version(name) for name in ("jaxdict", "jax", "jaxlib")}

    def start(self, job: Job, rows: np.ndarray) -> float:
        """Make a state and a step, with the defaults of `jaxdict train sae`."""
        d, mean = rows.shape[1], rows.mean(0)
        rate = job.rate or job.factor * 2e-3 * sqrt(1024 / job.m)
        # Of the default 100 steps of warm-up a short run has fewer, as the peers' do.
        warmup = 5 if job.flat else min(100, job.steps // 10)
        step_config = StepConfig(
            kind="topk",
            k=job.k,
            slots=job.k,
            k_aux=min(2 * job.k, d // 2),
            aux_form="residual",
            dead_rows=job.dead_rows or 200_000,
            ema=0.0,
            schedule=ScheduleConfig(job.steps, warmup, 0.0 if job.flat else 0.2),
            adam=AdamConfig(0.7, 0.99, 1e-8, 1.0),
        )
        variance = np.square(rows - mean).sum(1, dtype=np.float64).mean()
        self.hyperparams = Hyperparams(
            *(jnp.float32(value) for value in (rate, 1 / 32, 0.0, variance))
        )
        # Rows come as bfloat16 bits, as a store holds them; the job's rows fit into them exactly.
        self.batches, self.at, self.k = Batches(bits_of(rows), job), 0, job.k
        self.normalizer = Normalizer(jnp.zeros(d), jnp.ones(d), jnp.ones(d))
        self.state = initial_state(
            jax.random.key(job.seed), job.m, mean=jnp.asarray(mean), step_config=step_config
        )
        first = self.state.params
        self.state = self.state._replace(params=first._replace(encoder=0.25 * first.encoder))
        self.step = make_train_step(step_config)
        return rate

    def run(self, steps: int) -> None:
        """Take the next steps."""
        metrics = None
        for t in range(self.at, self.at + steps):
            batch = Batch(jnp.asarray(self.batches(t)), self.normalizer)
            self.state, metrics = self.step(self.state, batch, self.hyperparams)
        self.at += steps
        jax.block_until_ready((self.state, metrics))

    def reconstruct(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rebuilt rows, and how often each feature was active, by `jaxdict.sae.model`."""
        params = self.state.best("topk")
        codes, _ = model.encode(params, jnp.asarray(x), self.k)
        x_hat = model.decode(codes, params.atoms, params.bias)
        active = np.asarray(codes.indices)[np.asarray(codes.values) > 0]
        return np.asarray(x_hat), np.bincount(active, minlength=len(params.atoms))


def bits_of(rows: np.ndarray) -> np.ndarray:
    """The bfloat16 bits of float32 rows, which must fit into them exactly."""
    bits = (rows.view(np.uint32) >> 16).astype(np.uint16)
    assert ((bits.astype(np.uint32) << 16).view(np.float32) == rows).all()
    return bits


if __name__ == "__main__":
    huge_pages.ask()
    serve(Ours())
