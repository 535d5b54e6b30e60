"""An autoencoder with random weights, and rows for it."""

from __future__ import annotations

import jax

from jaxdict.sae import model
from jaxdict.sae.model import SAEParams

N, D, M, K = 24, 10, 40, 4


def params_and_rows(seed=0, m=M, d=D, n=N):
    keys = jax.random.split(jax.random.key(seed), 5)
    params = SAEParams(
        jax.random.normal(keys[0], (m, d)),
        0.3 * jax.random.normal(keys[1], (m,)),
        jax.random.normal(keys[2], (m, d)),
        0.5 * jax.random.normal(keys[3], (d,)),
    )
    return model.unit_norm(params), jax.random.normal(keys[4], (n, d))
