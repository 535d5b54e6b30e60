"""What both forms of gradient pursuit share: k slots of state a row, and the loop over steps.

Rows come in with unit norm, atoms too, so that every number here is of order one and one fixed
floor (rounding) decides what counts as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int


class Status(IntEnum):
    """Why a row stopped."""

    FULL = 0
    TOL = 1
    STATIONARY = 2
    ZERO_ROW = 3
    NOT_FINITE = 4


STATUS = {
    Status.FULL: "took all k steps; raise k for a smaller residual",
    Status.TOL: "residual norm at most tol times the row's norm",
    Status.STATIONARY: "no atom reduces the residual any further; more steps would not help",
    Status.ZERO_ROW: "the row is zero; its code is empty and exact",
    Status.NOT_FINITE: "the row holds NaN or infinity; its code is empty, clean the input",
}
RUNNING = -1
_BLOCK = 128


class Slots(NamedTuple):
    """One row's state: k slots. A slot with value 0 is empty and may be refilled."""

    indices: Int[Array, " k"]
    values: Float[Array, " k"]
    status: Int[Array, ""]
    steps: Int[Array, ""]


def floor(dtype: jnp.dtype) -> float:
    """Correlations below this (with a unit row) are rounding errors."""
    return 16 * float(jnp.finfo(dtype).eps)


def empty_slots(finite: Array, zero: Array, k: int, dtype: jnp.dtype) -> Slots:
    """The state before the first step."""
    status = jnp.where(finite, jnp.where(zero, Status.ZERO_ROW, RUNNING), Status.NOT_FINITE)
    return Slots(
        jnp.zeros(k, jnp.int32),
        jnp.zeros(k, dtype),
        status.astype(jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def join(
    slots: Slots, correlations: Float[Array, " m"], t: Int[Array, ""], signed: bool
) -> tuple[Slots, Float[Array, " k"]]:
    """Let the best atom into slot t and give the gradient on the support.

    The best atom has the largest inner product with the residual (in size, if signed). It takes
    slot t unless it is in the support already, or its inner product is no better than rounding.

    Args:
        slots: the row's state; slot t is empty, because each earlier step filled at most one.
        correlations: float [m], atoms @ residual.
        t: the step, 0 to k - 1 (the same for all rows).
        signed: whether negative coefficients are allowed.

    Returns:
        The state with the atom's index in slot t (its value still 0), and the gradient [k]: the
        correlations of the support, 0 elsewhere. A row that can go no further stops here.
    """
    score = jnp.abs(correlations) if signed else correlations
    best = argmax(score)
    active = slots.values != 0
    held = jnp.any(active & (slots.indices == best))
    small = floor(correlations.dtype)
    here = (jnp.arange(slots.indices.shape[0]) == t) & (score[best] > small) & ~held
    indices = jnp.where(here, best, slots.indices)
    gradient = jnp.where(active | here, correlations[indices], 0)
    running = slots.status == RUNNING
    stationary = running & (jnp.max(jnp.abs(gradient)) <= small)
    status = jnp.where(stationary, Status.STATIONARY, slots.status)
    gradient = jnp.where(status == RUNNING, gradient, 0)
    return slots._replace(indices=indices, status=status), gradient


def propose(
    slots: Slots, gradient: Float[Array, " k"], energy: Float[Array, ""], signed: bool
) -> Float[Array, " k"]:
    """Values after the exact step along the gradient, clipped at zero unless signed.

    a = <g, g> / ||sum_j g_j atom_j||^2 minimises ||r - a sum_j g_j atom_j||;
    values <- max(0, values + a g).

    Args:
        slots: the row's state.
        gradient: float [k], g.
        energy: ||sum_j g_j atom_j||^2.
        signed: whether negative coefficients are allowed.
    """
    values = slots.values + quotient(jnp.dot(gradient, gradient), energy) * gradient
    return values if signed else jnp.maximum(values, 0)


def shorten(along: Float[Array, ""], energy: Float[Array, ""]) -> Float[Array, ""]:
    """Share of the proposed change to take so that the residual never grows.

    The residual's squared norm changes by s^2 energy - 2 s along for a share s. The whole change
    is taken (as in the paper) unless clipping made it grow; then the best share, in [0, 1), is.

    Args:
        along: <r, change of the reconstruction>.
        energy: ||change of the reconstruction||^2.
    """
    return jnp.where(energy <= 2 * along, 1, jnp.clip(quotient(along, energy), 0, 1))


def finish(
    slots: Slots,
    values: Float[Array, " k"],
    decrease: Float[Array, ""],
    residual: Array,
    tol: Array | float,
) -> Slots:
    """Take the step: new values, one more step counted, tol looked at.

    Args:
        slots: the row's state.
        values: float [k] after the step.
        decrease: how much the squared residual norm fell.
        residual: the residual norm after the step, of a unit row.
        tol: stop at this residual norm, if above 0.
    """
    running = slots.status == RUNNING
    stuck = running & ~(decrease > 0)
    status = jnp.where(running & (tol > 0) & (residual <= tol), Status.TOL, slots.status)
    status = jnp.where(stuck, Status.STATIONARY, status)
    values = jnp.where(running & ~stuck, values, slots.values)
    return Slots(slots.indices, values, status, slots.steps + (running & ~stuck))


def run(
    step: Callable[..., tuple], k: int, slots: Slots, *state: Array, given: Float[Array, "n w"]
) -> Slots:
    """Move all rows on, up to k steps; stops early when no row is running.

    Args:
        step: (t, given, slots, *state) -> (slots, *state) of one row.
        k: steps.
        slots: states before the first step, batched over n.
        state: what else a step needs of the steps before it, batched over n.
        given: what stays the same from step to step.
    """
    axes = (None, *[0] * (2 + len(state)))

    def body(carry: tuple) -> tuple:
        t, *moving = carry
        return t + 1, *jax.vmap(step, in_axes=axes)(t, given, *moving)

    def going(carry: tuple) -> Array:
        t, slots, *_ = carry
        return (t < k) & jnp.any(slots.status == RUNNING)

    return lax.while_loop(going, body, (jnp.zeros((), jnp.int32), slots, *state))[1]


def argmax(score: Float[Array, " m"]) -> Int[Array, ""]:
    """jnp.argmax in two levels: six times faster on a CPU, where XLA's own is one scalar loop.

    The largest of each block of 128 is a vectorized reduction; only one block is searched.
    """
    spare = -score.shape[0] % _BLOCK
    blocks = jnp.pad(score, (0, spare), constant_values=-jnp.inf).reshape(-1, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=1)).astype(jnp.int32)
    inside = blocks.at[block].get(mode="promise_in_bounds")
    return block * _BLOCK + jnp.argmax(inside).astype(jnp.int32)


def quotient(a: Array, b: Array) -> Array:
    """a / b, or 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
