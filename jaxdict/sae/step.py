"""One training step: what is learned or counted, and the pure function that moves it on."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxdict.codes import Codes
from jaxdict.rows import bfloat16_rows, normalize
from jaxdict.sae import kinds, losses, model
from jaxdict.sae.model import SAEParams
from jaxdict.sae.optimizer import optimizer, schedule
from jaxdict.sae.sharding import sharded
from jaxdict.sae.state import Batch, Metrics, TrainState
from jaxdict.sae.step_config import ALONE, Adam, Dials, How, Rate, Recipe

__all__ = ["Adam", "Batch", "Dials", "How", "Metrics", "Rate", "Recipe", "TrainState"]


def loss(
    params: SAEParams,
    z: Float[Array, "n d"],
    y: Float[Array, "n d_out"],
    dead: Array | None,
    recipe: Recipe,
    dials: Dials,
    k_aux: int,
) -> tuple[Array, tuple[kinds.Active, Array, Array]]:
    """Training loss of a batch: reconstruction, sparsity penalty and AuxK.

    Args:
        params: the weights.
        z: normalized rows.
        y: what they are to be rebuilt as: themselves, or a transcoder's target.
        dead: bool [m], features that the AuxK loss revives; None where k_aux is 0.
        recipe: fixed numbers.
        dials: further numbers.
        k_aux: slots of AuxK codes, 0 for none.

    Returns:
        The loss, and (what was active, reconstruction loss of all of it, AuxK loss).
    """
    kind = kinds.REGISTRY[recipe.kind]
    active = kind.active(params, z, recipe, dials, dead=dead, k_aux=k_aux)
    learned, y_hat = kind.error(params, active.codes, y, recipe, dials)
    main = losses.reconstruction_loss(y, y_hat, variance=dials.variance)
    learned = learned + active.penalty
    if active.aux_codes is None or dead is None:
        return learned, (active, main, jnp.zeros(()))
    how = recipe.how
    there = jnp.sum(dead, dtype=jnp.float32)
    if how.features is not None:
        there = jax.lax.psum(there, how.features)
    aux = losses.auxk_loss(
        y - y_hat,
        model.decode(active.aux_codes, params.atoms, None, how=how),
        form=recipe.aux_form,
        variance=dials.variance,
        share=jnp.minimum(there / k_aux, 1.0),
        over=how.data,
    )
    # In a sweep another member's dead features bring this one here too.
    aux = jnp.where(there > 0, aux, 0.0)
    return learned + dials.aux * aux, (active, main, aux)


def count_rows(since_fired: Int[Array, " m"], codes: Codes, how: How = ALONE) -> Int[Array, " m"]:
    """Rows since each feature was last active, exact to the row.

    Args:
        since_fired: int32 [m] before the batch.
        codes: the batch, in order; n rows. On a mesh this device's rows: the devices' follow each other.
        how: axes of the mesh.

    Returns:
        int32 [m] after it: n - 1 - (last row where it fired), or n more than before (saturating).
    """
    n, m = codes.values.shape[0], since_fired.shape[0]
    place, own = model.own_slots(how, codes.indices, m)
    order = jnp.arange(1, n + 1, dtype=jnp.int32)[:, None]
    if how.data is not None:
        order = order + jax.lax.axis_index(how.data) * n
        n = n * jax.lax.axis_size(how.data)
    fired = own & (codes.values > 0)
    last = jnp.zeros_like(since_fired).at[place].max(jnp.where(fired, order, 0), mode="drop")
    if how.data is not None:
        last = jax.lax.pmax(last, how.data)
    waited = jnp.minimum(since_fired, jnp.iinfo(jnp.int32).max - n) + n
    return jnp.where(last > 0, n - last, waited)


def _norm(gradient: SAEParams, how: How) -> Array:
    """Global norm of a gradient whose atoms may be split over devices."""
    split = jnp.sum(jnp.square(gradient.encoder)) + jnp.sum(jnp.square(gradient.atoms))
    split = split + jnp.sum(jnp.square(gradient.encoder_bias))
    if gradient.threshold is not None:
        split = split + jnp.sum(jnp.square(gradient.threshold))
    if how.features is not None:
        split = jax.lax.psum(split, how.features)
    whole = jnp.sum(jnp.square(gradient.bias))
    if gradient.out_bias is not None:
        whole = whole + jnp.sum(jnp.square(gradient.out_bias))
    return jnp.sqrt(split + whole)


def _step(
    state: TrainState, batch: Batch, dials: Dials, revive: Array, *, recipe: Recipe
) -> tuple[TrainState, Metrics]:
    """One step of one model; `revive` says whether any feature is dead, so that AuxK is worth its time."""
    how, rate, adam = recipe.how, recipe.rate, recipe.adam
    z = normalize(batch.space, bfloat16_rows(batch.bits))
    y = z
    if batch.target_bits is not None:
        assert batch.target_space is not None
        y = normalize(batch.target_space, bfloat16_rows(batch.target_bits))
    dead = state.since_fired >= recipe.dead_rows
    ramp = jnp.minimum((state.step + 1) / max(1, recipe.ramp), 1.0)
    now = dials._replace(sparsity=dials.sparsity * ramp)
    slope = jax.grad(loss, has_aux=True)

    def plain(params: SAEParams) -> tuple:
        return slope(params, z, y, None, recipe, now, 0)

    def reviving(params: SAEParams) -> tuple:
        gradient, (active, main, aux) = slope(params, z, y, dead, recipe, now, recipe.k_aux)
        return gradient, (active._replace(aux_codes=None), main, aux)

    if recipe.k_aux:
        gradient, out = jax.lax.cond(revive, reviving, plain, state.params)
    else:
        gradient, out = plain(state.params)
    active, main, aux = out
    penalty = active.penalty
    # Not from the last slot: XLA knows a top-k only as long as nothing slices its result again, and sorts
    # whole rows otherwise (191 ms a step instead of 21 at (n, d, m, k) = (1024, 128, 1024, 16)).
    taken = jnp.sum(active.codes.values > 0, axis=1, dtype=jnp.int32)
    full = jnp.mean(taken == active.codes.values.shape[1], dtype=jnp.float32)
    l0 = jnp.mean(taken, dtype=jnp.float32)
    if how.data is not None:
        gradient, main, penalty, aux, full, l0 = jax.lax.pmean(
            (gradient, main, penalty, aux, full, l0), how.data
        )
    gradient = model.remove_parallel(gradient, state.params)
    norm = _norm(gradient, how)
    if adam.clip:
        shrink = jnp.where(norm > adam.clip, adam.clip / norm, 1.0)
        gradient = jax.tree.map(lambda leaf: leaf * shrink, gradient)
    adam_step: Any = optimizer(recipe).update
    change, moments = adam_step(gradient, state.optimizer)
    lr = dials.lr * schedule(rate)(state.step)
    moved = jax.tree.map(lambda old, new: old - lr * new, state.params, change)
    params = model.unit_norm(moved)
    since_fired = count_rows(state.since_fired, active.codes, how)
    # Short memory at first, so that the random start is forgotten.
    young = (1.0 + state.step) / (10.0 + state.step)
    ema = state.ema
    if ema is not None:
        decay = jnp.minimum(recipe.ema, young)
        ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
    kept = jnp.minimum(0.999, jnp.where(state.step == 0, 0.0, young))
    threshold = state.threshold + (1 - kept) * (active.threshold - state.threshold)
    share = jnp.mean(since_fired >= recipe.dead_rows, dtype=jnp.float32)
    if how.features is not None:
        share = jax.lax.pmean(share, how.features)
    metrics = Metrics(main, penalty, aux, l0, full, share, norm)
    return TrainState(params, moments, state.step + 1, since_fired, ema, threshold), metrics


def _in_turn(
    one: Callable[..., tuple], state: TrainState, batch: Batch, dials: Dials, revive: Array
) -> tuple[TrainState, Metrics]:
    """Each of the stacked states moved on after the other.

    On two busy cores eight members took 140 to 210 ms in turn and 200 to 500 under vmap, where one takes 21
    to 28, at (n, d, m, k) = (1024, 128, 1024, 16): most of the difference is in the batched product.
    """
    return jax.lax.map(lambda both: one(both[0], batch, both[1], revive), (state, dials))


@lru_cache(maxsize=32)
def make_update(
    recipe: Recipe, *, members: int = 0, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch, Dials], tuple[TrainState, Metrics]]:
    """Build the jitted step; the state it is given is donated.

    Args:
        recipe: fixed numbers; with a mesh, `recipe.how` names its axes.
        members: how many states are stacked on a first axis, each with its own dials; 0 for one
            that is not stacked. All of them see the same rows.
        mesh: devices to split rows and atoms over.

    Returns:
        update(state, batch, dials) -> (state, metrics). It compiles once.
    """
    one: Any = partial(_step, recipe=recipe)
    if members and mesh is None and jax.default_backend() == "cpu":
        one = partial(_in_turn, one)
    elif members:
        one = jax.vmap(one, in_axes=(0, None, 0, None))
    if mesh is not None:
        one = sharded(one, mesh, members=members)

    def update(state: TrainState, batch: Batch, dials: Dials) -> tuple[TrainState, Metrics]:
        # Over all members at once: inside vmap both branches of the choice would be computed.
        revive = jnp.any(state.since_fired >= recipe.dead_rows)
        return one(state, batch, dials, revive)

    return jax.jit(update, donate_argnums=0)
