"""Weights made from rows: first atoms drawn from the data, and dead features set on badly rebuilt rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from jaxdict.rows import bfloat16_rows, normalize
from jaxdict.sae import kinds, sharding
from jaxdict.sae.model import SAEParams
from jaxdict.sae.state import Batch, TrainState
from jaxdict.sae.step_config import Execution, StepConfig


def revive(
    state: TrainState,
    batch: Batch,
    step_config: StepConfig,
    seeds: Sequence[int],
    step: int,
    devices: Mesh | None = None,
) -> TrainState:
    """Set every dead feature on a row of the batch, drawn by its squared error.

    Its atom becomes the row minus the bias, of unit norm, its encoder the same times a fifth of the mean norm of
    the live encoders, its bias 0, its counter 0 and its Adam moments 0.

    Args:
        state: of one model, or stacked on a first axis.
        batch: rows of this step.
        step_config: fixed numbers of the step.
        seeds: of each model's run.
        step: of the optimizer; a model's draw is a function of its seed and this.
        devices: mesh that the state lies on.

    Returns:
        The state, where it was; the same where nothing is dead.

    Source: Bricken et al. 2023 (Towards Monosemanticity). Differs: the rows come from the batch at hand, and
    the draw weighs rows by their error, not by its square.
    """
    alone = step_config._replace(execution=Execution())
    # NumPy: every process of a run has the same.
    lows = np.asarray([seed % 2**32 for seed in seeds], np.uint32)
    return _revive_all(state, batch, lows, np.uint32(step), step_config=alone, devices=devices)


@partial(jax.jit, static_argnames=("step_config", "devices"), donate_argnums=0)
def _revive_all(
    state: TrainState,
    batch: Batch,
    seeds: Array,
    step: Array,
    *,
    step_config: StepConfig,
    devices: Mesh | None,
) -> TrainState:
    stacked = state.step.ndim > 0
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), step))(seeds)
    one = partial(_revive, step_config=step_config)
    if stacked:
        fresh = jax.vmap(one, in_axes=(0, None, 0))(state, batch, keys)
    else:
        fresh = one(state, batch, keys[0])
    if devices is None:
        return fresh
    # Else the compiler might lay the arrays out anew, and the training step would compile again.
    return jax.lax.with_sharding_constraint(
        fresh, sharding.shardings(fresh, devices, members=len(seeds) if stacked else 0)
    )


def _revive(state: TrainState, batch: Batch, key: Array, *, step_config: StepConfig) -> TrainState:
    params = state.params
    z = normalize(batch.normalizer, bfloat16_rows(batch.bits))
    y, out_bias = z, params.bias
    if batch.target_bits is not None:
        assert batch.target_normalizer is not None and params.out_bias is not None
        y, out_bias = (
            normalize(batch.target_normalizer, bfloat16_rows(batch.target_bits)),
            params.out_bias,
        )
    ready = params
    if kinds.REGISTRY[step_config.kind].log_threshold and params.threshold is not None:
        ready = params._replace(threshold=jnp.exp(params.threshold))
    codes = kinds.encode(ready, z, step_config.slots)
    error = jnp.sum(jnp.square(y - kinds.decode(ready, codes)), axis=1)
    dead = state.since_fired >= step_config.dead_rows
    m = dead.shape[0]
    row = jax.random.categorical(key, jnp.log(jnp.maximum(error, 1e-30)), shape=(m,))

    def unit(rows: Array) -> Array:
        return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    norms = jnp.linalg.norm(params.encoder, axis=1)
    live = jnp.sum(jnp.where(dead, 0.0, norms)) / jnp.maximum(jnp.sum(~dead), 1)
    size = 0.2 * jnp.where(jnp.all(dead), 1.0, live)
    column = dead[:, None]
    fresh = params._replace(
        encoder=jnp.where(column, size * unit(z - params.bias)[row], params.encoder),
        encoder_bias=jnp.where(dead, 0.0, params.encoder_bias),
        atoms=jnp.where(column, unit(y - out_bias)[row], params.atoms),
    )

    def forget(moments: SAEParams) -> SAEParams:
        return moments._replace(
            encoder=jnp.where(column, 0.0, moments.encoder),
            encoder_bias=jnp.where(dead, 0.0, moments.encoder_bias),
            atoms=jnp.where(column, 0.0, moments.atoms),
        )

    adam = state.optimizer
    optimizer = adam._replace(mu=forget(adam.mu), nu=forget(adam.nu))
    ema = state.ema
    if ema is not None:
        ema = jax.tree.map(
            lambda old, new: (
                jnp.where(column if old.ndim == 2 else dead, new, old)
                if old.shape[:1] == dead.shape and new is not None
                else old
            ),
            ema,
            fresh,
        )
    since = jnp.where(dead, 0, state.since_fired)
    return state._replace(params=fresh, optimizer=optimizer, ema=ema, since_fired=since)
