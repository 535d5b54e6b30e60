"""Sparse codes: k slots a row instead of a dense [n, m] matrix, and their decoding."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

# Slots decoded in one fused pass over the output: fewer passes over it, same memory.
_SLOTS_PER_PASS = 8


class Codes(NamedTuple):
    """The active atoms of n rows.

    Attributes:
        indices: int32 [n, k], which atom each slot holds; 0 in an empty slot.
        values: float [n, k], its coefficient; 0 in an empty slot. Slots are sorted by |value|,
            largest first, so empty slots come last.
    """

    indices: Int[Array, "n k"]
    values: Float[Array, "n k"]

    @property
    def n(self) -> int:
        """Number of rows."""
        return int(self.indices.shape[0])

    @property
    def k(self) -> int:
        """Slots a row."""
        return int(self.indices.shape[1])

    @property
    def l0(self) -> Int[Array, " n"]:
        """Active atoms of each row."""
        return jnp.sum(self.values != 0, axis=1, dtype=jnp.int32)

    def dense(self, m: int) -> Float[Array, "n m"]:
        """The codes as a dense [n, m] matrix, for small m only: it is mostly zeros.

        Args:
            m: number of atoms; every index is below it.

        Returns:
            float [n, m], e with e[i, indices[i, j]] = values[i, j].
        """
        rows = jnp.arange(self.n)[:, None]
        return jnp.zeros((self.n, m), self.values.dtype).at[rows, self.indices].add(self.values)


def sort_slots(indices: Int[Array, "n k"], values: Float[Array, "n k"]) -> Codes:
    """Sort the slots of each row by |value|, largest first, empty slots (0, 0.0) last.

    Args:
        indices: int [n, k], any order.
        values: float [n, k]; a slot with value 0 is empty, whatever its index.

    Returns:
        The same codes, sorted; equal |values| keep their order.
    """
    operands = (-jnp.abs(values), indices, values)
    _, indices, values = lax.sort(operands, dimension=1, is_stable=True, num_keys=1)
    return Codes(jnp.where(values != 0, indices, 0).astype(jnp.int32), values)


def combine(
    weights: Float[Array, " k"],
    indices: Int[Array, " k"],
    table: Float[Array, "m w"],
    slots: int | Int[Array, ""] | None = None,
) -> Float[Array, " w"]:
    """Weighted sum of a few rows of a table, sum_j weights_j table[indices_j].

    Written for one row of codes, to be vmapped: n rows need [n, w] of memory, never [n, k, w].

    Args:
        weights: float [k].
        indices: int [k], each below m.
        table: float [m, w].
        slots: how many of the first slots to add (may be traced); the others must be 0. All by default.

    Returns:
        float [w].
    """
    table = jnp.asarray(table)
    k = weights.shape[0]
    group = min(_SLOTS_PER_PASS, k)
    spare = -k % group
    weights = jnp.pad(weights, (0, spare)).reshape(-1, group)
    indices = jnp.pad(indices, (0, spare)).reshape(-1, group)
    groups = weights.shape[0] if slots is None else (slots + group - 1) // group

    def add(i: Array, total: Array) -> Array:
        for j in range(group):
            row = table.at[indices[i, j]].get(mode="promise_in_bounds")
            total = total + weights[i, j] * row.astype(total.dtype)
        return total

    zero = jnp.zeros(table.shape[1], jnp.promote_types(weights.dtype, table.dtype))
    return lax.fori_loop(0, groups, add, zero)


@jax.jit
def decode(
    codes: Codes, atoms: Float[Array, "m d"], bias: Float[Array, " d"] | None = None
) -> Float[Array, "n d"]:
    """Rebuild rows from codes: x_hat = sum_j values_j atoms[indices_j] + bias.

    Args:
        codes: n rows of k slots; indices below m.
        atoms: float [m, d].
        bias: float [d], or None for none.

    Returns:
        x_hat [n, d], without an [n, k, d] tensor on the way.
    """
    x_hat = jax.vmap(combine, in_axes=(0, 0, None))(codes.values, codes.indices, atoms)
    return x_hat if bias is None else x_hat + bias
