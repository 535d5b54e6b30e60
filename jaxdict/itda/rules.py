"""The rules by which badly rebuilt rows of a batch join an ITDA dictionary.

`cover` and `worst` take one row at a time and skip rows that those taken so far already explain. The
next one is the row that would explain most of what the batch has left, or the row of the largest FVU.
`plain` is the papers' rule. All leave out near-duplicates of a row that joined.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdict.codes import argmax
from jaxdict.devices import FULL_PRECISION

Share = Float[Array, ""] | float


class Reconstruction(NamedTuple):
    """Rows and what codes rebuild them as, of the site that is read or of its target.

    Attributes:
        y: float [n, d], the rows; a target's are divided by the norms of the rows that are encoded.
        y_hat: float [n, d], what they are rebuilt as.
    """

    y: Float[Array, "n d"]
    y_hat: Float[Array, "n d"]


def badly_rebuilt(fvu: Float[Array, " n"], threshold: Share) -> Bool[Array, " n"]:
    """Rows above the threshold; at a threshold of 1, those that are not rebuilt at all."""
    return (fvu > threshold) | (fvu >= 1)


def row_fvu(y: Float[Array, "n d"], y_hat: Float[Array, "n d"]) -> Float[Array, " n"]:
    """||y - y_hat||^2 / ||y||^2 of each row; 0 where y is 0, which needs no atoms."""
    whole = jnp.sum(jnp.square(y), axis=1)
    left = jnp.sum(jnp.square(y - y_hat), axis=1)
    return jnp.where(whole > 0, left / jnp.where(whole > 0, whole, 1), 0)


@jax.jit
def join_all(
    unit: Float[Array, "n d"], fvu: Float[Array, " n"], *, threshold: Share, duplicate: Share
) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Every badly rebuilt row joins, in the order of the batch, except near-duplicates.

    Args:
        unit: rows of unit norm, or zero.
        fvu: of each row.
        threshold: rows with a larger FVU join.
        duplicate: cosine with a row that joined above which a row is its duplicate.

    Returns:
        rank int32 [n] in the order of joining, -1 for rows that do not; how many join.

    Source: arXiv 2505.17769 and 2505.24360.
    """

    def join(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rank, count, waiting = state
        first = jnp.argmax(waiting)
        q = jnp.dot(unit, unit[first], precision=FULL_PRECISION)
        waiting = (waiting & (q <= duplicate)).at[first].set(False)
        return rank.at[first].set(count), count + 1, waiting

    n = unit.shape[0]
    start = jnp.full(n, -1, jnp.int32), jnp.zeros((), jnp.int32), badly_rebuilt(fvu, threshold)
    rank, count, _ = lax.while_loop(lambda state: jnp.any(state[2]), join, start)
    return rank, count


@partial(jax.jit, static_argnames="by")
def join_one_by_one(
    rows: Reconstruction,
    fvu: Float[Array, " n"],
    target: Reconstruction | None = None,
    *,
    threshold: Share,
    duplicate: Share,
    by: Literal["cover", "worst"],
) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Rows join one after the other, except those that are explained meanwhile.

    After a row joins as atom a, every other row z, with the reconstruction y so far, is refitted as
    beta y + gamma a if that helps with gamma > 0 (beta >= 0, least squares). Rows whose FVU has thereby
    fallen to the threshold, or that nearly equal a, no longer need to join. With a target the same
    beta and gamma move the reconstruction of the target, and its FVU is what counts.

    Next comes the row of the largest FVU (`worst`), or the one that explains most of what all rows have
    left (`cover`): as an atom it lowers its own FVU to 0, and with c_i = max(0, <z_i - y_i, a>) that of
    another row by about c_i^2; of a target t_i with residual s_i, by (2 c_i <s_i, t> - c_i^2 ||t||^2) /
    ||t_i||^2, which counts as 0 where it is below 0.

    Args:
        rows: of unit norm, or zero, and their reconstructions by pursuit.
        fvu: of each row, or with a target that of its target's row.
        target: the target's rows and their reconstructions, if there is a target.
        threshold: rows with a larger FVU join.
        duplicate: cosine with a row that joined above which a row is its duplicate.
        by: which row comes first; cover holds a few [n, n] matrices.

    Returns:
        rank int32 [n] in the order of joining, -1 for rows that do not; how many join.

    Source: the joining rule is ITDA's (arXiv 2505.17769, 2505.24360); it adds every
        candidate of a batch except duplicates (`join_all`).
    """
    unit, n = rows.y, len(rows.y)
    dot = partial(jnp.dot, precision=FULL_PRECISION)
    gram = GramMatrices(None, None) if by == "worst" else _gram_matrices(unit, target)

    def open_rows(state: _State) -> Array:
        return badly_rebuilt(state.fvu, threshold) & ~state.closed

    def join(state: _State) -> _State:
        ranked = state.fvu
        if by == "cover":
            ranked = state.fvu + _gain(state, gram)
        best = argmax(jnp.where(open_rows(state), ranked, -jnp.inf))
        a = unit[best]
        q, g = dot(unit, a), dot(state.rebuilt, a)
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
        better = (gamma > 0) & (left < state.left)

        def moved(before: Array | None, more: Array | None) -> Array | None:
            if before is None or more is None:
                return None
            after = beta[:, None] * before + gamma[:, None] * more
            return jnp.where(better[:, None], after, before)

        left = jnp.where(better, left, state.left)
        target_hat, fvu = None, left
        if target is not None:
            target_hat = moved(state.target_hat, target.y[best])
            assert target_hat is not None
            fvu = jnp.where(better, row_fvu(target.y, target_hat), state.fvu)
        return _State(
            state.rank.at[best].set(state.count),
            state.count + 1,
            (state.closed | (q > duplicate)).at[best].set(True),
            fvu,
            left,
            jnp.where(better[:, None], refitted, state.rebuilt),
            target_hat,
            moved(state.overlap, None if gram.rows is None else gram.rows[best]),
            moved(state.target_overlap, None if gram.target is None else gram.target[best]),
        )

    first = _State(
        jnp.full(n, -1, jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(n, bool),
        fvu,
        fvu if target is None else jnp.sum(jnp.square(unit - rows.y_hat), axis=1),
        rows.y_hat,
        None if target is None else target.y_hat,
        None if gram.rows is None else dot(rows.y_hat, unit.T),
        None if gram.target is None or target is None else dot(target.y_hat, target.y.T),
    )
    last = lax.while_loop(lambda state: jnp.any(open_rows(state)), join, first)
    return last.rank, last.count


class _State(NamedTuple):
    """State of `join_one_by_one`: reconstructions so far, their errors, and their inner products with all rows."""

    rank: Array
    count: Array
    closed: Array
    fvu: Array
    left: Array
    rebuilt: Array
    target_hat: Array | None
    overlap: Array | None
    target_overlap: Array | None


class GramMatrices(NamedTuple):
    """Inner products of all rows, and of all rows of the target, [n, n] each; None where not needed."""

    rows: Array | None
    target: Array | None


def _gram_matrices(unit: Array, target: Reconstruction | None) -> GramMatrices:
    dot = partial(jnp.dot, precision=FULL_PRECISION)
    return GramMatrices(dot(unit, unit.T), None if target is None else dot(target.y, target.y.T))


def _gain(state: _State, gram: GramMatrices) -> Array:
    """By how much each row, as an atom, would lower the summed FVU of the others: float [n]."""
    assert gram.rows is not None and state.overlap is not None
    take = jax.nn.relu(gram.rows - state.overlap)
    drop = take * take
    if gram.target is not None:
        assert state.target_overlap is not None
        size = jnp.diagonal(gram.target)
        whole = jnp.where(size > 0, size, 1)[:, None]
        drop = take * (2 * (gram.target - state.target_overlap) - take * size) / whole
    drop = jax.nn.relu(drop)
    return jnp.sum(drop, axis=0) - jnp.diagonal(drop)
