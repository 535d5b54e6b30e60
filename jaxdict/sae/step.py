"""One training step, a pure function of the state and a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from jaxdict.codes import Codes
from jaxdict.sae import kinds, losses, model
from jaxdict.sae.model import SAEParams
from jaxdict.sae.optimizer import learning_rate_schedule, optimizer
from jaxdict.sae.protocol import Active
from jaxdict.sae.sharding import sharded
from jaxdict.sae.state import Batch, Metrics, NormalizedRows, TrainState
from jaxdict.sae.step_config import (
    SINGLE_DEVICE,
    Execution,
    Hyperparams,
    StepConfig,
)


class LossParts(NamedTuple):
    """What a training loss was made of.

    Attributes:
        active: what was active in the batch.
        reconstruction: reconstruction loss of all active atoms.
        aux: AuxK loss, 0 if no feature is dead.
    """

    active: Active
    reconstruction: Array
    aux: Array


def loss(
    params: SAEParams,
    rows: NormalizedRows,
    step_config: StepConfig,
    hyperparams: Hyperparams,
    *,
    dead: Bool[Array, " m"] | None = None,
) -> tuple[Array, LossParts]:
    """Training loss of a batch: reconstruction, sparsity penalty and AuxK.

    Args:
        params: the weights.
        rows: of the batch.
        step_config: fixed numbers.
        hyperparams: further numbers.
        dead: bool [m], features that learn through the AuxK loss; None for no such loss.

    Returns:
        the loss and its parts.
    """
    kind = kinds.REGISTRY[step_config.kind]
    active = kind.active(params, rows.inputs, step_config, hyperparams, dead=dead)
    learned, y_hat = kind.error(params, active.codes, rows.targets, step_config, hyperparams)
    main = losses.reconstruction_loss(rows.targets, y_hat, variance=hyperparams.variance)
    learned = learned + active.penalty
    if active.aux_codes is None or dead is None:
        return learned, LossParts(active, main, jnp.zeros((), jnp.float32))
    execution = step_config.execution
    dead_count = jnp.sum(dead, dtype=jnp.float32)
    if execution.features is not None:
        dead_count = jax.lax.psum(dead_count, execution.features)
    aux = losses.auxk_loss(
        rows.targets - y_hat,
        model.decode(active.aux_codes, params.atoms, None, execution=execution),
        form=step_config.aux_form,
        variance=hyperparams.variance,
        share=jnp.minimum(dead_count / step_config.k_aux, 1.0),
        axis_name=execution.data,
    )
    # In a sweep the dead features of another member may have brought this one here.
    aux = jnp.where(dead_count > 0, aux, 0.0)
    return learned + hyperparams.aux * aux, LossParts(active, main, aux)


def count_rows(
    since_fired: Int[Array, " m"], codes: Codes, execution: Execution = SINGLE_DEVICE
) -> Int[Array, " m"]:
    """Rows since each feature was last active, exact to the row.

    Args:
        since_fired: int32 [m] before the batch.
        codes: of the n rows of the batch, in order; on a mesh of this device's rows, which follow those of the
            device before.
        execution: axes of the mesh.

    Returns:
        int32 [m] after the batch: n - 1 - (last row where the feature fired), or n more than before (saturating).
    """
    n, m = codes.values.shape[0], since_fired.shape[0]
    local, own = model.own_slots(execution, codes.indices, m)
    order = jnp.arange(1, n + 1, dtype=jnp.int32)[:, None]
    if execution.data is not None:
        order = order + jax.lax.axis_index(execution.data) * n
        n = n * jax.lax.axis_size(execution.data)
    fired = own & (codes.values > 0)
    last = jnp.zeros_like(since_fired).at[local].max(jnp.where(fired, order, 0), mode="drop")
    if execution.data is not None:
        last = jax.lax.pmax(last, execution.data)
    silent = jnp.minimum(since_fired, jnp.iinfo(jnp.int32).max - n) + n
    return jnp.where(last > 0, n - last, silent)


def _global_norm(gradient: SAEParams, execution: Execution) -> Array:
    """Global norm of a gradient, whose atoms may be split over devices."""
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


def _train_step(
    state: TrainState,
    batch: Batch,
    hyperparams: Hyperparams,
    any_dead: Array,
    *,
    step_config: StepConfig,
) -> tuple[TrainState, Metrics]:
    """One step of one model; AuxK, which takes its time, is computed only if `any_dead`."""
    execution, adam = step_config.execution, step_config.adam
    rows = batch.normalized()
    dead = state.since_fired >= step_config.dead_rows
    taken_steps = state.step.astype(jnp.float32)
    ramp = jnp.minimum((taken_steps + 1) / max(1, step_config.ramp), 1.0)
    ramped = hyperparams._replace(sparsity=hyperparams.sparsity * ramp)
    gradient_of = jax.grad(loss, has_aux=True)

    def without_aux(params: SAEParams) -> tuple:
        return gradient_of(params, rows, step_config, ramped)

    def with_aux(params: SAEParams) -> tuple:
        gradient, parts = gradient_of(params, rows, step_config, ramped, dead=dead)
        # Both branches must return the same tree.
        return gradient, parts._replace(active=parts.active._replace(aux_codes=None))

    if step_config.k_aux:
        gradient, parts = jax.lax.cond(any_dead, with_aux, without_aux, state.params)
    else:
        gradient, parts = without_aux(state.params)
    codes, main, penalty, aux = (
        parts.active.codes,
        parts.reconstruction,
        parts.active.penalty,
        parts.aux,
    )
    # Not from the last slot: XLA recognizes a top-k only if nothing slices its result again, and sorts whole rows
    # otherwise.
    taken = jnp.sum(codes.values > 0, axis=1, dtype=jnp.int32)
    full = jnp.mean(taken == codes.values.shape[1], dtype=jnp.float32)
    l0 = jnp.mean(taken, dtype=jnp.float32)
    if execution.data is not None:
        gradient, main, penalty, aux, full, l0 = jax.lax.pmean(
            (gradient, main, penalty, aux, full, l0), execution.data
        )
    gradient = model.remove_parallel(gradient, state.params)
    norm = _global_norm(gradient, execution)
    if adam.clip:
        shrink = jnp.where(norm > adam.clip, adam.clip / norm, 1.0)
        gradient = jax.tree.map(lambda leaf: leaf * shrink, gradient)
    transform: Any = optimizer(step_config).update
    with jax.enable_x64(False):  # Optax takes powers of whole numbers, which would be of 64 bits
        change, optimizer_state = transform(gradient, state.optimizer)
    lr = hyperparams.lr * learning_rate_schedule(step_config.schedule)(taken_steps)
    moved = jax.tree.map(lambda old, new: old - lr * new, state.params, change)
    params = model.unit_norm(moved)
    since_fired = count_rows(state.since_fired, codes, execution)
    # Averages have a short memory at first, so that they forget the random start.
    young = (1.0 + taken_steps) / (10.0 + taken_steps)
    ema = state.ema
    if ema is not None:
        decay = jnp.minimum(step_config.ema, young)
        ema = jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)
    kept = jnp.minimum(0.999, jnp.where(state.step == 0, 0.0, young))
    threshold = state.threshold + (1 - kept) * (parts.active.threshold - state.threshold)
    dead_share = jnp.mean(since_fired >= step_config.dead_rows, dtype=jnp.float32)
    if execution.features is not None:
        dead_share = jax.lax.pmean(dead_share, execution.features)
    metrics = Metrics(main, penalty, aux, l0, full, dead_share, norm)
    after = TrainState(params, optimizer_state, state.step + 1, since_fired, ema, threshold)
    return after, metrics


def _one_after_another(
    one: Callable[..., tuple],
    state: TrainState,
    batch: Batch,
    hyperparams: Hyperparams,
    any_dead: Array,
) -> tuple[TrainState, Metrics]:
    """A step of each of the stacked states in turn; on a CPU `jax.vmap` is slower, by its batched products."""
    return jax.lax.map(lambda both: one(both[0], batch, both[1], any_dead), (state, hyperparams))


@lru_cache(maxsize=32)
def make_train_step(
    step_config: StepConfig, *, members: int = 0, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch, Hyperparams], tuple[TrainState, Metrics]]:
    """Build the jitted training step; it donates the state that it is given.

    Args:
        step_config: fixed numbers; with a mesh, `step_config.execution` names its axes.
        members: how many states are stacked on a first axis, each with hyperparams of its own; 0 for one
            that is not stacked. All of them see the same rows.
        mesh: devices to split rows and atoms over.

    Returns:
        train_step(state, batch, hyperparams) -> (state, metrics). It compiles once.
    """
    one: Any = partial(_train_step, step_config=step_config)
    if members and mesh is None and jax.default_backend() == "cpu":
        one = partial(_one_after_another, one)
    elif members:
        one = jax.vmap(one, in_axes=(0, None, 0, None))
    if mesh is not None:
        one = sharded(one, mesh, members=members)

    def train_step(
        state: TrainState, batch: Batch, hyperparams: Hyperparams
    ) -> tuple[TrainState, Metrics]:
        # Over all members at once: under vmap both branches of the choice would be computed.
        any_dead = jnp.any(state.since_fired >= step_config.dead_rows)
        return one(state, batch, hyperparams, any_dead)

    return jax.jit(train_step, donate_argnums=0)
