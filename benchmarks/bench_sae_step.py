"""How many rows a second does a full training step take in, beside the encoder's product alone?

python benchmarks/bench_sae_step.py [--quick]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from record import answer, interleaved

from jaxdict.codes import top_k
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
)

SHAPES = ((1024, 128, 1024, 16), (1024, 768, 12288, 32), (1024, 3072, 12288, 32))
QUICK = ((256, 64, 256, 8),)


def measure(n: int, d: int, m: int, k: int, *, rounds: int = 15) -> dict[str, object]:
    """Rows a second at one shape, after a check that the loss falls."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(m // 2, d)).astype(np.float32)
    weights = np.zeros((n, m // 2), np.float32)
    for row in weights:
        row[rng.choice(m // 2, k, replace=False)] = rng.exponential(size=k)
    x = jnp.asarray(weights @ truth / np.sqrt(d))
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
    variance = float(jnp.square(x - x.mean(0)).sum(1).mean())
    step_config = StepConfig(
        "topk",
        k,
        k,
        0,
        "",
        10**9,
        0.0,
        ScheduleConfig(10_000, 5, 0.0),
        AdamConfig(0.9, 0.999, 1e-8, 1.0),
    )
    hyperparams = Hyperparams(*(jnp.float32(value) for value in (1e-3, 0.0, 0.0, variance)))
    batch = Batch(bits, Normalizer(jnp.zeros(d), jnp.ones(d), jnp.ones(d)))
    state = initial_state(jax.random.key(0), m, mean=x.mean(0), step_config=step_config)
    step = make_train_step(step_config)
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch, hyperparams)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.9 * losses[0], losses
    holder = [state]

    def full() -> None:
        holder[0], metrics = step(holder[0], batch, hyperparams)
        jax.block_until_ready(metrics.loss)

    encoder = jnp.copy(holder[0].params.encoder)
    product = jax.jit(lambda a, b: a @ b.T)
    selected = jax.jit(lambda a, b: top_k(jax.nn.relu(a @ b.T), k))
    seconds = interleaved(
        {
            "full step": full,
            "encoder product": lambda: jax.block_until_ready(product(x, encoder)),
            "encoder product and top-k": lambda: jax.block_until_ready(selected(x, encoder)),
        },
        rounds=rounds,
    )
    return {
        "shape": {"n": n, "d": d, "m": m, "k": k},
        "loss": [losses[0], losses[-1]],
        "rows per second": {name: round(n / value) for name, value in seconds.items()},
    }


if __name__ == "__main__":
    huge_pages.ask()
    answer("sae_step", measure, SHAPES, quick=QUICK)
