"""What all pursuits share, in both forms: k slots of state a row, and the loop over steps.

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


class Slots(NamedTuple):
    """One row's state: k slots. A slot with value 0 is empty and may be refilled."""

    indices: Int[Array, " k"]
    values: Float[Array, " k"]
    status: Int[Array, ""]
    steps: Int[Array, ""]


class Support(NamedTuple):
    """What a rule may ask about the atoms of a row's support; only what is called is computed.

    Attributes:
        t: the slot of the atom that was selected last.
        energy: weights [k] -> ||sum_j weights_j atom_j||^2.
        products: () -> float [k], inner products of slot t's atom with those of slots 0 to t.
    """

    t: Int[Array, ""]
    energy: Callable[[Array], Array]
    products: Callable[[], Array]


class Rule(NamedTuple):
    """How values move once an atom has joined, in which the pursuits differ.

    Attributes:
        propose: (slots, gradient [k], memory, support, *, signed) -> (values [k], memory). The
            atom of slot t has just joined if gradient[t] is not 0; the new values are at least 0
            unless signed, and leave a smaller residual.
        remembers: whether its memory is float [k, k], zeros at first, rather than empty.
        single: whether at most one value moves a step.
    """

    propose: Callable[..., tuple[Array, Array]]
    remembers: bool = False
    single: bool = False

    def memory(self, k: int, dtype: jnp.dtype) -> Float[Array, "k k"]:
        """A row's memory before the first step."""
        return jnp.zeros((k, k) if self.remembers else (0, 0), dtype)


class Options(NamedTuple):
    """How a pursuit runs, in either form.

    Attributes:
        rule: how values move.
        signed: whether negative coefficients are allowed.
        tol: a row stops when its residual norm is at most this.
        axis: mesh axis along which the atoms are split, if they are.
    """

    rule: Rule
    signed: bool
    tol: Array | float
    axis: str | None


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


def moved(slots: Slots, values: Float[Array, " k"]) -> tuple[Float[Array, 1], Int[Array, 1]]:
    """The change of the one value that moves, and its index, as a single slot."""
    change = values - slots.values
    slot = jnp.argmax(jnp.abs(change))
    return change[slot][None], slots.indices[slot][None]


def repeat(state: Array, n: int) -> Array:
    """The same state for each of n rows."""
    return jnp.broadcast_to(state, (n, *state.shape))


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


def quotient(a: Array, b: Array) -> Array:
    """a / b, or 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1), 0)
