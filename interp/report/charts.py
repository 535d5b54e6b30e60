"""Geometry of the report's small charts, as rectangles that the templates draw as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Bar(NamedTuple):
    """One bar: a rectangle in the chart's units, and the text that explains it."""

    x: float
    y: float
    width: float
    height: float
    title: str


class Tick(NamedTuple):
    """One label on the horizontal axis."""

    x: float
    text: str


class Chart(NamedTuple):
    """A bar chart; `summary` says in words what it shows, for those who cannot see it."""

    width: float
    height: float
    bars: list[Bar]
    ticks: list[Tick]
    summary: str


def number(value: float) -> str:
    """A number with at most three significant digits, thousands grouped: 0.0123, 4.56, 1,234."""
    if not math.isfinite(value):
        return "none"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 0.001:
        return f"{value:.1e}".replace("e-0", "e-")
    digits = max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def percent(share: float) -> str:
    """A share as a percentage: 0.0123 -> 1.23 %."""
    return f"{number(100 * share)} %"


def histogram(
    counts: np.ndarray, maximum: float, *, width: float = 320, height: float = 96
) -> Chart:
    """A feature's positive activations, in equal bins from 0 to its maximum."""
    edges = np.linspace(0, maximum, len(counts) + 1)
    titles = [
        f"{number(edges[i])} to {number(edges[i + 1])}: {int(count):,} rows"
        for i, count in enumerate(counts)
    ]
    ticks = [Tick(0, "0"), Tick(width / 2, number(maximum / 2)), Tick(width, number(maximum))]
    total = int(counts.sum())
    return Chart(
        width,
        height,
        _bars(counts, titles, width, height),
        ticks,
        f"Histogram of {total:,} positive activations from 0 to {number(maximum)}.",
    )


def by_step(
    means: np.ndarray,
    shares: np.ndarray,
    steps: Sequence[int],
    sigmas: Sequence[float],
    *,
    width: float = 320,
    height: float = 72,
) -> Chart:
    """A feature's mean activation at each step."""
    titles = [
        f"step {step}, noise level {sigma:.2f}: mean {number(float(mean))}, "
        f"active on {percent(float(share))} of tokens"
        for step, sigma, mean, share in zip(steps, sigmas, means, shares, strict=True)
    ]
    count = len(steps)
    every = max(1, -(-count // 8))
    ticks = [
        Tick((place + 0.5) * width / count, str(step))
        for place, step in enumerate(steps)
        if place % every == 0
    ]
    peak = int(steps[int(np.argmax(means))]) if count else 0
    summary = f"Mean activation at {count} steps, largest at step {peak}."
    return Chart(
        width, height, _bars(means, titles, width, height, gap=0.16, widest=56), ticks, summary
    )


def densities(values: np.ndarray, *, width: float = 640, height: float = 132) -> Chart:
    """How often features fire: a histogram of the decimal logarithms of densities above 0."""
    positive = values[values > 0]
    if not len(positive):
        return Chart(width, height, [], [], "No feature is active.")
    logs = np.log10(positive)
    low, high = math.floor(logs.min()), max(0, math.ceil(logs.max()))
    low = min(low, high - 1)
    bins = max(8, min(48, 8 * (high - low)))
    counts, edges = np.histogram(logs, bins=bins, range=(low, high))
    titles = [
        f"on {percent(10 ** edges[i])} to {percent(10 ** edges[i + 1])} of tokens: {count} features"
        for i, count in enumerate(counts)
    ]
    ticks = [
        Tick((power - low) / (high - low) * width, percent(10.0**power))
        for power in range(low, high + 1)
    ]
    middle = percent(float(np.median(positive)))
    summary = f"{len(positive):,} features fire; the median one on {middle} of tokens."
    return Chart(width, height, _bars(counts, titles, width, height), ticks, summary)


def _bars(
    values: np.ndarray,
    titles: list[str],
    width: float,
    height: float,
    *,
    gap: float = 0.12,
    widest: float = math.inf,
) -> list[Bar]:
    """Bars side by side: the largest value has the whole height, and any above 0 stays visible."""
    largest = max(float(np.max(values)), 1e-30) if len(values) else 1.0
    step = width / max(1, len(values))
    thick = min(step * (1 - gap), widest)
    bars = []
    for place, (value, title) in enumerate(zip(values, titles, strict=True)):
        tall = 0.0 if value <= 0 else max(1.5, height * float(value) / largest)
        left = place * step + (step - thick) / 2
        bars.append(
            Bar(round(left, 2), round(height - tall, 2), round(thick, 2), round(tall, 2), title)
        )
    return bars
