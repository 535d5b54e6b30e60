"""Distributions: of cosines and L0 over rows, and of how often each feature is active.

Rows are counted in bins on the device, so that any number of rows takes the same memory.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdict.codes import Codes

ANGLES = 1800
"""Bins of equal width over [0, pi] in which the angles between x and x_hat are counted."""
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_MOST_BINS = 16
_PER_DECADE = 4


class RowSums(NamedTuple):
    """Counts of the rows of a batch.

    Attributes:
        cosine: sum of the rows' cosines.
        angles: [ANGLES], rows by the angle between x and x_hat, in bins of pi / ANGLES.
        active: [slots + 1], rows by their number of active features, from 0; or None.
    """

    cosine: Any
    angles: Any
    active: Any


def row_sums(
    codes: Codes | None,
    x: Float[Array, "n d"],
    x_hat: Float[Array, "n d"],
    weight: Float[Array, " n"],
) -> RowSums:
    """Count rows by the angle between x and x_hat, and by their active features; jittable.

    The angle is 2 atan2(||u - v||, ||u + v||) of the unit vectors u and v, which keeps its digits
    where x_hat is nearly x (arccos of the cosine does not).

    Args:
        codes: of the n rows; None for a baseline without codes.
        x: float32 [n, d], raw.
        x_hat: float32 [n, d].
        weight: float32 [n], 1 for a row that counts and 0 for padding.

    Returns:
        The counts. A zero vector is at a right angle to everything: its cosine is 0.
    """
    u, v = _unit(x), _unit(x_hat)
    apart, along = (jnp.sqrt(jnp.sum(jnp.square(w), axis=1)) for w in (u - v, u + v))
    angle = jnp.where(apart + along > 0, 2 * jnp.arctan2(apart, along), jnp.pi / 2)
    place = jnp.clip((angle * (ANGLES / jnp.pi)).astype(jnp.int32), 0, ANGLES - 1)
    angles = jnp.zeros(ANGLES, jnp.float32).at[place].add(weight)
    active = None
    if codes is not None:
        active = jnp.zeros(codes.k + 1, jnp.float32).at[codes.l0].add(weight)
    return RowSums(jnp.sum(jnp.sum(u * v, axis=1) * weight), angles, active)


def _unit(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=1, keepdims=True))
    return x / jnp.where(norm > 0, norm, 1)


def cosine_quantiles(angles: np.ndarray) -> dict[str, float]:
    """Quantiles of the rows' cosines.

    Args:
        angles: [ANGLES], as in `RowSums`.

    Returns:
        Quantile -> cosine, to within half a bin of pi / ANGLES (at a cosine of 0.99, to 0.0002).
    """
    reached = np.cumsum(angles[::-1])
    middles = np.cos((np.arange(ANGLES)[::-1] + 0.5) * np.pi / ANGLES)
    return {str(q): float(middles[_place(reached, q)]) for q in QUANTILES}


def l0_quantiles(active: np.ndarray) -> dict[str, int]:
    """Quantiles of the rows' numbers of active features, from how many rows have 0, 1, 2, ..."""
    reached = np.cumsum(active)
    return {str(q): _place(reached, q) for q in QUANTILES}


def _place(reached: np.ndarray, q: float) -> int:
    """The first place at which cumulated counts reach the share q of their total."""
    return int(np.searchsorted(reached, q * reached[-1], side="left"))


def l0_histogram(active: np.ndarray) -> dict[str, list[int]]:
    """Rows by their number of active features, in at most 16 bins of one width.

    Args:
        active: [slots + 1], rows with 0, 1, 2, ... active features.

    Returns:
        `edges` and `rows`: bin i holds edges[i] <= L0 < edges[i + 1].
    """
    seen = np.flatnonzero(active)
    first, last = int(seen[0]), int(seen[-1])
    width = -(-(last - first + 1) // _MOST_BINS)
    bins = -(-(last - first + 1) // width)
    edges = [first + width * i for i in range(bins + 1)]
    rows = [int(active[low:high].sum()) for low, high in pairwise(edges)]
    return {"edges": edges, "rows": rows}


def density(fired: np.ndarray, rows: int) -> dict[str, Any]:
    """How many features are active on which share of the rows, in bins of a quarter decade.

    Args:
        fired: [m], rows on which each feature is active.
        rows: rows in all.

    Returns:
        `never`, features active on no row; `log10_edges` and `features`: bin i holds the features
        with log10_edges[i] <= log10(share) < log10_edges[i + 1] (the last bin also a share of 1).
    """
    live = fired[fired > 0]
    decades = math.ceil(math.log10(max(rows, 10)))
    edges = np.arange(-decades * _PER_DECADE, 1) / _PER_DECADE
    features, _ = np.histogram(np.log10(live / rows), edges)
    return {
        "never": int((fired == 0).sum()),
        "log10_edges": edges.tolist(),
        "features": features.tolist(),
    }
