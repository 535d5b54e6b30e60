"""How well a dictionary rebuilds rows: FVU, VE, L0 and dead share, from sums over batches.

    FVU = sum ||x - x_hat||^2 / sum ||x - mean||^2           (mean over the measured rows)
    FVU standardized = mean over dimensions of error_i / variance_i
    VE  = mean over dimensions of corr(x_i, x_hat_i)^2       (the FLUX paper's variance explained)

FVU is dominated by the widest dimensions, VE counts every dimension alike. Say which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxdict.codes import Codes
from jaxdict.metrics.distributions import ANGLES, RowSums
from jaxdict.rows import Block

_ROUNDING = 1e-6
"""A variance below this share of the squared distance from the shift is float32 rounding: 0."""


class Sums(NamedTuple):
    """Sums over one batch, around a fixed shift: float32 on the device, or float64 in NumPy.

    Attributes:
        count: rows.
        x, x_hat: [d], first moments of x - shift and x_hat - shift.
        xx, hh, xh: [d], second moments.
        error: [d], sum of (x - x_hat)^2.
    """

    count: Any
    x: Any
    x_hat: Any
    xx: Any
    hh: Any
    xh: Any
    error: Any


def batch_sums(
    x: Float[Array, "n d"],
    x_hat: Float[Array, "n d"],
    weight: Float[Array, " n"],
    shift: Float[Array, " d"],
) -> Sums:
    """Sums of a batch, pure and jittable.

    Args:
        x: float32 [n, d].
        x_hat: float32 [n, d].
        weight: float32 [n], 1 for a row that counts and 0 for padding.
        shift: float32 [d], about the mean of x: keeps digits where the mean is large.

    Returns:
        The sums.
    """
    w = weight[:, None]
    a, b = (x - shift) * w, (x_hat - shift) * w
    error = jnp.sum(jnp.square(x - x_hat) * w, axis=0)
    first, first_hat, xx, hh, xh = (jnp.sum(v, axis=0) for v in (a, b, a * a, b * b, a * b))
    return Sums(jnp.sum(weight), first, first_hat, xx, hh, xh, error)


def fired(codes: Codes, m: int, weight: Float[Array, " n"]) -> Float[Array, " m"]:
    """Rows in which each feature is active: float32 [m].

    Args:
        codes: n rows.
        m: number of features.
        weight: float32 [n], 0 for padding.

    Returns:
        Counts, exact below 2^24 rows.
    """
    active = (codes.values != 0) * weight[:, None]
    return jnp.zeros(m, jnp.float32).at[codes.indices].add(active)


class Centred(NamedTuple):
    """Sums of squares around the means, float64; every measure of fidelity is a property.

    Attributes:
        rows: how many.
        error: [d], sum of (x - x_hat)^2.
        xx, hh, xh: [d], sums of squares of x and x_hat and of their product, around their means.
    """

    rows: int
    error: np.ndarray
    xx: np.ndarray
    hh: np.ndarray
    xh: np.ndarray

    @property
    def fvu(self) -> float:
        """sum ||x - x_hat||^2 / sum ||x - mean||^2; NaN where every row is the same."""
        variance = float(self.xx.sum())
        return float(self.error.sum()) / variance if variance > 0 else float("nan")

    @property
    def fvu_per_dimension(self) -> np.ndarray:
        """error_i / variance_i, [d]; NaN for a dimension that is constant in x."""
        live = self.xx > 0
        return np.where(live, self.error / np.where(live, self.xx, 1), np.nan)

    @property
    def fvu_standardized(self) -> float:
        """Mean over dimensions of error_i / variance_i: every dimension counts alike."""
        each = self.fvu_per_dimension[self.xx > 0]
        return float(each.mean()) if each.size else float("nan")

    @property
    def ve(self) -> float:
        """Mean over dimensions of the squared correlation.

        A dimension that is constant in x is left out; one constant in x_hat only counts 0.
        """
        live = self.xx > 0
        if not live.any():
            return float("nan")
        scale, xh = (self.xx * self.hh)[live], self.xh[live]
        squared = np.where(scale > 0, xh**2 / np.where(scale > 0, scale, 1), 0)
        return float(np.minimum(squared, 1).mean())

    def over(self, variance: np.ndarray) -> Centred:
        """The same sums in the space where every dimension is divided by a standard deviation.

        Args:
            variance: float [d]; a dimension where it is 0 is left out (its sums become 0).
        """
        scale = np.where(variance > 0, 1 / np.where(variance > 0, variance, 1), 0)
        return Centred(self.rows, *(value * scale for value in self[1:]))


def pool(parts: Iterable[Centred]) -> Centred:
    """Sets of rows, those of several sites for example, as one set, each around its own means."""
    rows, *sums = (sum(values) for values in zip(*parts, strict=True))
    return Centred(int(rows), *map(np.asarray, sums))


@dataclass
class Fidelity:
    """Float64 totals of `Sums`; the numbers are properties and may be read at any time."""

    totals: Sums | None = None

    def add(self, sums: Sums) -> None:
        """Add a batch."""
        new = Sums(*(np.asarray(value, np.float64) for value in jax.device_get(sums)))
        self.totals = new if self.totals is None else Sums(*map(np.add, self.totals, new))

    def merge(self, other: Fidelity) -> None:
        """Add all of another's batches (taken around the same shift)."""
        if other.totals is not None:
            self.add(other.totals)

    @property
    def rows(self) -> int:
        """Rows measured."""
        return 0 if self.totals is None else int(self.totals.count)

    @property
    def centred(self) -> Centred:
        """Sums of squares around the means; ValueError where no row was measured."""
        t = self.totals
        if t is None or not t.count:
            raise ValueError("expected at least one measured row, got none; give more images")
        n = t.count
        xx = np.maximum(t.xx - t.x**2 / n, 0)
        xx = np.where(xx > _ROUNDING * t.xx, xx, 0)
        hh = np.maximum(t.hh - t.x_hat**2 / n, 0)
        return Centred(int(n), t.error, xx, hh, t.xh - t.x * t.x_hat / n)

    @property
    def fvu(self) -> float:
        """See `Centred.fvu`."""
        return self.centred.fvu

    @property
    def fvu_standardized(self) -> float:
        """See `Centred.fvu_standardized`."""
        return self.centred.fvu_standardized

    @property
    def ve(self) -> float:
        """See `Centred.ve`."""
        return self.centred.ve


class BatchReport(NamedTuple):
    """What one batch adds to a `Measurement`.

    Attributes:
        raw: sums over raw rows.
        own: sums over normalized rows, or None without a normalized space.
        fired: float32 [m], rows in which each feature is active.
        rows: counts of rows for distributions, or None.
    """

    raw: Sums
    own: Sums | None
    fired: Array
    rows: RowSums | None = None


class Measurement:
    """Fidelity over all rows and for each denoising step, and how often each feature is active.

    Attributes:
        steps: raw fidelity of each denoising step.
        own: fidelity in normalized space, all steps together.
        fired: [m], rows in which each feature is active.
        cosine: sum of the rows' cosines.
        angles: [ANGLES], see `RowSums`; all 0 unless counted.
        active: [slots + 1], see `RowSums`; empty unless counted.
    """

    def __init__(self) -> None:
        """Nothing measured yet."""
        self.steps: dict[int, Fidelity] = {}
        self.own = Fidelity()
        self.fired = np.zeros(0)
        self.cosine = 0.0
        self.angles = np.zeros(ANGLES)
        self.active = np.zeros(0)

    def add(self, step: int, report: BatchReport) -> None:
        """Add a batch of rows of one denoising step."""
        self.steps.setdefault(step, Fidelity()).add(report.raw)
        if report.own is not None:
            self.own.add(report.own)
        self.fired = add_counts(self.fired, report.fired)
        if report.rows is not None:
            self.cosine += float(report.rows.cosine)
            self.angles = add_counts(self.angles, report.rows.angles)
            if report.rows.active is not None:
                self.active = add_counts(self.active, report.rows.active)

    @property
    def raw(self) -> Fidelity:
        """All denoising steps together."""
        total = Fidelity()
        for part in self.steps.values():
            total.merge(part)
        return total

    def summary(self) -> dict[str, Any]:
        """JSON-able numbers.

        Returns:
            rows; fvu (raw); ve (raw); fvu_standardized; fvu_normalized and ve_normalized with a
            normalized space; l0, mean active atoms a row; dead_share, features active in none of the
            rows; fvu_per_step.
        """
        raw = self.raw
        numbers: dict[str, Any] = {"rows": raw.rows, "fvu": raw.fvu, "ve": raw.ve}
        numbers["fvu_standardized"] = raw.fvu_standardized
        if self.own.totals is not None:
            numbers |= {"fvu_normalized": self.own.fvu, "ve_normalized": self.own.ve}
        numbers["l0"] = float(self.fired.sum() / raw.rows)
        numbers["dead_share"] = float((self.fired == 0).mean())
        numbers["fvu_per_step"] = {str(step): part.fvu for step, part in sorted(self.steps.items())}
        return numbers


def add_counts(total: np.ndarray, counts: Any) -> np.ndarray:
    """Sum of two arrays of counts, float64, as long as the longer one."""
    new = np.asarray(counts, np.float64)
    size = max(len(total), len(new))
    return np.pad(total, (0, size - len(total))) + np.pad(new, (0, size - len(new)))


def measure_blocks(
    blocks: Iterable[Block],
    steps: Sequence[int],
    report: Callable[[np.ndarray, np.ndarray], BatchReport],
    *,
    batch: int = 4096,
) -> Measurement:
    """Measure blocks of rows, in batches of one size so that it compiles once.

    Args:
        blocks: as `jaxdict.rows.Source.blocks` gives them.
        steps: name of each step of the blocks.
        report: (bits uint16 [batch, d], weight float32 [batch]) to a `BatchReport`.
        batch: rows at a time; the last batch of a step is padded with weight 0.

    Returns:
        The measurement.
    """
    measurement = Measurement()
    for block in blocks:
        for place, step in enumerate(steps):
            rows = block.at_step(place)
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                weight = np.zeros(batch, np.float32)
                weight[: len(part)] = 1
                padded = np.pad(part, ((0, batch - len(part)), (0, 0)))
                measurement.add(int(step), report(padded, weight))
    return measurement
