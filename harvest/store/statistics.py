"""Statistics of activations: gathered while they are written, in float64, and read back from a store."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from harvest.store.bfloat16 import from_bits

STATISTICS = ("sum", "sum of squares", "min", "max")
NORM_EDGES = np.concatenate([[0.0], 2.0 ** (np.arange(-16 * 8, 32 * 8 + 1) / 8), [np.inf]])
"""Edges of the bins in which row norms are counted: an eighth of an octave each, from 2^-16 to 2^32."""
MASSIVE = 10.0
"""A row is massive when its norm is more than this many times the median norm."""
_BLOCK = 2**17
"""Values that statistics are taken over at a time: few enough to stay in a core's cache."""


class Statistics(NamedTuple):
    """Statistics of the rows of one site, in float64.

    Attributes:
        count: number of rows n.
        mean: `sum x / n`, [d], in units of the activation.
        second: mean of squares `sum x^2 / n`, [d].
        min: smallest value, [d].
        max: largest value, [d].
    """

    count: int
    mean: np.ndarray
    second: np.ndarray
    min: np.ndarray
    max: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """Variance of each dimension over the rows, `second - mean^2` (never below 0), [d]."""
        return np.maximum(self.second - self.mean**2, 0.0)

    @property
    def norm(self) -> float:
        """Root mean square of the rows' norms, `sqrt(sum_d second)`."""
        return float(np.sqrt(self.second.sum()))

    @property
    def largest(self) -> float:
        """Largest absolute value of any dimension."""
        return float(np.maximum(np.abs(self.min), np.abs(self.max)).max())


class Norms(NamedTuple):
    """Histogram of the norms of a site's rows, by step.

    Attributes:
        edges: edges of the bins, float64 [bins + 1]; a norm on an edge counts above it.
        counts: rows in each bin, int64 [steps, bins].
    """

    edges: np.ndarray
    counts: np.ndarray

    def quantile(self, q: float, step: int | None = None) -> float:
        """Norm below which a share `q` of the rows lies, to the width of a bin (an eighth of an octave).

        Args:
            q: share in [0, 1].
            step: a captured step, or None for all.

        Raises:
            ValueError: there is no row.
        """
        counts = self._of(step)
        total = counts.sum()
        if not total:
            raise ValueError("expected at least one row to take a quantile of, got none")
        cumulated = np.cumsum(counts)
        place = int(np.searchsorted(cumulated, max(q * total, 1e-9)))
        place = min(place, len(counts) - 1)
        low, high = self.edges[place], self.edges[place + 1]
        if low <= 0 or not np.isfinite(high):
            return float(low)
        share = (q * total - (cumulated[place] - counts[place])) / max(counts[place], 1)
        return float(low * (high / low) ** np.clip(share, 0.0, 1.0))

    def massive(self, step: int | None = None) -> float:
        """Share of rows whose norm is more than `MASSIVE` times the median norm, to the width of a bin."""
        counts = self._of(step)
        limit = MASSIVE * self.quantile(0.5, step)
        if limit <= 0:
            return 0.0
        return float(counts[self.edges[:-1] >= limit].sum() / counts.sum())

    def _of(self, step: int | None) -> np.ndarray:
        return self.counts.sum(0) if step is None else self.counts[step]


def summarize(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Statistics of one shard of one site.

    Args:
        bits: bfloat16 bits, uint16 [image, step, token, d].

    Returns:
        sum, sum of squares, min and max over images and tokens, float64 [step, 4, d], and the number
        of rows in each bin of `NORM_EDGES`, int64 [step, bins]. Values that are not finite show in the sums.
    """
    parts = [
        _summarize_rows(bits[:, step].reshape(-1, bits.shape[-1])) for step in range(bits.shape[1])
    ]
    return np.stack([part[0] for part in parts]), np.stack([part[1] for part in parts])


def _summarize_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d = rows.shape[1]
    total, square = np.zeros(d), np.zeros(d)
    low, high = np.full(d, np.inf), np.full(d, -np.inf)
    norms = np.empty(len(rows))
    block = max(1, _BLOCK // d)
    with np.errstate(invalid="ignore", over="ignore"):
        for first in range(0, len(rows), block):
            values = from_bits(rows[first : first + block])
            total += values.sum(0, dtype=np.float64)
            squares = np.square(values, dtype=np.float64)
            square += squares.sum(0)
            norms[first : first + block] = np.sqrt(squares.sum(1))
            np.minimum(low, values.min(0), out=low)
            np.maximum(high, values.max(0), out=high)
    bins = np.searchsorted(NORM_EDGES, norms, side="right") - 1
    counts = np.bincount(np.minimum(bins, len(NORM_EDGES) - 2), minlength=len(NORM_EDGES) - 1)
    return np.stack([total, square, low, high]), counts.astype(np.int64)
