"""Which badly rebuilt rows of a batch join an ITDA dictionary.

`cover` and `worst` take one row at a time and skip what the rows taken so far already explain: the row
that would explain most of what is left, or the row of which most is left. `plain` is the papers' rule.
All leave out near-duplicates of a row they took.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdict.pursuit.atoms import PRECISION
from jaxdict.pursuit.step import argmax


class Pairs(NamedTuple):
    """What the rows of another site should be, and are, rebuilt as.

    Attributes:
        y: float [n, d_out], rows of the target divided by the norms of the rows that are encoded.
        rebuilt: float [n, d_out], the same codes on the atoms' own targets.
    """

    y: Float[Array, "n d_out"]
    rebuilt: Float[Array, "n d_out"]


def over(fvu: Float[Array, " n"], threshold: Float[Array, ""] | float) -> Bool[Array, " n"]:
    """Rows that are badly rebuilt: above the threshold, or not rebuilt at all (so that 1 means that)."""
    return (fvu > threshold) | (fvu >= 1)


def share_left(y: Float[Array, "n d"], y_hat: Float[Array, "n d"]) -> Float[Array, " n"]:
    """||y - y_hat||^2 / ||y||^2 of each row; 0 where y is 0, which nobody needs to rebuild."""
    whole = jnp.sum(jnp.square(y), axis=1)
    left = jnp.sum(jnp.square(y - y_hat), axis=1)
    return jnp.where(whole > 0, left / jnp.where(whole > 0, whole, 1), 0)


@jax.jit
def plain(
    unit: Float[Array, "n d"],
    fvu: Float[Array, " n"],
    threshold: Float[Array, ""] | float,
    duplicate: Float[Array, ""] | float,
) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Every badly rebuilt row joins, in the order of the batch, but for near-duplicates.

    Args:
        unit: rows of unit norm, or zero.
        fvu: share of each that is left.
        threshold: rows with a larger share join.
        duplicate: cosine with a row that joined above which a row is its duplicate.

    Returns:
        rank int32 [n] in the order of joining, -1 for rows that do not; how many join.

    Source: arXiv 2505.17769 and 2505.24360.
    """

    def join(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        rank, count, waiting = state
        first = jnp.argmax(waiting)
        q = jnp.dot(unit, unit[first], precision=PRECISION)
        waiting = (waiting & (q <= duplicate)).at[first].set(False)
        return rank.at[first].set(count), count + 1, waiting

    n = unit.shape[0]
    start = jnp.full(n, -1, jnp.int32), jnp.zeros((), jnp.int32), over(fvu, threshold)
    rank, count, _ = lax.while_loop(lambda state: jnp.any(state[2]), join, start)
    return rank, count


@partial(jax.jit, static_argnames="by")
def one_by_one(
    unit: Float[Array, "n d"],
    rebuilt: Float[Array, "n d"],
    fvu: Float[Array, " n"],
    threshold: Float[Array, ""] | float,
    duplicate: Float[Array, ""] | float,
    pairs: Pairs | None = None,
    *,
    by: Literal["cover", "worst"],
) -> tuple[Int[Array, " n"], Int[Array, ""]]:
    """Choose rows that join one after the other, none that is explained meanwhile.

    After a row joins as atom a, every other row z, with the reconstruction y so far, is refitted as
    beta y + gamma a if that helps with gamma > 0 (beta >= 0, least squares). Rows whose FVU has thereby
    fallen to the threshold, or that nearly equal a, no longer need to join. With a target the same
    beta and gamma move the reconstruction of the target, and its FVU is what counts.

    Next comes the row of the largest FVU (`worst`), or the one that explains most of what all rows have
    left (`cover`): as an atom it lowers its own FVU to 0, and with c_i = max(0, <z_i - y_i, a>) that of
    another row by about c_i^2; of a target t_i with residual s_i, by (2 c_i <s_i, t> - c_i^2 ||t||^2) /
    ||t_i||^2, which counts as 0 where it is below 0.

    Args:
        unit: rows of unit norm, or zero.
        rebuilt: their reconstructions by pursuit.
        fvu: ||unit - rebuilt||^2, or with a target that one's share of each row that is left.
        threshold: rows with a larger FVU join.
        duplicate: cosine with a chosen row above which a row is its duplicate.
        pairs: the target's rows, if there is one.
        by: what comes first; cover holds a few [n, n] matrices.

    Returns:
        rank int32 [n] in the order of joining, -1 for rows that do not; how many join.

    Source: the joining rule is ITDA's (arXiv 2505.17769, 2505.24360); it adds every
        candidate of a batch but duplicates (`plain`).
    """
    n = unit.shape[0]
    dot = partial(jnp.dot, precision=PRECISION)
    products = Products(None, None) if by == "worst" else _products(unit, pairs)

    def open_rows(state: _State) -> Array:
        return over(state.fvu, threshold) & ~state.closed

    def join(state: _State) -> _State:
        ranked = state.fvu
        if by == "cover":
            ranked = state.fvu + _help(state, products)
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
        target, fvu = None, left
        if pairs is not None:
            target = moved(state.target, pairs.y[best])
            assert target is not None
            fvu = jnp.where(better, share_left(pairs.y, target), state.fvu)
        return _State(
            state.rank.at[best].set(state.count),
            state.count + 1,
            (state.closed | (q > duplicate)).at[best].set(True),
            fvu,
            left,
            jnp.where(better[:, None], refitted, state.rebuilt),
            target,
            moved(state.overlap, None if products.near is None else products.near[best]),
            moved(state.target_overlap, None if products.far is None else products.far[best]),
        )

    first = _State(
        jnp.full(n, -1, jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros(n, bool),
        fvu,
        fvu if pairs is None else jnp.sum(jnp.square(unit - rebuilt), axis=1),
        rebuilt,
        None if pairs is None else pairs.rebuilt,
        None if products.near is None else dot(rebuilt, unit.T),
        None if products.far is None or pairs is None else dot(pairs.rebuilt, pairs.y.T),
    )
    last = lax.while_loop(lambda state: jnp.any(open_rows(state)), join, first)
    return last.rank, last.count


class _State(NamedTuple):
    """Of `one_by_one`: reconstructions so far, what is left, and their products with all rows."""

    rank: Array
    count: Array
    closed: Array
    fvu: Array
    left: Array
    rebuilt: Array
    target: Array | None
    overlap: Array | None
    target_overlap: Array | None


class Products(NamedTuple):
    """Inner products of all rows, [n, n], and of all rows of the target; None where not needed."""

    near: Array | None
    far: Array | None


def _products(unit: Array, pairs: Pairs | None) -> Products:
    dot = partial(jnp.dot, precision=PRECISION)
    return Products(dot(unit, unit.T), None if pairs is None else dot(pairs.y, pairs.y.T))


def _help(state: _State, products: Products) -> Array:
    """By how much each row, as an atom, would lower the FVU of all others together: float [n]."""
    assert products.near is not None and state.overlap is not None
    take = jax.nn.relu(products.near - state.overlap)
    drop = take * take
    if products.far is not None:
        assert state.target_overlap is not None
        size = jnp.diagonal(products.far)
        whole = jnp.where(size > 0, size, 1)[:, None]
        drop = take * (2 * (products.far - state.target_overlap) - take * size) / whole
    drop = jax.nn.relu(drop)
    return jnp.sum(drop, axis=0) - jnp.diagonal(drop)
