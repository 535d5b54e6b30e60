"""What no trainer can do without, in JAX: the encoder's product, the top-k, one pass of Adam."""

from __future__ import annotations

from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
from serve import Batches, Job, serve

from jaxdict.codes import top_k
from jaxdict.devices import huge_pages


class Floor:
    """One of the parts, alone.

    Variants: "product" is x @ encoder.T; "top-k" is that and the k largest; "adam" is one update of encoder and decoder.
    """

    def versions(self) -> dict[str, str]:
        """Versions of JAX and Optax."""
        return {name: version(name) for name in ("jax", "jaxlib", "optax")}

    def start(self, job: Job, rows: np.ndarray) -> float:
        """Random weights, and a check of the answer."""
        weights = np.random.default_rng(job.seed).standard_normal(
            (job.m, rows.shape[1]), np.float32
        )
        if job.variant == "adam":
            self.once = _adam(weights)
            return 0.0
        x, encoder = jnp.asarray(Batches(rows, job)(0)), jnp.asarray(weights)
        expected = rows[:8] @ weights.T
        if job.variant == "product":
            product = jax.jit(lambda a, b: a @ b.T)
            assert np.allclose(product(x, encoder)[:8], expected, rtol=1e-3, atol=1e-2)
            self.once = lambda: product(x, encoder)
        else:
            chosen = jax.jit(lambda a, b: top_k(jax.nn.relu(a @ b.T), job.k))
            largest = np.sort(np.maximum(expected, 0), axis=1)[:, : -job.k - 1 : -1]
            assert np.allclose(chosen(x, encoder)[0][:8], largest, rtol=1e-3, atol=1e-2)
            self.once = lambda: chosen(x, encoder)
        return 0.0

    def run(self, steps: int) -> None:
        """Run the part `steps` times, waiting for each."""
        for _ in range(steps):
            jax.block_until_ready(self.once())


def _adam(weights: np.ndarray):
    """A step of optax's Adam on encoder and decoder, in place; the first moves all by the rate."""
    tx = optax.adam(1e-3)
    step = jax.jit(_pass(tx), donate_argnums=(0, 1))
    params = (jnp.array(weights), jnp.array(weights))
    gradient = (jnp.array(weights), jnp.array(-weights))
    holder = [params, tx.init(params)]

    def once() -> tuple:
        holder[:] = step(holder[0], holder[1], gradient)
        return holder[0]

    moved = [np.asarray(after) - weights for after in once()]
    wanted = 1e-3 * weights / (np.abs(weights) + 1e-8)
    assert np.allclose(moved[0], -wanted, rtol=0.02, atol=2e-6)
    assert np.allclose(moved[1], wanted, rtol=0.02, atol=2e-6)
    return once


def _pass(tx: optax.GradientTransformation):
    def step(params, moments, gradient):
        change, moments = tx.update(gradient, moments, params)
        return optax.apply_updates(params, change), moments

    return step


if __name__ == "__main__":
    huge_pages.ask()
    serve(Floor())
