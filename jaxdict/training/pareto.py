"""What a run of several members leaves beside their folders: a table, and L0 against FVU as a plot."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

from harvest.atomic import write_json
from jaxdict.plots import MISSING, available, save
from jaxdict.runs import SUMMARY
from jaxdict.sae import TrainSAEConfig

PLOT = "pareto.png"
_COLOURS = ("#1f6fb4", "#d1495b", "#2e9e6b", "#8e5bb0", "#e08e1b", "#7a5c4d", "#17a2b8", "#6c757d")


def finish(
    config: TrainSAEConfig, summaries: dict[str, dict[str, Any]], pace: dict[str, Any]
) -> dict[str, Any]:
    """Write summary.json and pareto.png, print the table.

    Args:
        config: of the whole run.
        summaries: of each member, by name.
        pace: seconds, rows a second, share of the time spent waiting for rows.

    Returns:
        What summary.json holds: `members`, which of them are on the frontier, and the pace.
    """
    points = {
        name: (summary["heldout"]["l0"], summary["heldout"]["fvu"])
        for name, summary in summaries.items()
        if summary["heldout"]
    }
    best = frontier(points, {name: summaries[name]["site"] for name in points})
    summary = {"members": summaries, "frontier": best, **pace}
    write_json(config.out / SUMMARY, summary, hashed=True)
    width = max(len(name) for name in summaries)
    for name, one in summaries.items():
        held = one["heldout"]
        dead = one["training"]["dead_share"]
        numbers = (
            f"FVU {held['fvu']:.4f} raw, {held['fvu_normalized']:.4f} normalized, L0 {held['l0']:.2f}, "
            if held
            else ""
        )
        print(f"{name:<{width}}  {numbers}dead {dead:.1%}{'  *' if name in best else ''}")
    if points:
        print("* no other of its site has both a lower L0 and a lower FVU")
        plotted = plot(config.out, summaries, best)
        if plotted is None:
            print(f"no pareto.png: {MISSING}")
        else:
            print(f"plot: {plotted}")
    print(f"runs: {config.out}")
    return summary


def frontier(points: dict[str, tuple[float, float]], sites: dict[str, str]) -> list[str]:
    """Names of the points that no other of their site beats in one number and equals in the other.

    Args:
        points: (L0, FVU) by name.
        sites: site by name.
    """

    def beaten(name: str) -> bool:
        l0, fvu = points[name]
        return any(
            other != name
            and sites[other] == sites[name]
            and a <= l0
            and b <= fvu
            and (a < l0 or b < fvu)
            for other, (a, b) in points.items()
        )

    return [name for name in points if not beaten(name)]


def plot(out: Path, summaries: dict[str, dict[str, Any]], best: list[str]) -> Path | None:
    """Draw L0 against held-out FVU, one colour a site, with a line through each site's frontier.

    Args:
        out: the run's folder.
        summaries: of each member, by name.
        best: names on a frontier.

    Returns:
        The picture's path, or None when matplotlib is not installed.
    """
    if not available():
        return None
    from matplotlib.figure import Figure

    shown = {name: one for name, one in summaries.items() if one["heldout"]}
    points = {name: (one["heldout"]["l0"], one["heldout"]["fvu"]) for name, one in shown.items()}
    sites = list(dict.fromkeys(one["site"] for one in shown.values()))
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title("What sparsity costs", loc="left", fontsize=13, fontweight="bold", pad=22)
    where = sites[0] if len(sites) == 1 else f"{len(sites)} sites"
    caption = f"{where}: each point a dictionary, lower left is better, filled where none beats it"
    axes.text(0, 1.025, caption, transform=axes.transAxes, fontsize=9, color="#555555")
    axes.set_xlabel("L0: active atoms a row", color="#333333")
    axes.set_ylabel("held-out FVU, raw", color="#333333")
    axes.grid(color="#e6e6e6", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors="#333333", labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color("#999999")
    for number, site in enumerate(sites):
        colour = _COLOURS[number % len(_COLOURS)]
        line = sorted(points[name] for name in best if shown[name]["site"] == site)
        axes.plot(*zip(*line, strict=True), color=colour, lw=1.6, alpha=0.5, zorder=2)
        for won in (False, True):
            own = [
                points[name]
                for name, one in shown.items()
                if one["site"] == site and (name in best) == won
            ]
            if own:
                face = colour if won else "white"
                style = {"s": 46 if won else 30, "facecolors": face, "edgecolors": colour}
                label = site if won else None
                axes.scatter(*zip(*own, strict=True), lw=1.4, label=label, zorder=3, **style)
    axes.margins(x=0.16, y=0.1)
    for which, values in zip(
        (axes.xaxis, axes.yaxis), zip(*points.values(), strict=True), strict=True
    ):
        _scale(axes, which, values)
    if len(sites) > 1:
        axes.legend(fontsize=9, frameon=False, loc="best")
    figure.draw_without_rendering()
    _label(axes, points, shown, best)
    return save(figure, out / PLOT, dpi=140)


def _scale(axes: Any, axis: Any, values: tuple[float, ...]) -> None:
    """Logarithmic where values differ much; ticks with plain numbers, at whole L0 where those are few."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    low, high = min(values), max(values)
    if low > 0 and high > 3 * low:
        (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_minor_locator(NullLocator())
    whole = sorted({round(value) for value in values} - {0})
    if axis is axes.xaxis and len(whole) <= 8 and all(b >= 1.2 * a for a, b in pairwise(whole)):
        axis.set_major_locator(FixedLocator(whole))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _label(
    axes: Any,
    points: dict[str, tuple[float, float]],
    shown: dict[str, dict[str, Any]],
    best: list[str],
) -> None:
    """Names beside points, those on a frontier first, where there is room."""
    taken: list[Any] = []
    dots = {name: axes.transData.transform(point) for name, point in points.items()}
    for name in sorted(points, key=lambda one: one not in best):
        site = shown[name]["site"]
        text = name.removeprefix(site).lstrip("/").replace("_", "  ")
        won = name in best
        placed = axes.annotate(
            text,
            points[name],
            xytext=(7, 3),
            textcoords="offset points",
            fontsize=7.5,
            color="#222222" if won else "#888888",
        )
        box = placed.get_window_extent()
        hidden = [dot for other, dot in dots.items() if other != name and box.contains(*dot)]
        if hidden or any(box.overlaps(other) for other in taken):
            placed.remove()
        else:
            taken.append(box)
