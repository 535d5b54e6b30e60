"""A dictionary that grows: atoms in arrays of a power-of-two capacity, and which rows join them.

Only the capacity reaches a compiled shape, so growing to m atoms compiles O(log m) times. Unused
places hold zero atoms, which pursuit never chooses.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxdict.codes import decode
from jaxdict.pursuit import PreparedAtoms, gradient_pursuit
from jaxdict.pursuit.atoms import PRECISION, unit_rows
from jaxdict.pursuit.step import argmax


class Look(NamedTuple):
    """What pursuit with the atoms so far makes of a batch of rows, and which rows should join.

    Attributes:
        unit: float [n, d], the rows at unit norm (zero rows stay zero).
        fvu: float [n], ||z - z_hat||^2 / ||z||^2 of each row; 0 for a zero row.
        l0: int32 [n], active atoms.
        rank: int32 [n], place of a row among those that join, from 0; -1 if it does not.
        joining: int32 [], how many join.
    """

    unit: Float[Array, "n d"]
    fvu: Float[Array, " n"]
    l0: Int[Array, " n"]
    rank: Int[Array, " n"]
    joining: Int[Array, ""]


def power_of_two(m: int) -> int:
    """The smallest power of two that is at least m (and at least 1)."""
    return 1 << max(0, m - 1).bit_length()


def empty(capacity: int, d: int, *, gram: bool) -> PreparedAtoms:
    """Room for `capacity` atoms, all zero; with a Gram matrix if pursuit is to use one."""
    square = jnp.zeros((capacity, capacity)) if gram else None
    return PreparedAtoms(jnp.zeros((capacity, d)), jnp.ones(capacity), square)


def grow(atoms: PreparedAtoms, capacity: int) -> PreparedAtoms:
    """The same atoms in more room."""
    more = capacity - atoms.m
    unit = jnp.pad(atoms.unit, ((0, more), (0, 0)))
    gram = None if atoms.gram is None else jnp.pad(atoms.gram, ((0, more), (0, more)))
    return PreparedAtoms(unit, jnp.ones(capacity), gram)


@partial(jax.jit, static_argnames=("k",))
def look(
    atoms: PreparedAtoms, z: Float[Array, "n d"], threshold: float, duplicate: float, *, k: int
) -> Look:
    """Encode rows with the atoms so far and choose the rows that join.

    Args:
        atoms: the atoms so far.
        z: rows in the dictionary's own space.
        threshold: rows of a larger FVU are candidates.
        duplicate: cosine with an atom just chosen above which a candidate is dropped.
        k: steps of pursuit.

    Returns:
        A `Look`.
    """
    unit, _ = unit_rows(z)
    result = gradient_pursuit(unit, atoms, k)
    rebuilt = decode(result.codes, atoms.unit)
    live = jnp.sum(unit * unit, axis=1) > 0.5
    # Exactly 1 where nothing is explained yet, so that the first row wins and not a rounding error.
    fvu = jnp.where(result.values[:, 0] > 0, jnp.square(result.residual_norm), live)
    rank, joining = select(unit, rebuilt, fvu, threshold, duplicate)
    return Look(unit, fvu, result.codes.l0, rank, joining)


@jax.jit
def select(
    unit: Float[Array, "n d"],
    rebuilt: Float[Array, "n d"],
    fvu: Float[Array, " n"],
    threshold: Float[Array, ""] | float,
    duplicate: Float[Array, ""] | float,
) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Choose the rows of a batch that join: the worst first, none that is explained meanwhile.

    After a row joins as atom a, every other row z, with the reconstruction y so far, is refitted as
    beta y + gamma a if that helps with gamma > 0 (beta >= 0, least squares). Rows whose FVU has thereby
    fallen to the threshold, or that nearly equal a, no longer need to join.

    Args:
        unit: rows of unit norm, or zero.
        rebuilt: their reconstructions by pursuit.
        fvu: ||unit - rebuilt||^2.
        threshold: rows with a larger FVU join.
        duplicate: cosine with a chosen row above which a row is its duplicate.

    Returns:
        rank int32 [n] in the order of joining, -1 for rows that do not; how many join.

    Source: the joining rule is ITDA's (arXiv 2505.17769, 2505.24360); it adds every
        candidate of a batch but duplicates.
    """
    n = unit.shape[0]

    class State(NamedTuple):
        rank: Array
        count: Array
        fvu: Array
        rebuilt: Array

    def open_rows(state: State) -> Array:
        return state.fvu > threshold

    def join(state: State) -> State:
        worst = argmax(jnp.where(open_rows(state), state.fvu, -jnp.inf))
        a = unit[worst]
        q = jnp.dot(unit, a, precision=PRECISION)
        g = jnp.dot(state.rebuilt, a, precision=PRECISION)
        p = jnp.sum(unit * state.rebuilt, axis=1)
        s = jnp.sum(jnp.square(state.rebuilt), axis=1)
        # Normal equations [[s, g], [g, 1]] (beta, gamma) = (p, q); singular where y is along a.
        det = s - g * g
        sound = det > 1e-6 * s
        det = jnp.where(sound, det, 1)
        beta = jnp.where(sound, (p - g * q) / det, 0)
        gamma = jnp.where(sound, (s * q - g * p) / det, q)
        alone = beta <= 0
        beta, gamma = jnp.where(alone, 0, beta), jnp.where(alone, q, gamma)
        refitted = beta[:, None] * state.rebuilt + gamma[:, None] * a
        left = jnp.sum(jnp.square(unit - refitted), axis=1)
        better = (gamma > 0) & (left < state.fvu)
        left = jnp.where(better, left, state.fvu)
        left = jnp.where(q > duplicate, 0, left).at[worst].set(0)
        return State(
            state.rank.at[worst].set(state.count),
            state.count + 1,
            left,
            jnp.where(better[:, None], refitted, state.rebuilt),
        )

    first = State(jnp.full(n, -1, jnp.int32), jnp.zeros((), jnp.int32), fvu, rebuilt)
    last = lax.while_loop(lambda state: jnp.any(open_rows(state)), join, first)
    return last.rank, last.count


@partial(jax.jit, donate_argnums=0)
def append(
    atoms: PreparedAtoms, m: int, unit: Float[Array, "n d"], rank: Int[Array, " n"]
) -> PreparedAtoms:
    """Put the rows that join behind the first m atoms; their number fits in the capacity.

    Args:
        atoms: the atoms so far (donated).
        m: how many of them are in use.
        unit: rows of unit norm.
        rank: as `select` gives it.
    """
    places = jnp.where(rank >= 0, m + rank, atoms.m)
    table = atoms.unit.at[places].set(unit, mode="drop")
    gram = atoms.gram
    if gram is not None:
        block = jnp.dot(unit, table.T, precision=PRECISION)
        gram = gram.at[places].set(block, mode="drop").at[:, places].set(block.T, mode="drop")
    return PreparedAtoms(table, atoms.norm, gram)
