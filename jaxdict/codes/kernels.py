"""Sums and products over the few rows of a table that codes point to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdict.codes import codes
from jaxdict.codes.codes import Codes


def gather_rows(weights: Array, indices: Array, table: Array) -> Array:
    """sum_j weights_j table[indices_j] for each row, [n, d]; an index of m or more must have weight 0."""
    return codes.decode(Codes(jnp.minimum(indices, table.shape[0] - 1), weights), table)


def inner_products(
    indices: Int[Array, "n k"], rows: Float[Array, "n d"], table: Float[Array, "m d"]
) -> Float[Array, "n k"]:
    """<rows[i], table[indices[i, j]]>, for indices below m.

    On a CPU eight rows at a time, whose atoms stay in the cache; elsewhere slot by slot, because n / 8 small
    steps would be slow.
    """

    def of_row(slot: tuple) -> Array:
        index, row = slot
        return table.at[index].get(mode="promise_in_bounds") @ row

    def of_slot(index: Array) -> Array:
        return jnp.sum(rows * table.at[index].get(mode="promise_in_bounds"), axis=1)

    if jax.default_backend() == "cpu":
        return jax.lax.map(of_row, (indices, rows), batch_size=8)
    return jax.lax.map(of_slot, indices.T).T


def scatter_rows(
    indices: Int[Array, "n k"], weights: Float[Array, "n k"], rows: Float[Array, "n d"], m: int
) -> Float[Array, "m d"]:
    """out[indices[i, j]] += weights[i, j] rows[i]; the indices of a row are all different.

    An index of m or more is left out. On a CPU row by row, each a scatter of k rows, which was the fastest of the
    forms that were tried; elsewhere slot by slot, because n small steps would be slow.
    """
    zero = jnp.zeros((m, rows.shape[1]), rows.dtype)

    def by_row(total: Array, slot: tuple) -> tuple[Array, None]:
        i, w, row = slot
        return total.at[i].add(w[:, None] * row[None, :], unique_indices=True, mode="drop"), None

    def by_slot(total: Array, slot: tuple) -> tuple[Array, None]:
        i, w = slot
        return total.at[i].add(w[:, None] * rows, mode="drop"), None

    if jax.default_backend() == "cpu":
        return jax.lax.scan(by_row, zero, (indices, weights, rows))[0]
    return jax.lax.scan(by_slot, zero, (indices.T, weights.T))[0]
