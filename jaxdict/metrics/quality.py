"""All numbers about one way to rebuild rows, of one site or of several sites together.

A site's rows are centred on their own mean and, in standardized space, divided by their own
standard deviations, before the sums of several sites are added: an offset between two sites is not
variance that a dictionary has to explain.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdict.metrics import distributions
from jaxdict.metrics.distributions import ANGLES
from jaxdict.metrics.fidelity import Centred, Measurement, add_counts, pool

WORST = 10
"""How many dimensions are listed, those of the largest error first."""


@dataclass(frozen=True, eq=False)
class Quality:
    """How well rows are rebuilt; see `quality_of`.

    Attributes:
        raw: fidelity in raw space.
        standardized: fidelity in standardized space.
        steps: denoising step -> the same two, of that step's rows.
        fired: [m], rows on which each feature is active; all 0 for a baseline without features.
        cosine: mean cosine between x and x_hat, raw.
        angles: [ANGLES], rows by angle, see `jaxdict.metrics.distributions.RowSums`.
        active: [slots + 1], rows by active features; empty for a baseline without features.
    """

    raw: Centred
    standardized: Centred
    steps: dict[int, tuple[Centred, Centred]]
    fired: np.ndarray
    cosine: float
    angles: np.ndarray
    active: np.ndarray

    def brief(self) -> dict[str, Any]:
        """JSON-able numbers that every way to rebuild rows has.

        Returns:
            rows; fvu (raw); ve; fvu_standardized; cosine (raw, mean over rows); fvu_per_step and
            fvu_standardized_per_step. None where every row is the same.
        """
        raw, standard = self.raw, self.standardized
        return without_nan(
            {
                "rows": raw.rows,
                "fvu": raw.fvu,
                "ve": standard.ve,
                "fvu_standardized": standard.fvu,
                "cosine": self.cosine,
                "fvu_per_step": {str(step): one.fvu for step, (one, _) in self.steps.items()},
                "fvu_standardized_per_step": {
                    str(step): one.fvu for step, (_, one) in self.steps.items()
                },
            }
        )

    def numbers(self) -> dict[str, Any]:
        """JSON-able numbers of a dictionary.

        Returns:
            `brief`, and l0 (mean active features a row) with l0_quantiles and l0_histogram;
            dead_share, features active on none of the rows; density; cosine_quantiles;
            per_dimension: quantiles of error_i / variance_i over dimensions, how many are constant,
            and the worst with their shares of all variance and of all error, raw.
        """
        return without_nan(
            self.brief()
            | {
                "l0": self.l0,
                "dead_share": self.dead_share,
                "cosine_quantiles": distributions.cosine_quantiles(self.angles),
                "l0_quantiles": distributions.l0_quantiles(self.active),
                "l0_histogram": distributions.l0_histogram(self.active),
                "density": distributions.density(self.fired, self.raw.rows),
                "per_dimension": self._per_dimension(),
            }
        )

    @property
    def l0(self) -> float:
        """Mean active features a row."""
        return float(self.fired.sum() / self.raw.rows)

    @property
    def dead_share(self) -> float:
        """Share of features that are active on none of the rows."""
        return float((self.fired == 0).mean())

    @property
    def fvu_per_dimension(self) -> np.ndarray:
        """error_i / variance_i, [d], mean over sites by rows; NaN for a constant dimension."""
        return self.standardized.fvu_per_dimension

    def _per_dimension(self) -> dict[str, Any]:
        each = self.fvu_per_dimension
        live = np.flatnonzero(np.isfinite(each))
        worst = live[np.argsort(-each[live], kind="stable")][:WORST]
        variance, error = (
            value / max(value.sum(), 1e-300) for value in (self.raw.xx, self.raw.error)
        )
        found = np.quantile(each[live], distributions.QUANTILES) if live.size else []
        return {
            "constant": len(each) - len(live),
            "quantiles": {
                str(q): float(value)
                for q, value in zip(distributions.QUANTILES, found, strict=False)
            },
            "worst": [
                {
                    "dimension": int(i),
                    "fvu": float(each[i]),
                    "variance_share": float(variance[i]),
                    "error_share": float(error[i]),
                }
                for i in worst
            ],
        }


def quality_of(measurements: Sequence[Measurement]) -> Quality:
    """The numbers over rows that were measured site by site.

    Args:
        measurements: one a site, of one dictionary; steps of the same name are pooled.

    Returns:
        The numbers over all their rows. Raw sums are added as they are, so that sites with large
        activations weigh more; in standardized space every row weighs the same.

    Raises:
        ValueError: nothing was measured.
    """
    wholes, parts = [], {}
    for one in measurements:
        whole = one.raw.centred
        variance = whole.xx / whole.rows
        wholes.append((whole, whole.over(variance)))
        for step, fidelity in one.steps.items():
            part = fidelity.centred
            parts.setdefault(step, []).append((part, part.over(variance)))
    raw, standardized = map(pool, zip(*wholes, strict=True))
    steps = {
        step: (pool(raw for raw, _ in pairs), pool(own for _, own in pairs))
        for step, pairs in sorted(parts.items())
    }
    fired, angles, active = np.zeros(0), np.zeros(ANGLES), np.zeros(0)
    for one in measurements:
        fired = add_counts(fired, one.fired)
        angles, active = add_counts(angles, one.angles), add_counts(active, one.active)
    cosine = sum(one.cosine for one in measurements) / raw.rows
    return Quality(raw, standardized, steps, fired, cosine, angles, active)


def without_nan(value: Any) -> Any:
    """The same JSON-able value with None in place of NaN and infinity, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
