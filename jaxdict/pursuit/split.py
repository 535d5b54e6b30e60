"""The reads of the atoms that a step needs, alike whether one device holds all of them or many a part.

`axis` names the mesh axis along which the atoms are split in order, None for atoms in one place.
Each device looks at its own; what travels is a score and an index, k numbers, or one row [d].
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdict.codes import argmax, combine
from jaxdict.devices import FULL_PRECISION
from jaxdict.pursuit.step import RUNNING, Slots, Status, floor


def largest(score: Float[Array, " m"], axis: str | None) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Index and size of the largest score; the lowest index wins a tie.

    Args:
        score: of the atoms of this device.
        axis: see above.
    """
    best = argmax(score)
    value = score[best]
    if axis is None:
        return best, value
    values = lax.all_gather(value, axis)
    indices = lax.all_gather(best + lax.axis_index(axis) * score.shape[0], axis)
    winner = jnp.argmax(values)
    return indices[winner].astype(jnp.int32), values[winner]


def at(
    numbers: Float[Array, " m"], indices: Int[Array, " k"], axis: str | None
) -> Float[Array, " k"]:
    """numbers[indices], where numbers has one entry for each atom of this device."""
    local, here = _local(indices, numbers.shape[0], axis)
    found = numbers.at[local].get(mode="promise_in_bounds")
    return found if axis is None else lax.psum(jnp.where(here, found, 0), axis)


def mixture(
    weights: Float[Array, " k"],
    indices: Int[Array, " k"],
    unit: Float[Array, "m d"],
    slots: int | Int[Array, ""] | None,
    axis: str | None,
) -> Float[Array, " d"]:
    """sum_j weights_j unit[indices_j] over the first `slots` slots."""
    local, here = _local(indices, unit.shape[0], axis)
    if axis is None:
        return combine(weights, local, unit, slots)
    return lax.psum(combine(jnp.where(here, weights, 0), local, unit, slots), axis)


def products(
    row: Float[Array, " d"],
    indices: Int[Array, " k"],
    unit: Float[Array, "m d"],
    slots: int | Int[Array, ""],
    axis: str | None,
) -> Float[Array, " k"]:
    """<row, unit[indices_j]> for the first `slots` slots, 0 for the others."""
    local, here = _local(indices, unit.shape[0], axis)

    def one(j: Array, found: Array) -> Array:
        atom = unit.at[local[j]].get(mode="promise_in_bounds")
        return found.at[j].set(jnp.dot(atom, row, precision=FULL_PRECISION))

    found = lax.fori_loop(0, slots, one, jnp.zeros(indices.shape, row.dtype))
    return found if axis is None else lax.psum(jnp.where(here, found, 0), axis)


def _local(
    indices: Int[Array, " k"], size: int, axis: str | None
) -> tuple[Int[Array, " k"], Bool[Array, " k"] | bool]:
    """Indices among the atoms of this device (0 for those of others), and whether they are its."""
    if axis is None:
        return indices, True
    local = indices - lax.axis_index(axis) * size
    here = (local >= 0) & (local < size)
    return jnp.where(here, local, 0), here


def join(
    slots: Slots,
    correlations: Float[Array, " m"],
    t: Int[Array, ""],
    signed: bool,
    axis: str | None = None,
) -> tuple[Slots, Float[Array, " k"]]:
    """Let the best atom into slot t and give the gradient on the support.

    The best atom has the largest inner product with the residual (in size, if signed). It takes
    slot t unless it is in the support already, or its inner product is no better than rounding.

    Args:
        slots: the row's state; slot t is empty, because each earlier step filled at most one.
        correlations: float [m], atoms @ residual, for the atoms of this device.
        t: the step, 0 to k - 1 (the same for all rows).
        signed: whether negative coefficients are allowed.
        axis: mesh axis along which the atoms are split, if they are.

    Returns:
        The state with the atom's index in slot t (its value still 0), and the gradient [k]: the
        correlations of the support, 0 elsewhere. A row that can go no further stops here.
    """
    best, score = largest(jnp.abs(correlations) if signed else correlations, axis)
    active = slots.values != 0
    held = jnp.any(active & (slots.indices == best))
    small = floor(correlations.dtype)
    here = (jnp.arange(slots.indices.shape[0]) == t) & (score > small) & ~held
    indices = jnp.where(here, best, slots.indices)
    gradient = jnp.where(active | here, at(correlations, indices, axis), 0)
    running = slots.status == RUNNING
    stationary = running & (jnp.max(jnp.abs(gradient)) <= small)
    status = jnp.where(stationary, Status.STATIONARY, slots.status)
    gradient = jnp.where(status == RUNNING, gradient, 0)
    return slots._replace(indices=indices, status=status), gradient
