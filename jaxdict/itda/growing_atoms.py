"""Atoms in arrays of a power-of-two capacity, so that a dictionary can grow.

Only the capacity reaches a compiled shape, so growing to m atoms compiles O(log m) times. Unused
places hold zero atoms, which pursuit never chooses.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdict.devices import FULL_PRECISION
from jaxdict.pursuit import PreparedAtoms


class GrowingAtoms(NamedTuple):
    """Atoms, with free places behind those in use.

    Attributes:
        prepared: the atoms as pursuit takes them.
        target: float [capacity, d_out], what one unit of each atom stands for at the target, in the
            target's own normalized space; None without a target.
    """

    prepared: PreparedAtoms
    target: Float[Array, "capacity d_out"] | None = None

    @property
    def capacity(self) -> int:
        """Number of places, used or free."""
        return self.prepared.m

    @property
    def d(self) -> int:
        """Width of a row."""
        return self.prepared.d

    @property
    def rebuilt(self) -> Float[Array, "capacity d_out"]:
        """The vectors that rows are rebuilt from: the target's, or the atoms themselves."""
        return self.prepared.unit if self.target is None else self.target


def power_of_two(m: int) -> int:
    """The smallest power of two that is at least m (and at least 1)."""
    return 1 << max(0, m - 1).bit_length()


def empty_atoms(capacity: int, d: int, *, d_out: int | None = None, gram: bool) -> GrowingAtoms:
    """Room for atoms, all zero.

    Args:
        capacity: number of places.
        d: width of a row.
        d_out: width of the target's rows; None without a target.
        gram: whether to keep a Gram matrix, for the form of pursuit that uses one.
    """

    def zeros(*shape: int) -> Array:
        return jnp.zeros(shape, jnp.float32)

    square = zeros(capacity, capacity) if gram else None
    prepared = PreparedAtoms(zeros(capacity, d), jnp.ones(capacity, jnp.float32), square)
    return GrowingAtoms(prepared, None if d_out is None else zeros(capacity, d_out))


def enlarge(atoms: GrowingAtoms, capacity: int) -> GrowingAtoms:
    """The same atoms with more room behind them."""
    more, (unit, _, gram) = capacity - atoms.capacity, atoms.prepared
    unit = jnp.pad(unit, ((0, more), (0, 0)))
    gram = None if gram is None else jnp.pad(gram, ((0, more), (0, more)))
    target = None if atoms.target is None else jnp.pad(atoms.target, ((0, more), (0, 0)))
    return GrowingAtoms(PreparedAtoms(unit, jnp.ones(capacity, unit.dtype), gram), target)


@partial(jax.jit, donate_argnums=0)
def append(
    atoms: GrowingAtoms,
    m: int,
    *,
    unit: Float[Array, "n d"],
    rank: Int[Array, " n"],
    target: Float[Array, "n d_out"] | None = None,
) -> GrowingAtoms:
    """Put the rows that join behind the first m atoms; the capacity must hold them.

    Args:
        atoms: the atoms so far (donated).
        m: how many of them are in use.
        unit: rows of unit norm.
        rank: position of each row among those that join, from 0; -1 if it does not.
        target: with a target, its rows over the norms of the rows that are read.
    """
    places = jnp.where(rank >= 0, m + rank, atoms.capacity)
    table = atoms.prepared.unit.at[places].set(unit, mode="drop")
    gram = atoms.prepared.gram
    if gram is not None:
        block = jnp.dot(unit, table.T, precision=FULL_PRECISION)
        gram = gram.at[places].set(block, mode="drop").at[:, places].set(block.T, mode="drop")
    rebuilt = atoms.target
    if rebuilt is not None:
        assert target is not None
        rebuilt = rebuilt.at[places].set(target, mode="drop")
    return GrowingAtoms(PreparedAtoms(table, atoms.prepared.norm, gram), rebuilt)
