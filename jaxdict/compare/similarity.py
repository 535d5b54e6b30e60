"""How alike two sets, or two representations of the same rows, are; and which layer matches which.

For representations X [n, d] and Y [n, e] of the same rows everything is a function of the centred
second moments

    C_xx = (X - mean)^T (X - mean),   C_yy,   C_xy = (X - mean)^T (Y - mean),

which are summed over the rows in float64, so that the rows need not be in memory.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """|A and B| / |A or B| of two sets.

    Args:
        a: [i], each element once.
        b: [j], each element once.

    Returns:
        A share in [0, 1]; 0 for two empty sets.

    Source: of ITDA dictionaries' sources, arXiv 2505.17769.
    """
    both = len(np.intersect1d(a, b, assume_unique=True))
    return both / max(len(a) + len(b) - both, 1)


class CrossCovariance:
    """C_xy, summed over rows as they come; float64 throughout."""

    def __init__(self, d: int, e: int) -> None:
        """Start with no rows.

        Args:
            d: width of x.
            e: width of y.
        """
        self.rows = 0
        self._sums = np.zeros(d), np.zeros(e)
        self._products = np.zeros((d, e))

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """Add rows x [n, d] and y [n, e], float64, best already near their means."""
        self.rows += len(x)
        for sums, rows in zip(self._sums, (x, y), strict=True):
            sums += rows.sum(0)
        self._products += x.T @ y

    @property
    def centred(self) -> np.ndarray:
        """C_xy, float64 [d, e]."""
        x, y = self._sums
        return self._products - np.outer(x, y / max(self.rows, 1))


def linear_cka(xy: np.ndarray, xx_norm: float, yy_norm: float) -> float:
    """Linear centred kernel alignment, ||C_xy||_F^2 / (||C_xx||_F ||C_yy||_F).

    Args:
        xy: C_xy, float64 [d, e].
        xx_norm: ||C_xx||_F.
        yy_norm: ||C_yy||_F.

    Returns:
        A number in [0, 1]; NaN if one of them does not vary.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), section 3.
    """
    size = xx_norm * yy_norm
    return min(1.0, float(np.square(xy).sum()) / size) if size > 0 else float("nan")


def whitened_components(xx: np.ndarray, variance: float) -> np.ndarray:
    """The first principal components, scaled to unit variance: W with W^T C_xx W = I.

    Args:
        xx: C_xx, float64 [d, d].
        variance: as few components as hold this share of the variance are kept.

    Returns:
        float64 [d, p]. What float64 cannot tell from no variance is left out, whatever `variance`.
    """
    values, vectors = np.linalg.eigh(xx)
    values, vectors = values[::-1], vectors[:, ::-1]
    real = values > max(values[0], 0) * len(xx) * np.finfo(np.float64).eps
    values, vectors = values[real], vectors[:, real]
    if not len(values):
        return np.zeros((len(xx), 0))
    share = np.cumsum(values) / values.sum()
    keep = min(len(values), 1 + int(np.searchsorted(share, variance * (1 - 1e-12))))
    return vectors[:, :keep] / np.sqrt(values[:keep])


def svcca(x: np.ndarray, y: np.ndarray, xy: np.ndarray) -> float:
    """Mean canonical correlation of the components kept, mean_i sigma_i(W_x^T C_xy W_y).

    Args:
        x: `whitened_components` of x, [d, p].
        y: `whitened_components` of y, [e, q].
        xy: C_xy, float64 [d, e].

    Returns:
        Mean over the min(p, q) correlations, in [0, 1]; NaN if one of them does not vary. With
        fewer rows than components it says nothing: correlations are then 1.

    Source: Raghu et al. 2017 (arXiv 1706.05806), with 99% of the variance kept.
    """
    if not x.shape[1] or not y.shape[1]:
        return float("nan")
    correlations = np.linalg.svd(x.T @ xy @ y, compute_uv=False)
    return float(np.clip(correlations, 0, 1).mean())


class Matches(NamedTuple):
    """Which of b is most similar to each of a.

    Attributes:
        best: int64 [a], place of the most similar one; -1 without any.
        right: bool [a], the counterpart is more similar than all others.
        counted: bool [a], there is a counterpart and something else to take for it.
        chance: share that would be right if all were drawn.
    """

    best: np.ndarray
    right: np.ndarray
    counted: np.ndarray
    chance: float | None

    @property
    def accuracy(self) -> float | None:
        """Share of the counted ones that are right; None without any."""
        return float(self.right[self.counted].mean()) if self.counted.any() else None


def match(scores: np.ndarray, same: np.ndarray) -> Matches:
    """Match each of a with the most similar one of b; a tie is not a match.

    Args:
        scores: float [a, b], higher is more alike; NaN where the two cannot be compared.
        same: bool [a, b], which of b is the counterpart of which of a; at most one in a row.

    Source: the layer-matching benchmark of Kornblith et al. 2019 (arXiv 1905.00414), section 6.1.
    """
    known = np.isfinite(scores)
    filled = np.where(known, scores, -np.inf)
    best = np.where(known.any(1), filled.argmax(1), -1)
    counterpart = same & known
    counted = counterpart.any(1) & (known.sum(1) > 1)
    own = np.where(counterpart, filled, -np.inf).max(1)
    others = np.where(counterpart, -np.inf, filled).max(1)
    chance = float((1 / known[counted].sum(1)).mean()) if counted.any() else None
    return Matches(best, counterpart.any(1) & (own > others), counted, chance)
