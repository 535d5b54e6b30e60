"""Plots of an activation store: norms through the blocks by step, and spectra."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harvest.store import Store
from jaxdict.spectrum import Spectrum

_STREAMS = {"img": "image stream", "txt": "text stream"}
_KINDS = {
    "": "residual stream",
    "mlp": "MLP neurons",
    "attn": "attention output",
    "update": "update",
}
_MOST_NAMED = 10
"""Lines that a legend names one by one; more are told by a colour bar."""
_GREY = "#8a8f98"


def plot_norms(out: Path, store: Store, means: Mapping[str, Sequence[float]]) -> list[Path]:
    """Draw the mean row norm through the blocks, a line a step, a panel a stream.

    Args:
        out: Folder.
        store: Of which model, and at which noise levels.
        means: Site -> mean norm at each captured step.

    Returns:
        The pictures: ``norms.png`` for the residual stream, ``norms-mlp.png`` and so on for others.
    """
    places = {site: _place(site) for site in means}
    doubles = store.attrs.get("model", {}).get("double") or 1 + max(
        (place[1] for place in places.values() if place[0] == "double"), default=-1
    )
    pictures = []
    for kind in _KINDS:
        sites = [site for site in means if places[site][3] == kind]
        streams = [s for s in _STREAMS if any(places[site][2] == s for site in sites)]
        if not streams:
            continue
        figure, panels = _figure(len(streams), f"Norm of the {_KINDS[kind]}: {_named(store)}")
        for axes, stream in zip(panels, streams, strict=True):
            line = [site for site in sites if places[site][2] == stream]
            x = np.array([_depth(places[site], doubles) for site in line])
            order = np.argsort(x)
            heights = np.array([means[line[i]] for i in order])
            colours = _colours(store.steps)
            for step in range(store.steps):
                label = rf"step {store.step_numbers[step]} ($\sigma$ = {store.sigmas[step]:.2f})"
                axes.plot(
                    x[order],
                    heights[:, step],
                    color=colours[step],
                    marker="o",
                    ms=3.5,
                    lw=1.4,
                    label=label,
                )
            axes.set(xlabel="block", yscale="log", title=_STREAMS[stream])
            _mark_blocks(axes, x, doubles)
            _quiet(axes)
        panels[0].set_ylabel("mean norm of a row, in units of the activation")
        steps = [float(number) for number in store.step_numbers]
        _legend(figure, panels, store.steps, steps, "denoising step")
        pictures.append(_save(figure, out / ("norms" + (f"-{kind}" if kind else "") + ".png")))
    return pictures


def plot_spectrum(out: Path, found: Mapping[str, Spectrum]) -> Path:
    """Draw the share of variance of the first principal components, a line a site, a panel a stream.

    Args:
        out: Folder.
        found: Site -> spectrum.

    Returns:
        The picture, ``spectrum.png``.
    """
    places = {site: _place(site) for site in found}
    streams = [s for s in _STREAMS if any(place[2] == s for place in places.values())]
    title = "Share of variance of the first principal components"
    figure, panels = _figure(len(streams), title, sharex=True)
    for axes, stream in zip(panels, streams, strict=True):
        sites = [site for site in found if places[site][2] == stream]
        for site, colour in zip(sites, _colours(len(sites)), strict=True):
            share = found[site].cumulated
            axes.plot(np.arange(1, len(share) + 1), 100 * share, color=colour, lw=1.5, label=site)
        axes.axhline(90, color=_GREY, lw=0.8, ls=":")
        axes.set(xlabel="principal components", ylim=(0, 102), title=_STREAMS[stream])
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        _quiet(axes)
        if len(sites) <= _MOST_NAMED:
            axes.legend(fontsize=8, frameon=False, loc="lower right")
    panels[0].set_ylabel("variance explained, in %")
    longest = max(sum(place[2] == stream for place in places.values()) for stream in streams)
    if longest > _MOST_NAMED:
        _bar(figure, panels, np.arange(longest, dtype=float), "site, in the order of the model")
    return _save(figure, out / "spectrum.png")


def _place(site: str) -> tuple[str, int, str, str]:
    """(double or single, number, stream, kind) of a site's name."""
    block, number, stream, *kind = site.split(".")
    return block, int(number), stream, kind[0] if kind else ""


def _depth(place: tuple[str, int, str, str], doubles: int) -> int:
    return place[1] + (doubles if place[0] == "single" else 0)


def _mark_blocks(axes: Any, x: np.ndarray, doubles: int) -> None:
    """Name blocks as d0, d1, ... and s0, s1, ..., and mark where the single ones begin."""
    shown = np.unique(x)
    if len(shown) > 12:
        shown = shown[np.linspace(0, len(shown) - 1, 12).round().astype(int)]
    axes.set_xticks(shown, [f"d{i}" if i < doubles else f"s{i - doubles}" for i in shown])
    if x.min() < doubles <= x.max():
        axes.axvline(doubles - 0.5, color=_GREY, lw=0.8, ls="--")
        for text, side in (("double blocks ", "right"), (" single blocks", "left")):
            axes.annotate(
                *(text, (doubles - 0.5, 0.985)),
                xycoords=("data", "axes fraction"),
                ha=side,
                va="top",
                fontsize=8,
                color=_GREY,
            )


def _named(store: Store) -> str:
    name = str(store.attrs.get("model", {}).get("name") or store.path)
    return f"{name}, {int(store.done.sum()):,} images"


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](0.92 * i / max(count - 1, 1)) for i in range(count)]


def _figure(panels: int, title: str, *, sharex: bool = False) -> tuple[Any, Sequence[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.6 * panels, 4.2), layout="constrained")
    figure.suptitle(title, fontsize=12)
    return figure, figure.subplots(1, panels, sharex=sharex, sharey=True, squeeze=False)[0]


def _quiet(axes: Any) -> None:
    axes.grid(alpha=0.25, which="major")
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(10)


def _legend(
    figure: Any, panels: Sequence[Any], count: int, values: Sequence[float], label: str
) -> None:
    if count <= _MOST_NAMED:
        panels[-1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    else:
        _bar(figure, panels, np.asarray(values), label)


def _bar(figure: Any, panels: Sequence[Any], values: np.ndarray, label: str) -> None:
    """A colour bar for lines whose colours were taken in the order of `values`."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    colours = ListedColormap(_colours(256))
    scale = Normalize(float(values.min()), float(values.max()))
    figure.colorbar(ScalarMappable(scale, colours), ax=list(panels), label=label, pad=0.01)


def _save(figure: Any, path: Path) -> Path:
    """Write at once: the picture is the old one or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.new")
    figure.savefig(draft, dpi=150, format="png")
    os.replace(draft, path)
    return path
