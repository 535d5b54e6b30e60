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
from jaxdict.sae.step_config import (
    SINGLE_DEVICE,
    Execution,
    Hyperparams,
    StepConfig,
)


def loss(
    params: SAEParams,
    z: Float[Array, "n d"],
    y: Float[Array, "n d_out"],
    dead: Array | None,
    step_config: StepConfig,
    hyperparams: Hyperparams,
    k_aux: int,
) -> tuple[Array, tuple[kinds.Active, Array, Array]]:
    """Training loss of a batch: reconstruction, sparsity penalty and AuxK.

    Args:
        params: the weights.
        z: normalized rows.
        y: what they are to be rebuilt as: themselves, or a transcoder's target.
        dead: bool [m], features that the AuxK loss revives; None where k_aux is 0.
        step_config: fixed numbers.
        hyperparams: further numbers.
        k_aux: slots of AuxK codes, 0 for none.

    Returns:
        The loss, and (what was active, reconstruction loss of all of it, AuxK loss).
    """
    kind = kinds.REGISTRY[step_config.kind]
    active = kind.active(params, z, step_config, hyperparams, dead=dead, k_aux=k_aux)
    learned, y_hat = kind.error(params, active.codes, y, step_config, hyperparams)
    main = losses.reconstruction_loss(y, y_hat, variance=hyperparams.variance)
    learned = learned + active.penalty
    if active.aux_codes is None or dead is None:
        return learned, (active, main, jnp.zeros(()))
    execution = step_config.execution
    there = jnp.sum(dead, dtype=jnp.float32)
    if execution.features is not None:
        there = jax.lax.psum(there, execution.features)
    aux = losses.auxk_loss(
        y - y_hat,
        model.decode(active.aux_codes, params.atoms, None, execution=execution),
        form=step_config.aux_form,
        variance=hyperparams.variance,
        share=jnp.minimum(there / k_aux, 1.0),
        over=execution.data,
    )
    # In a sweep another member's dead features bring this one here too.
    aux = jnp.where(there > 0, aux, 0.0)
    return learned + hyperparams.aux * aux, (active, main, aux)


def count_rows(
    since_fired: Int[Array, " m"], codes: Codes, execution: Execution = SINGLE_DEVICE
) -> Int[Array, " m"]:
    """Rows since each feature was last active, exact to the row.

    Args:
        since_fired: int32 [m] before the batch.
        codes: the batch, in order; n rows. On a mesh this device's rows: the devices' follow each other.
        execution: axes of the mesh.

    Returns:
        int32 [m] after it: n - 1 - (last row where it fired), or n more than before (saturating).
    """
    n, m = codes.values.shape[0], since_fired.shape[0]
    place, own = model.own_slots(execution, codes.indices, m)
    order = jnp.arange(1, n + 1, dtype=jnp.int32)[:, None]
    if execution.data is not None:
        order = order + jax.lax.axis_index(execution.data) * n
        n = n * jax.lax.axis_size(execution.data)
    fired = own & (codes.values > 0)
    last = jnp.zeros_like(since_fired).at[place].max(jnp.where(fired, order, 0), mode="drop")
    if execution.data is not None:
        last = jax.lax.pmax(last, execution.data)
    waited = jnp.minimum(since_fired, jnp.iinfo(jnp.int32).max - n) + n
    return jnp.where(last > 0, n - last, waited)


def _norm(gradient: SAEParams, execution: Execution) -> Array:
    """Global norm of a gradient whose atoms may be split over devices."""
    split = jnp.sum(jnp.square(gradient.encoder)) + jnp.sum(jnp.square(gradient.atoms))
    split = split + jnp.sum(jnp.square(gradient.encoder_bias))
    if gradient.threshold is not None:
        split = split + jnp.sum(jnp.square(gradient.threshold))
    if execution.features is not None:
        split = jax.lax.psum(split, execution.features)
    whole = jnp.sum(jnp.square(gradient.bias))
    if gradient.out_bias is not None:
        whole = whole + jnp.sum(jnp.square(gradient.out_bias))
    return jnp.sqrt(split + whole)


def _step(
    state: TrainState,
    batch: Batch,
    hyperparams: Hyperparams,
    revive: Array,
    *,
    step_config: StepConfig,
) -> tuple[TrainState, Metrics]:
    """One step of one model; `revive` says whether any feature is dead, so that AuxK is worth its time."""
    execution, rate, adam = step_config.execution, step_config.rate, step_config.adam
    z = normalize(batch.normalizer, bfloat16_rows(batch.bits))
    y = z
    if batch.target_bits is not None:
        assert batch.target_normalizer is not None
        y = normalize(batch.target_normalizer, bfloat16_rows(batch.target_bits))
    dead = state.since_fired >= step_config.dead_rows
    ramp = jnp.minimum((state.step + 1) / max(1, step_config.ramp), 1.0)
    now = hyperparams._replace(sparsity=hyperparams.sparsity * ramp)
    slope = jax.grad(loss, has_aux=True)

    def plain(params: SAEParams) -> tuple:
        return slope(params, z, y, None, step_config, now, 0)

    def reviving(params: SAEParams) -> tuple:
        gradient, (active, main, aux) = slope(
            params, z, y, dead, step_config, now, step_config.k_aux
        )
        return gradient, (active._replace(aux_codes=None), main, aux)

    if step_config.k_aux:
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
    if execution.data is not None:
        gradient, main, penalty, aux, full, l0 = jax.lax.pmean(
            (gradient, main, penalty, aux, full, l0), execution.data
        )
    gradient = model.remove_parallel(gradient, state.params)
    norm = _norm(gradient, execution)
    if adam.clip:
        shrink = jnp.where(norm > adam.clip, adam.clip / norm, 1.0)
        gradient = jax.tree.map(lambda leaf: leaf * shrink, gradient)
    adam_step: Any = optimizer(step_config).update
    change, moments = adam_step(gradient, state.optimizer)
    lr = hyperparams.lr * schedule(rate)(state.step)
    moved = jax.tree.map(lambda old, new: old - lr * new, state.params, change)
    params = model.unit_norm(moved)
    since_fired = count_rows(state.since_fired, active.codes, execution)
    # Short memory at first, so that the random start is forgotten.
    young = (1.0 + state.step) / (10.0 + state.step)
    ema = state.ema
    if ema is not None:
        decay = jnp.minimum(step_config.ema, young)
        ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
    kept = jnp.minimum(0.999, jnp.where(state.step == 0, 0.0, young))
    threshold = state.threshold + (1 - kept) * (active.threshold - state.threshold)
    share = jnp.mean(since_fired >= step_config.dead_rows, dtype=jnp.float32)
    if execution.features is not None:
        share = jax.lax.pmean(share, execution.features)
    metrics = Metrics(main, penalty, aux, l0, full, share, norm)
    return TrainState(params, moments, state.step + 1, since_fired, ema, threshold), metrics


def _in_turn(
    one: Callable[..., tuple],
    state: TrainState,
    batch: Batch,
    hyperparams: Hyperparams,
    revive: Array,
) -> tuple[TrainState, Metrics]:
    """Each of the stacked states moved on after the other.

    On two busy cores eight members took 140 to 210 ms in turn and 200 to 500 under vmap, where one takes 21
    to 28, at (n, d, m, k) = (1024, 128, 1024, 16): most of the difference is in the batched product.
    """
    return jax.lax.map(lambda both: one(both[0], batch, both[1], revive), (state, hyperparams))


@lru_cache(maxsize=32)
def make_update(
    step_config: StepConfig, *, members: int = 0, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch, Hyperparams], tuple[TrainState, Metrics]]:
    """Build the jitted step; the state it is given is donated.

    Args:
        step_config: fixed numbers; with a mesh, `step_config.execution` names its axes.
        members: how many states are stacked on a first axis, each with its own hyperparams; 0 for one
            that is not stacked. All of them see the same rows.
        mesh: devices to split rows and atoms over.

    Returns:
        update(state, batch, hyperparams) -> (state, metrics). It compiles once.
    """
    one: Any = partial(_step, step_config=step_config)
    if members and mesh is None and jax.default_backend() == "cpu":
        one = partial(_in_turn, one)
    elif members:
        one = jax.vmap(one, in_axes=(0, None, 0, None))
    if mesh is not None:
        one = sharded(one, mesh, members=members)

    def update(
        state: TrainState, batch: Batch, hyperparams: Hyperparams
    ) -> tuple[TrainState, Metrics]:
        # Over all members at once: inside vmap both branches of the choice would be computed.
        revive = jnp.any(state.since_fired >= step_config.dead_rows)
        return one(state, batch, hyperparams, revive)

    return jax.jit(update, donate_argnums=0)
