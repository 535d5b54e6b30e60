"""Reads of atoms that may be split over devices; every device gets the same result.

`axis` names the mesh axis along which the atoms are split in order, None for atoms on one device.
Each device reads its own; what travels is a score and an index, k numbers, or one row [d].
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxdict.codes import argmax, combine
from jaxdict.devices import FULL_PRECISION, own_indices


def largest(score: Float[Array, " m"], axis: str | None) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """Index and size of the largest score; the lowest index wins a tie.

    Args:
        score: float [m], of this device's atoms.
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
    """numbers[indices]; each device has the numbers of its own atoms."""
    local, own = own_indices(indices, numbers.shape[0], axis, elsewhere=0)
    found = numbers.at[local].get(mode="promise_in_bounds")
    return found if axis is None else lax.psum(jnp.where(own, found, 0), axis)


def mixture(
    weights: Float[Array, " k"],
    indices: Int[Array, " k"],
    unit: Float[Array, "m d"],
    *,
    slots: int | Int[Array, ""] | None = None,
    axis: str | None,
) -> Float[Array, " d"]:
    """sum_j weights_j unit[indices_j] over the first `slots` slots, or all of them."""
    local, own = own_indices(indices, unit.shape[0], axis, elsewhere=0)
    if axis is None:
        return combine(weights, local, unit, slots)
    return lax.psum(combine(jnp.where(own, weights, 0), local, unit, slots), axis)


def products(
    row: Float[Array, " d"],
    indices: Int[Array, " k"],
    unit: Float[Array, "m d"],
    *,
    slots: int | Int[Array, ""],
    axis: str | None,
) -> Float[Array, " k"]:
    """<row, unit[indices_j]> for the first `slots` slots, 0 for the others."""
    local, own = own_indices(indices, unit.shape[0], axis, elsewhere=0)

    def one(j: Array, found: Array) -> Array:
        atom = unit.at[local[j]].get(mode="promise_in_bounds")
        return found.at[j].set(jnp.dot(atom, row, precision=FULL_PRECISION))

    found = lax.fori_loop(0, slots, one, jnp.zeros(indices.shape, row.dtype))
    return found if axis is None else lax.psum(jnp.where(own, found, 0), axis)
