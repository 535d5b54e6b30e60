"""A dictionary that grows: atoms in arrays of a power-of-two capacity, and which rows join them.

Only the capacity reaches a compiled shape, so growing to m atoms compiles O(log m) times. Unused
places hold zero atoms, which pursuit never chooses.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdict.codes import decode
from jaxdict.itda.select import Pairs, one_by_one, plain, share_left
from jaxdict.pursuit import PreparedAtoms, gradient_pursuit
from jaxdict.pursuit.atoms import PRECISION, unit_rows

Rule = Literal["cover", "worst", "plain"]


class Look(NamedTuple):
    """What pursuit with the atoms so far makes of a batch of rows, and which rows should join.

    Attributes:
        unit: float [n, d], the rows at unit norm (zero rows stay zero).
        fvu: float [n], ||z - z_hat||^2 / ||z||^2 of each row, or the same of its target; 0 for a
            zero row.
        l0: int32 [n], active atoms.
        rank: int32 [n], place of a row among those that join, from 0; -1 if it does not.
        joining: int32 [], how many join.
        partner: float [n, d_out], the target's rows over the norms of z; None without a target.
    """

    unit: Float[Array, "n d"]
    fvu: Float[Array, " n"]
    l0: Int[Array, " n"]
    rank: Int[Array, " n"]
    joining: Int[Array, ""]
    partner: Float[Array, "n d_out"] | None = None


class Target(NamedTuple):
    """The other side of a dictionary that reads one site and rebuilds another.

    Attributes:
        atoms: float [m, d_out], what one unit of each atom stands for there.
        y: float [n, d_out], the rows to be rebuilt, in the target's own normalized space.
    """

    atoms: Float[Array, "m d_out"]
    y: Float[Array, "n d_out"]


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


@partial(jax.jit, static_argnames=("k", "rule"))
def look(
    atoms: PreparedAtoms,
    z: Float[Array, "n d"],
    threshold: float,
    duplicate: float,
    target: Target | None = None,
    *,
    k: int,
    rule: Rule = "cover",
) -> Look:
    """Encode rows with the atoms so far and choose the rows that join.

    With a target, the codes are those of z and the error is that of y: a row joins when its target is
    badly rebuilt, however well z itself is.

    Args:
        atoms: the atoms so far.
        z: rows in the dictionary's own space.
        threshold: rows of a larger FVU are candidates.
        duplicate: cosine with an atom just chosen above which a candidate is dropped.
        target: what the atoms and the rows stand for at another site, if the dictionary has a target.
        k: steps of pursuit.
        rule: cover or worst (`itda_select.one_by_one`), or plain (`itda_select.plain`).

    Returns:
        A `Look`.
    """
    # A row that is not finite is no atom, and must not reach the others through a sum.
    unit, norm = unit_rows(jnp.where(jnp.all(jnp.isfinite(z), axis=1, keepdims=True), z, 0))
    result = gradient_pursuit(unit, atoms, k)
    rebuilt = decode(result.codes, atoms.unit)
    live = jnp.sum(unit * unit, axis=1) > 0.5
    explained = result.values[:, 0] > 0
    if target is None:
        pairs, left = None, jnp.square(result.residual_norm)
    else:
        y = target.y / jnp.where(norm > 0, norm, 1)[:, None]
        pairs = Pairs(y, decode(result.codes, target.atoms))
        left = share_left(*pairs)
        live &= jnp.any(y != 0, axis=1)
    # Exactly 1 where nothing is explained yet, so that the first row wins and not a rounding error.
    fvu = jnp.where(live, jnp.where(explained, left, 1), 0)
    if rule == "plain":
        rank, joining = plain(unit, fvu, threshold, duplicate)
    else:
        rank, joining = one_by_one(unit, rebuilt, fvu, threshold, duplicate, pairs, by=rule)
    return Look(unit, fvu, result.codes.l0, rank, joining, None if pairs is None else pairs.y)


@partial(jax.jit, donate_argnums=0)
def append(
    atoms: PreparedAtoms, m: int, unit: Float[Array, "n d"], rank: Int[Array, " n"]
) -> PreparedAtoms:
    """Put the rows that join behind the first m atoms; their number fits in the capacity.

    Args:
        atoms: the atoms so far (donated).
        m: how many of them are in use.
        unit: rows of unit norm.
        rank: as `look` gives it.
    """
    places = jnp.where(rank >= 0, m + rank, atoms.m)
    table = atoms.unit.at[places].set(unit, mode="drop")
    gram = atoms.gram
    if gram is not None:
        block = jnp.dot(unit, table.T, precision=PRECISION)
        gram = gram.at[places].set(block, mode="drop").at[:, places].set(block.T, mode="drop")
    return PreparedAtoms(table, atoms.norm, gram)


@partial(jax.jit, donate_argnums=0)
def append_partners(
    table: Float[Array, "m d_out"], m: int, rows: Float[Array, "n d_out"], rank: Int[Array, " n"]
) -> Float[Array, "m d_out"]:
    """The same for what the new atoms stand for at the target (`table` is donated)."""
    return table.at[jnp.where(rank >= 0, m + rank, len(table))].set(rows, mode="drop")
