"""One training step: what is learned or counted, and the pure function that moves it on."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxdict import losses, sae
from jaxdict.codes import Codes
from jaxdict.normalize import Space, bfloat16_rows, normalize
from jaxdict.sae import SAEParams


class TrainState(NamedTuple):
    """All that a checkpoint holds of the model.

    Attributes:
        params: the weights.
        optimizer: Optax's state.
        step: int32 [], optimizer steps taken.
        since_fired: int32 [m], rows seen since each feature was last active.
        ema: moving average of the weights, or None.
    """

    params: SAEParams
    optimizer: Any
    step: Int[Array, ""]
    since_fired: Int[Array, " m"]
    ema: SAEParams | None

    @property
    def best(self) -> SAEParams:
        """The weights to use: the average where there is one, with unit atoms."""
        return self.params if self.ema is None else sae.unit_norm(self.ema)


class Metrics(NamedTuple):
    """Numbers of one step, scalars on the device.

    Attributes:
        loss: reconstruction loss, the batch's FVU in the normalized space.
        aux: AuxK loss, 0 while no feature is dead.
        l0: mean active atoms a row.
        dead: share of features that have not fired for `dead_rows` rows.
        gradient: global norm of the gradient before clipping.
    """

    loss: Array | float
    aux: Array | float
    l0: Array | float
    dead: Array | float
    gradient: Array | float


class Rate(NamedTuple):
    """A learning-rate schedule in numbers.

    Attributes:
        peak: largest rate.
        steps: optimizer steps of the whole run.
        warmup: steps of linear warm-up.
        decay: share of the run, at its end, over which the rate falls to 0; 0 for none.
    """

    peak: float
    steps: int
    warmup: int
    decay: float


class Adam(NamedTuple):
    """Adam in numbers, and the largest global norm of the gradient before it (0: any)."""

    b1: float
    b2: float
    eps: float
    clip: float


class Recipe(NamedTuple):
    """The fixed numbers of a step, all resolved; two equal recipes share one compiled step.

    Attributes:
        k: active atoms a row.
        variance: total variance of normalized training rows.
        aux: weight of the AuxK loss.
        k_aux: slots of the AuxK codes; 0 for no such loss.
        dead_rows: rows without firing that make a feature dead.
        ema: decay of the average, 0 for none.
        rate: learning rate.
        adam: optimizer.
    """

    k: int
    variance: float
    aux: float
    k_aux: int
    dead_rows: int
    ema: float
    rate: Rate
    adam: Adam


def learning_rate(rate: Rate) -> Callable[[Any], Array]:
    """Linear warm-up, flat, then linear to 0: a function of the step (from 0)."""

    def at(step: Any) -> Array:
        up = (step + 1) / max(1, rate.warmup)
        down = (rate.steps - step) / (rate.decay * rate.steps) if rate.decay > 0 else 1.0
        return rate.peak * jnp.clip(jnp.minimum(up, down), 0.0, 1.0)

    return at


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Adam behind an optional clip of the gradient's global norm."""
    adam = recipe.adam
    parts = [optax.clip_by_global_norm(adam.clip)] if adam.clip else []
    moments = optax.scale_by_adam(adam.b1, adam.b2, adam.eps)
    return optax.chain(*parts, moments, optax.scale_by_learning_rate(learning_rate(recipe.rate)))


def initial_state(key: Array, m: int, *, mean: Array, recipe: Recipe) -> TrainState:
    """A state before the first step; no two of its arrays share memory, so it may be donated."""
    params = sae.initial_params(key, m, mean=mean)
    average = jax.tree.map(jnp.copy, params) if recipe.ema else None
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros(m, jnp.int32)
    return TrainState(params, optimizer(recipe).init(params), zero, none, average)


def loss(
    params: SAEParams, z: Float[Array, "n d"], dead: Array | None, recipe: Recipe, k_aux: int
) -> tuple[Array, tuple[Codes, Array, Array]]:
    """Training loss of a batch: reconstruction plus aux times AuxK.

    Args:
        params: the weights.
        z: normalized rows.
        dead: bool [m], features that the AuxK loss revives; None where k_aux is 0.
        recipe: fixed numbers.
        k_aux: slots of AuxK codes, 0 for none.

    Returns:
        The loss, and (codes, reconstruction loss, AuxK loss).
    """
    codes, aux_codes = sae.encode(params, z, recipe.k, dead=dead, k_aux=k_aux)
    z_hat = sae.decode(codes, params.atoms, params.bias)
    main = losses.reconstruction_loss(z, z_hat, variance=recipe.variance)
    if aux_codes is None:
        return main, (codes, main, jnp.zeros(()))
    aux = losses.auxk_loss(z - z_hat, sae.decode(aux_codes, params.atoms, None))
    return main + recipe.aux * aux, (codes, main, aux)


def count_rows(since_fired: Int[Array, " m"], codes: Codes) -> Int[Array, " m"]:
    """Rows since each feature was last active, exact to the row.

    Args:
        since_fired: int32 [m] before the batch.
        codes: the batch, in order; n rows.

    Returns:
        int32 [m] after it: n - 1 - (last row where it fired), or n more than before (saturating).
    """
    n = codes.values.shape[0]
    place = jnp.arange(1, n + 1, dtype=jnp.int32)[:, None]
    last = jnp.zeros_like(since_fired)
    last = last.at[codes.indices].max(jnp.where(codes.values > 0, place, 0))
    waited = jnp.minimum(since_fired, jnp.iinfo(jnp.int32).max - n) + n
    return jnp.where(last > 0, n - last, waited)


@lru_cache(maxsize=16)
def make_update(
    recipe: Recipe,
) -> Callable[[TrainState, Array, Space], tuple[TrainState, Metrics]]:
    """Build the jitted step; the state it is given is donated.

    Args:
        recipe: fixed numbers.

    Returns:
        update(state, bits uint16 [n, d], space) -> (state, metrics). It compiles once.
    """
    tx = optimizer(recipe)

    def update(state: TrainState, bits: Array, space: Space) -> tuple[TrainState, Metrics]:
        z = normalize(space, bfloat16_rows(bits))
        dead = state.since_fired >= recipe.dead_rows
        slope = jax.grad(loss, has_aux=True)

        def plain(params: SAEParams) -> tuple:
            return slope(params, z, None, recipe, 0)

        def reviving(params: SAEParams) -> tuple:
            return slope(params, z, dead, recipe, recipe.k_aux)

        if recipe.k_aux and recipe.aux:
            gradient, out = jax.lax.cond(jnp.any(dead), reviving, plain, state.params)
        else:
            gradient, out = plain(state.params)
        codes, main, aux = out
        gradient = sae.remove_parallel(gradient, state.params)
        change, moments = tx.update(gradient, state.optimizer, state.params)
        params = sae.unit_norm(optax.apply_updates(state.params, change))  # pyright: ignore
        since_fired = count_rows(state.since_fired, codes)
        ema = state.ema
        if ema is not None:
            # Short memory at first, so that the random start is forgotten.
            decay = jnp.minimum(recipe.ema, (1.0 + state.step) / (10.0 + state.step))
            ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
        metrics = Metrics(
            main,
            aux,
            jnp.mean(jnp.sum(codes.values > 0, axis=1, dtype=jnp.float32)),
            jnp.mean(since_fired >= recipe.dead_rows, dtype=jnp.float32),
            optax.global_norm(gradient),
        )
        return TrainState(params, moments, state.step + 1, since_fired, ema), metrics

    return jax.jit(update, donate_argnums=0)
