"""Dead features set on badly rebuilt rows."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from jaxdict.dictionary import ENCODER_KINDS
from jaxdict.sae import kinds, sharding
from jaxdict.sae.model import SAEParams
from jaxdict.sae.optimizer import optimizer
from jaxdict.sae.state import Batch, TrainState
from jaxdict.sae.step_config import SINGLE_DEVICE, StepConfig


def resample(
    state: TrainState,
    batch: Batch,
    step_config: StepConfig,
    *,
    seeds: Sequence[int],
    step: int,
    devices: Mesh | None = None,
) -> TrainState:
    """Set every dead feature on a row of the batch, drawn by its squared error.

    Its atom becomes the row minus the bias, of unit norm, and its encoder the same times a fifth of the mean norm
    of the live encoders. Its encoder bias, its counter and its moments in the optimizer become 0.

    Args:
        state: of one model, or of several stacked on a first axis.
        batch: rows of this step.
        step_config: fixed numbers of the step.
        seeds: of each model's run.
        step: of the optimizer; a model's draw depends on its seed and this alone.
        devices: mesh that the state lies on.

    Returns:
        the state, on the same devices; unchanged if nothing is dead.

    Source: Bricken et al. 2023 (Towards Monosemanticity). Differs: the rows come from the batch at hand, and
    the draw weighs rows by their error, not by its square.
    """
    single = step_config._replace(execution=SINGLE_DEVICE)
    # In NumPy, so that every process of a run has the same.
    lows = np.asarray([seed % 2**32 for seed in seeds], np.uint32)
    return _resample_all(state, batch, lows, np.uint32(step), step_config=single, devices=devices)


@partial(jax.jit, static_argnames=("step_config", "devices"), donate_argnums=0)
def _resample_all(
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
    one = partial(_resample, step_config=step_config)
    if stacked:
        resampled = jax.vmap(one, in_axes=(0, None, 0))(state, batch, keys)
    else:
        resampled = one(state, batch, keys[0])
    if devices is None:
        return resampled
    # Without it the compiler might lay the arrays out anew, and the training step would compile again.
    return jax.lax.with_sharding_constraint(
        resampled, sharding.shardings(resampled, devices, members=len(seeds) if stacked else 0)
    )


def _resample(
    state: TrainState, batch: Batch, key: Array, *, step_config: StepConfig
) -> TrainState:
    params, rows = state.params, batch.normalized()
    out_bias = params.bias if params.out_bias is None else params.out_bias
    ready = params
    if ENCODER_KINDS[step_config.kind].threshold == "each" and params.threshold is not None:
        ready = params._replace(threshold=jnp.exp(params.threshold))
    codes = kinds.encode(ready, rows.inputs, step_config.slots)
    error = jnp.sum(jnp.square(rows.targets - kinds.decode(ready, codes)), axis=1)
    dead = state.since_fired >= step_config.dead_rows
    m = dead.shape[0]
    row = jax.random.categorical(key, jnp.log(jnp.maximum(error, 1e-30)), shape=(m,))

    def unit(rows: Array) -> Array:
        return rows / jnp.maximum(jnp.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    norms = jnp.linalg.norm(params.encoder, axis=1)
    live = jnp.sum(jnp.where(dead, 0.0, norms)) / jnp.maximum(jnp.sum(~dead), 1)
    size = 0.2 * jnp.where(jnp.all(dead), 1.0, live)
    fresh = params._replace(
        encoder=_where_dead(dead, size * unit(rows.inputs - params.bias)[row], params.encoder),
        encoder_bias=_where_dead(dead, 0.0, params.encoder_bias),
        atoms=_where_dead(dead, unit(rows.targets - out_bias)[row], params.atoms),
    )
    # A threshold stays as it was learned, and so do its moments.
    replaced = params.has_atom_axis()
    if params.threshold is not None:
        replaced = replaced._replace(threshold=False)
    moments: Any = optax.tree_utils.tree_map_params(
        optimizer(step_config),
        lambda moment, new: _where_dead(dead, 0.0, moment) if new else moment,
        state.optimizer,
        replaced,
    )
    ema: SAEParams | None = state.ema
    if ema is not None:
        ema = jax.tree.map(
            lambda of_atoms, old, new: _where_dead(dead, new, old) if of_atoms else old,
            params.has_atom_axis(),
            ema,
            fresh,
        )
    since_fired = jnp.where(dead, 0, state.since_fired)
    return state._replace(params=fresh, optimizer=moments, ema=ema, since_fired=since_fired)


def _where_dead(dead: Array, new: Array | float, old: Array) -> Array:
    """`new` in the place of what belongs to dead features; the first axis of `old` counts atoms."""
    return jnp.where(dead[:, None] if old.ndim == 2 else dead, new, old)
