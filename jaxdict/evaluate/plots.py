"""Plots of an evaluation: a sheet of six panels, and a comparison of several sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from harvest.store import stream_of
from jaxdict import plots
from jaxdict.metrics import ANGLES, Quality, density

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "own": "#1f5fbf",
    "pursuit": "#e07b00",
    "random": "#9467bd",
    "pca": "#2f9e63",
    "mean": "#8a8f98",
}
_COSINES = (1, 0.9999, 0.999, 0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0, -0.5, -1)
_MOST_BARS = 60


class Captions(NamedTuple):
    """The words of an evaluation's plots.

    Attributes:
        title: above each picture.
        labels: way to rebuild rows (own, pursuit, random, pca, mean) -> its name in the legend.
        steps: `step` and `sigma` of each denoising step.
    """

    title: str
    labels: Mapping[str, str]
    steps: Sequence[Mapping[str, Any]]


def draw(
    out: Path,
    captions: Captions,
    *,
    groups: Mapping[str, Mapping[str, Quality]],
    by_site: Mapping[str, Mapping[str, Quality]],
) -> list[Path] | None:
    """Draw an evaluation beside its JSON file.

    Args:
        out: the JSON file, eval.json for example.
        captions: titles and names.
        groups: name -> way -> numbers: "" for all rows, and a stream's name for its rows.
        by_site: site -> way -> numbers.

    Returns:
        The pictures: eval.png; for several streams eval-img.png and eval-txt.png; for several sites
        of a stream eval-sites.png. None when matplotlib is not installed.
    """
    if not plots.available():
        return None
    from matplotlib.figure import Figure

    pictures = []
    for name, ways in groups.items():
        figure = Figure(figsize=(15, 8.6), layout="constrained")
        title = f"{captions.title}, {name} stream" if name else captions.title
        _sheet(figure, captions._replace(title=title), ways)
        pictures.append(_save(figure, out, f"-{name}" if name else ""))
    streams: dict[str, list[str]] = {}
    for site in by_site:
        streams.setdefault(stream_of(site), []).append(site)
    longest = max(len(sites) for sites in streams.values())
    if longest > 1:
        width = 1 + len(streams) * min(8, 4 + 0.4 * longest)
        figure = Figure(figsize=(max(width, 10), 8), layout="constrained")
        _sites(figure, captions, by_site, streams)
        pictures.append(_save(figure, out, "-sites"))
    return pictures


def _sheet(figure: Figure, captions: Captions, ways: Mapping[str, Quality]) -> None:
    panels = figure.subplots(2, 3).ravel()
    _fvu_bars(panels[0], captions.labels, ways)
    _fvu_by_step(panels[1], captions.steps, ways)
    _per_dimension(panels[2], ways)
    _density(panels[3], ways)
    _cosine(panels[4], ways)
    _l0(panels[5], ways)
    for axes in panels:
        plots.quiet(axes, title=11)
    _head(figure, captions, ways)


def _fvu_bars(axes: Axes, labels: Mapping[str, str], ways: Mapping[str, Quality]) -> None:
    """FVU in raw and standardized space, a pair of bars for each way."""
    places = np.arange(len(ways))[::-1]
    for place, (name, one) in zip(places, ways.items(), strict=True):
        pair = ((0.2, one.raw.fvu, 1.0, "raw"), (-0.2, one.standardized.fvu, 0.45, "standardized"))
        for offset, value, alpha, space in pair:
            axes.barh(place + offset, value, 0.36, color=COLOURS[name], alpha=alpha)
            axes.annotate(
                f"{value:.3g} {space}",
                (value, place + offset),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
    worst = max(max(one.raw.fvu, one.standardized.fvu) for one in ways.values())
    axes.set_yticks(places, [labels[name] for name in ways])
    axes.set(xlabel="FVU", xlim=(0, 1.35 * worst if np.isfinite(worst) else 1))
    axes.set_title("Fraction of variance unexplained")


def _fvu_by_step(
    axes: Axes, steps: Sequence[Mapping[str, Any]], ways: Mapping[str, Quality]
) -> None:
    """Raw FVU of each denoising step, a line for each way."""
    named = {step["step"]: step for step in steps}
    for name, one in ways.items():
        heights = [part.fvu for part, _ in one.steps.values()]
        axes.plot(range(len(heights)), heights, color=COLOURS[name], marker="o", ms=5, lw=1.6)
    shown = list(next(iter(ways.values())).steps)
    some = np.unique(np.linspace(0, len(shown) - 1, min(len(shown), 8)).round().astype(int))
    words = [f"{shown[i]}\n$\\sigma$ {named[shown[i]]['sigma']:.2f}" for i in some]
    axes.set_xticks(some, words)
    axes.set(xlabel="denoising step", ylabel="FVU, raw")
    _log(axes)
    axes.margins(x=0.5 if len(shown) == 1 else 0.05)
    axes.set_title("By denoising step")


def _per_dimension(axes: Axes, ways: Mapping[str, Quality]) -> None:
    """FVU of every dimension, sorted for each way on its own."""
    low = 1.0
    for name, one in ways.items():
        each = one.fvu_per_dimension
        each = np.sort(each[np.isfinite(each)])[::-1]
        low = min(low, float(np.min(each[each > 0], initial=1)))
        x = np.arange(1, len(each) + 1)
        axes.plot(x, each, color=COLOURS[name], lw=1.2 if name == "mean" else 1.8)
    own = ways["own"].fvu_per_dimension
    worst = np.argsort(-np.where(np.isfinite(own), own, -np.inf), kind="stable")[:3]
    text = "\n".join(f"dimension {i}: {own[i]:.3g}" for i in worst if np.isfinite(own[i]))
    axes.annotate(
        *(f"worst of the dictionary\n{text}", (0.03, 0.04)),
        xycoords="axes fraction",
        va="bottom",
        fontsize=8,
        color=COLOURS["own"],
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 2},
    )
    axes.set(xlabel="dimensions, the worst first", ylabel="FVU of the dimension")
    axes.set_yscale("log")
    axes.set_ylim(bottom=max(low / 1.5, 1e-6))
    _log(axes)
    axes.set_title("By dimension")


def _density(axes: Axes, ways: Mapping[str, Quality]) -> None:
    """Features by the share of rows on which they are active; those that never are stand apart."""
    shown = {name: ways[name] for name in ("own", "pursuit") if name in ways}
    found = {name: density(one.fired, one.raw.rows) for name, one in shown.items()}
    edges = np.asarray(found["own"]["log10_edges"])
    taken = np.flatnonzero(sum(np.asarray(part["features"]) for part in found.values()))
    first = float(edges[taken[0]]) if taken.size else -1.0
    last = float(edges[taken[-1] + 1]) if taken.size else 0.0
    # A logarithmic axis has no 0, so features that are never active get a bar to the left of it.
    gap = max(0.5, 0.17 * (last - first))
    never = first - gap
    for name, part in found.items():
        style: dict[str, Any] = {"color": COLOURS[name], "alpha": 0.75}
        if name != "own":
            style = {"facecolor": "none", "edgecolor": COLOURS[name], "lw": 1.6}
        axes.bar(edges[:-1], part["features"], np.diff(edges), align="edge", **style)
        style["hatch"] = "///"
        dead = axes.bar(never, part["never"], 0.5 * gap, **style)
        if part["never"] and (name == "own" or len(found) == 1):
            axes.bar_label(dead, [f"{part['never']:,}"], fontsize=8, padding=2)
    decades = np.arange(np.ceil(first), np.floor(last) + 1)
    axes.set_xticks([never, *decades], ["never", *(f"{100 * 10.0**i:g}%" for i in decades)])
    axes.set_xlim(never - 0.6 * gap, last + 0.2 * gap)
    axes.set(xlabel="share of rows on which a feature is active", ylabel="features")
    axes.set_title("How often features are active")


def _cosine(axes: Axes, ways: Mapping[str, Quality]) -> None:
    """Rows by the angle to their reconstruction, labelled by its cosine."""
    degrees = 180 / ANGLES
    far = 1
    for name, one in ways.items():
        if name != "mean":
            reached = np.cumsum(one.angles) / max(one.angles.sum(), 1)
            far = max(far, 1 + int(np.searchsorted(reached, 0.995)))
    group = max(1, round(far / _MOST_BARS))
    for name, one in ways.items():
        counts = np.pad(one.angles, (0, -ANGLES % group)).reshape(-1, group).sum(1)
        counts = counts[: -(-far // group)]
        share = 100 * counts / max(one.angles.sum(), 1)
        edges = np.arange(len(counts) + 1) * group * degrees
        axes.stairs(share, edges, color=COLOURS[name], lw=1.6)
        if name == "own":
            axes.stairs(share, edges, color=COLOURS[name], fill=True, alpha=0.3)
    ticks = {0.0: "1"}
    for cosine in _COSINES:
        angle = float(np.degrees(np.arccos(cosine)))
        if max(ticks) + far * degrees / 12 <= angle <= far * degrees:
            ticks[angle] = f"{cosine:g}"
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlim(far * degrees, 0)
    axes.set_ylim(bottom=0)
    axes.set(xlabel=r"cosine of x and $\hat{x}$, raw", ylabel="rows, in %")
    axes.set_title("Direction of the reconstruction")


def _l0(axes: Axes, ways: Mapping[str, Quality]) -> None:
    """Rows by their number of active features."""
    from matplotlib.ticker import MaxNLocator

    shown = {name: ways[name] for name in ("own", "pursuit") if name in ways}
    last = max(int(np.flatnonzero(one.active)[-1]) for one in shown.values())
    first = min(int(np.flatnonzero(one.active)[0]) for one in shown.values())
    group = max(1, -(-(last + 1 - first) // _MOST_BARS))
    edges = np.arange(first, last + 1 + group, group)
    for name, one in shown.items():
        counts = np.pad(one.active, (0, max(0, int(edges[-1]) - len(one.active))))
        share = [100 * counts[a:b].sum() / counts.sum() for a, b in pairwise(edges)]
        style: dict[str, Any] = {"fill": True, "alpha": 0.75} if name == "own" else {"lw": 1.6}
        axes.stairs(share, edges - 0.5, color=COLOURS[name], **style)
        axes.axvline(one.l0, color=COLOURS[name], lw=1, ls=":")
    words = ", ".join(f"{one.l0:.4g}" for one in shown.values())
    axes.set_xlim(
        max(-0.5, first - max(2, 0.1 * (last - first))), last + max(2, 0.1 * (last - first))
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="active features (L0)", ylabel="rows, in %")
    axes.set_title(f"Active features of a row (mean {words})")


def _sites(
    figure: Figure,
    captions: Captions,
    by_site: Mapping[str, Mapping[str, Quality]],
    streams: Mapping[str, Sequence[str]],
) -> None:
    """FVU from site to site: raw above, standardized below, a column for each stream."""
    panels = figure.subplots(2, len(streams), sharex="col", sharey="row", squeeze=False)
    ways = next(iter(by_site.values()))
    for column, (stream, sites) in enumerate(streams.items()):
        for row, space in enumerate(("raw", "standardized")):
            axes = panels[row, column]
            for name in ways:
                heights = [getattr(by_site[site][name], space).fvu for site in sites]
                axes.plot(range(len(sites)), heights, color=COLOURS[name], marker="o", ms=5, lw=1.6)
            _log(axes)
            axes.margins(x=0.5 if len(sites) == 1 else 0.03)
            plots.quiet(axes, title=11)
            if not column:
                axes.set_ylabel(f"FVU, {space}")
        words = [site.replace(f".{stream}", "") for site in sites]
        some = np.arange(0, len(sites), -(-len(sites) // 16))
        slant = {"rotation": 45, "ha": "right"} if len(some) > 5 else {}
        panels[1, column].set_xticks(some, [words[i] for i in some], **slant)
        panels[0, column].set_title(
            {"img": "image stream", "txt": "text stream"}.get(stream, stream)
        )
    _head(figure, captions, ways)


def _head(figure: Figure, captions: Captions, ways: Mapping[str, Quality]) -> None:
    """Title, and one legend for all panels."""
    from matplotlib.lines import Line2D

    layout: Any = figure.get_layout_engine()
    layout.set(w_pad=0.1, h_pad=0.1)
    figure.suptitle(captions.title, fontsize=13)
    names = captions.labels
    handles = [Line2D([], [], color=COLOURS[name], lw=4, label=names[name]) for name in ways]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)


def _log(axes: Axes) -> None:
    """A logarithmic axis of shares, labelled by plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    between = (1, 2, 5) if high < 2000 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(10, between, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _save(figure: Figure, out: Path, suffix: str) -> Path:
    return plots.save(figure, out.with_name(f"{out.stem}{suffix}.png"))
