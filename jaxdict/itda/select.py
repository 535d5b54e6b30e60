"""Encode a batch of rows with the atoms so far, and select the rows that join them."""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdict.codes import decode
from jaxdict.itda.growing_atoms import GrowingAtoms
from jaxdict.itda.rules import Reconstruction, join_all, join_one_by_one, row_fvu
from jaxdict.pursuit import gradient_pursuit, unit_rows

JoiningRule = Literal["cover", "worst", "plain"]


class BatchSelection(NamedTuple):
    """A batch of rows, how well the atoms so far rebuild it, and which of its rows join them.

    Attributes:
        unit: float [n, d], the rows at unit norm (zero rows stay zero).
        fvu: float [n], ||z - z_hat||^2 / ||z||^2 of each row, or that of its target; 0 for a zero
            row.
        l0: int32 [n], active atoms.
        rank: int32 [n], position of a row among those that join, from 0; -1 if it does not.
        joining: int32 [], how many join.
        target: float [n, d_out], the target's rows over the norms of z; None without a target.
    """

    unit: Float[Array, "n d"]
    fvu: Float[Array, " n"]
    l0: Int[Array, " n"]
    rank: Int[Array, " n"]
    joining: Int[Array, ""]
    target: Float[Array, "n d_out"] | None = None


@partial(jax.jit, static_argnames=("k", "rule"))
def select_rows(
    atoms: GrowingAtoms,
    z: Float[Array, "n d"],
    y: Float[Array, "n d_out"] | None = None,
    *,
    threshold: float,
    duplicate: float,
    k: int,
    rule: JoiningRule = "cover",
) -> BatchSelection:
    """Encode rows with the atoms so far and select the rows that join.

    With a target, the codes are those of z and the error is that of y: a row joins when its target is
    badly rebuilt, however well z itself is.

    Args:
        atoms: the atoms so far.
        z: rows in the dictionary's own space.
        y: with a target, its rows, in the target's own normalized space.
        threshold: rows of a larger FVU are candidates.
        duplicate: cosine with a row just selected above which a candidate is dropped.
        k: steps of pursuit.
        rule: cover or worst (`jaxdict.itda.rules.join_one_by_one`), or plain (`join_all`).

    Returns:
        The selection.
    """
    # A row that is not finite cannot be an atom, and must not reach the others through a sum.
    unit, norm = unit_rows(jnp.where(jnp.all(jnp.isfinite(z), axis=1, keepdims=True), z, 0))
    result = gradient_pursuit(unit, atoms.prepared, k)
    rebuilt = decode(result.codes, atoms.prepared.unit)
    live = jnp.sum(unit * unit, axis=1) > 0.5
    explained = result.values[:, 0] > 0
    if y is None:
        target, left = None, jnp.square(result.residual_norm)
    else:
        y = y / jnp.where(norm > 0, norm, 1)[:, None]
        target = Reconstruction(y, decode(result.codes, atoms.rebuilt))
        left = row_fvu(*target)
        live &= jnp.any(y != 0, axis=1)
    # Exactly 1 where nothing is explained yet, so that rounding does not decide which row comes first.
    fvu = jnp.where(live, jnp.where(explained, left, 1), 0)
    if rule == "plain":
        rank, joining = join_all(unit, fvu, threshold=threshold, duplicate=duplicate)
    else:
        rank, joining = join_one_by_one(
            Reconstruction(unit, rebuilt),
            fvu,
            target,
            threshold=threshold,
            duplicate=duplicate,
            by=rule,
        )
    return BatchSelection(unit, fvu, result.codes.l0, rank, joining, y)
