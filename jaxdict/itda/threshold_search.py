"""The search for the threshold that gives N atoms: whole builds, each at a guess from those before it.

A trial that passes N atoms is cut off there, so a bad guess costs little. The number of atoms falls
with the threshold about as a power law, so a guess is a straight line in log-log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

LOWEST, HIGHEST = 1e-4, 0.999
FIRST = 0.4
ENOUGH = 0.93
MOST_TRIALS = 12


class Trial(NamedTuple):
    """One build.

    Attributes:
        threshold: its threshold.
        rows: rows that it encoded.
        atoms: atoms that it ended with.
        whole: False if it was cut off because it passed N atoms.
    """

    threshold: float
    rows: int
    atoms: int
    whole: bool


def next_threshold(trials: Sequence[Trial], atoms: int, rows: int) -> float | None:
    """The next threshold to try, or None when the search is over.

    The search is over when a whole trial has at least ENOUGH of the atoms asked for, when the
    bracket has closed, when even LOWEST gives too few, or after MOST_TRIALS.

    Args:
        trials: all trials so far.
        atoms: atoms asked for, N; a trial with more is cut off.
        rows: rows of a whole trial.

    Returns:
        A threshold between the largest one that was cut off and the smallest one that was whole.
    """
    if not trials:
        return FIRST
    fits = [trial for trial in trials if trial.whole]
    best = max(fits, key=lambda trial: trial.atoms, default=None)
    if best is not None and best.atoms >= ENOUGH * atoms:
        return None
    if len(trials) >= MOST_TRIALS and best is not None:
        return None
    low = max((trial.threshold for trial in trials if not trial.whole), default=LOWEST)
    high = min((trial.threshold for trial in fits), default=HIGHEST)
    if high <= low * 1.002:
        return None
    aim = math.log(0.98 * atoms)
    # Whole trials are exact; a cut one is an estimate, used if there is no second whole one.
    whole = sorted(_points(fits, rows))[:2]
    cut = sorted(_points([trial for trial in trials if not trial.whole], rows))[-1:]
    (x0, y0), *rest = [*whole, *cut]
    if rest and (rest[0][0] - x0) * (rest[0][1] - y0) < 0:
        (x1, y1) = rest[0]
        guess = x0 + (x1 - x0) * (y0 - aim) / (y0 - y1)
    else:
        # Without a second point, a typical slope; at most a factor of 3 away.
        guess = x0 + min(max((y0 - aim) / 1.5, -1.1), 1.1)
    # Inside the bracket and away from its ends, so that the bracket always shrinks.
    a, b = math.log(low), math.log(high)
    if len(trials) > 1 and not trials[-1].whole and not trials[-2].whole:
        guess = (a + b) / 2  # Estimates from cut trials gave another cut one: halve instead.
    margin = 0.1 * (b - a)
    return math.exp(min(max(guess, a + margin), b - margin))


def _points(trials: Sequence[Trial], rows: int) -> list[tuple[float, float]]:
    """(log threshold, log atoms) of trials; atoms grow roughly as the fourth root of the rows."""
    points = []
    for trial in trials:
        more = 1.0 if trial.whole else max(1.0, rows / max(trial.rows, 1)) ** 0.25
        points.append((math.log(trial.threshold), math.log(max(trial.atoms, 0.5) * more)))
    return points
