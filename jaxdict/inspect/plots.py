"""Plots of an activation store: norms through the blocks by step, and spectra."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harvest.store import Store
from jaxdict import plots
from jaxdict.inspect.spectrum import Spectrum

_STREAMS = {"img": "image stream", "txt": "text stream"}
_KINDS = {
    "": "residual stream",
    "mlp": "MLP neurons",
    "attn": "attention output",
    "update": "update",
}
_MOST_NAMED = 10
"""Lines up to which a legend names each; more get a colour bar."""
_MOST_MARKED = 20
"""Blocks up to which a line has a dot at each."""
_MOST_TICKS = 12
"""Blocks up to which each has a tick; of more, every fifth has."""
_ROOM = 0.2
"""Share of an axis that the words beside the first single block take."""


class _SitePosition(NamedTuple):
    """Where a site is: its stream, its kind, and its block, counted through double and single ones."""

    stream: str
    kind: str
    depth: int


def plot_norms(out: Path, store: Store, means: Mapping[str, Sequence[float]]) -> list[Path]:
    """Draw the mean row norm through the blocks, a line a step, a panel a stream.

    Args:
        out: folder.
        store: of which model, and at which noise levels.
        means: site -> mean norm at each captured step.

    Returns:
        the pictures: `norms.png` for the residual stream, `norms-mlp.png` and so on for others.
    """
    doubles, positions = _positions(store, means)
    colours = _colours(store.steps)
    pictures = []
    for kind, streams in _kinds(positions):
        figure, panels = _figure(len(streams), f"Norm of the {_KINDS[kind]}: {_named(store)}")
        for axes, (stream, sites) in zip(panels, streams.items(), strict=True):
            x = np.array([positions[site].depth for site in sites])
            heights = np.array([means[site] for site in sites])
            dots = {"marker": "o", "ms": 3.5} if len(x) <= _MOST_MARKED else {}
            for step, colour in enumerate(colours):
                label = rf"step {store.step_numbers[step]} ($\sigma$ = {store.sigmas[step]:.2f})"
                axes.plot(x, heights[:, step], color=colour, lw=1.4, label=label, **dots)
            axes.set(xlabel="block", title=_STREAMS[stream])
            axes.margins(y=0.12)
            _mark_blocks(axes, x, doubles)
            plots.quiet(axes, title=10)
        _scale_norms(panels[0], np.concatenate([means[s] for g in streams.values() for s in g]))
        panels[0].set_ylabel("mean norm of a row")
        if store.steps <= _MOST_NAMED:
            panels[-1].legend(
                fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5)
            )
        else:
            _bar(figure, panels, store.step_numbers.tolist(), "denoising step")
        pictures.append(_save(figure, out, "norms", kind))
    return pictures


def plot_spectrum(out: Path, store: Store, found: Mapping[str, Spectrum]) -> list[Path]:
    """Draw the share of variance of the first principal components, a line a site, a panel a stream.

    Args:
        out: folder.
        store: of which model.
        found: site -> spectrum.

    Returns:
        the pictures: `spectrum.png` for the residual stream, `spectrum-mlp.png` and so on for others.
    """
    doubles, positions = _positions(store, found)
    pictures = []
    for kind, streams in _kinds(positions):
        title = f"Principal components of the {_KINDS[kind]}: {_named(store)}"
        figure, panels = _figure(len(streams), title, sharex=True)
        depths = sorted({positions[site].depth for sites in streams.values() for site in sites})
        colours = dict(zip(depths, _colours(len(depths)), strict=True))
        named = len(depths) <= _MOST_NAMED
        for axes, (stream, sites) in zip(panels, streams.items(), strict=True):
            for site in sites:
                share = 100 * found[site].cumulated
                axes.plot(
                    np.arange(1, len(share) + 1),
                    share,
                    color=colours[positions[site].depth],
                    lw=1.5 if named else 1.0,
                    label=site,
                )
            axes.axhline(90, color=plots.GREY, lw=0.8, ls=":")
            axes.set(xlabel="principal components", ylim=(0, 102), title=_STREAMS[stream])
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            plots.quiet(axes, title=10)
            if named:
                axes.legend(fontsize=8, frameon=False, loc="lower right")
        panels[0].set_ylabel("variance explained, in %")
        if not named:
            bar = _bar(figure, panels, depths, "block")
            ticks = _ticks(depths[0], depths[-1], doubles)
            ticks_on_bar = np.interp(ticks, depths, np.arange(len(depths)))
            bar.set_ticks(ticks_on_bar, labels=[_block(depth, doubles) for depth in ticks])
        pictures.append(_save(figure, out, "spectrum", kind))
    return pictures


def _positions(store: Store, sites: Mapping[str, Any]) -> tuple[int, dict[str, _SitePosition]]:
    """Number of double blocks, and the position of each site, in the order of the model."""
    parts = {site: (*site.split("."), "")[:4] for site in sites}
    doubles = store.attrs.get("model", {}).get("double") or 1 + max(
        (int(number) for block, number, _, _ in parts.values() if block == "double"), default=-1
    )
    positions = {
        site: _SitePosition(stream, kind, int(number) + (doubles if block == "single" else 0))
        for site, (block, number, stream, kind) in parts.items()
    }
    return doubles, dict(sorted(positions.items(), key=lambda item: item[1].depth))


def _kinds(positions: Mapping[str, _SitePosition]) -> Iterator[tuple[str, dict[str, list[str]]]]:
    """Each kind among the sites, with its sites by stream: a picture, and its panels."""
    for kind in _KINDS:
        streams = {
            stream: [
                s for s, place in positions.items() if (place.stream, place.kind) == (stream, kind)
            ]
            for stream in _STREAMS
        }
        if any(streams.values()):
            yield kind, {stream: sites for stream, sites in streams.items() if sites}


def _block(depth: int, doubles: int) -> str:
    """Name of a block: d0, d1, ... and s0, s1, ..."""
    return f"d{depth}" if depth < doubles else f"s{depth - doubles}"


def _ticks(first: int, last: int, doubles: int) -> list[int]:
    """The blocks that an axis names."""
    every = 1 if last - first < _MOST_TICKS else 5
    return [
        depth
        for depth in range(first, last + 1)
        if (depth if depth < doubles else depth - doubles) % every == 0
        and not 0 < doubles - depth < every / 2  # its name would touch that of s0
    ]


def _mark_blocks(axes: Any, x: np.ndarray, doubles: int) -> None:
    """Name blocks, and mark where the single ones begin."""
    ticks = _ticks(int(x.min()), int(x.max()), doubles)
    axes.set_xticks(ticks, [_block(depth, doubles) for depth in ticks])
    if x.min() < doubles <= x.max():
        axes.axvline(doubles - 0.5, color=plots.GREY, lw=0.8, ls="--")
        share = (doubles - x.min()) / (x.max() - x.min() + 1)
        room = {"right": share, "left": 1 - share}
        for text, side in (("double blocks ", "right"), (" single blocks", "left")):
            if room[side] < _ROOM:
                continue
            axes.annotate(
                *(text, (doubles - 0.5, 0.985)),
                xycoords=("data", "axes fraction"),
                ha=side,
                va="top",
                fontsize=8,
                color=plots.GREY,
            )


def _scale_norms(axes: Any, values: np.ndarray) -> None:
    """Make an axis (and those that share it) logarithmic; of small span, label more than powers of ten."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    positive = values[values > 0]
    if not positive.size:
        return
    axes.set_yscale("log")
    span = positive.max() / positive.min()
    if span < 100:
        subs = (1, 2, 3, 5, 7) if span < 20 else (1, 2, 5)
        axes.yaxis.set_major_locator(MaxNLocator(6) if span < 3 else LogLocator(subs=subs))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.6g}")
        axes.yaxis.set_minor_locator(NullLocator())


def _named(store: Store) -> str:
    name = str(store.attrs.get("model", {}).get("name") or store.path)
    done = int(store.done.sum())
    return f"{name}, {done:,} image{'s' * (done != 1)}"


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * i / max(count - 1, 1)) for i in range(count)]


def _figure(panels: int, title: str, *, sharex: bool = False) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.6 * panels, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, figure.subplots(1, panels, sharex=sharex, sharey=True, squeeze=False)[0]


def _bar(figure: Any, panels: Sequence[Any], values: Sequence[float], label: str) -> Any:
    """A colour bar for lines whose colours are `_colours`, one for each of the ascending `values`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, NoNorm

    colours = ListedColormap(_colours(len(values)))
    scale = ScalarMappable(NoNorm(0, len(values) - 1), colours)
    bar = figure.colorbar(scale, ax=list(panels), pad=0.02, aspect=30)
    shown = range(0, len(values), -(-(len(values) - 1) // 5) or 1)
    bar.set_ticks(shown, labels=[f"{values[i]:g}" for i in shown])
    bar.set_label(label)
    return bar


def _save(figure: Any, out: Path, name: str, kind: str) -> Path:
    return plots.save(figure, out / (name + (f"-{kind}" if kind else "") + ".png"), dpi=150)
