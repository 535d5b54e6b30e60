"""loss.png of a run: how training and held-out error fell with the rows seen, from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jaxdict.plots import available, save
from jaxdict.runs.folder import METRICS, PLOT, read_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _RED, _GREEN, _GREY, _DARK = "#1f77b4", "#d62728", "#2ca02c", "#7f7f7f", "#444444"

Line = dict[str, Any]


def plot(out: Path, title: str, draw: Callable[[Axes, Axes, list[Line]], None]) -> Path | None:
    """Draw a run's loss.png from its metrics.jsonl.

    Args:
        out: the run's folder.
        title: above the plot.
        draw: what to draw, `sae` or `itda`.

    Returns:
        The picture's path, or None when matplotlib is not installed.
    """
    if not available():
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.set(yscale="log", title=title)
    axes.grid(alpha=0.3, which="both")
    draw(axes, axes.twinx(), read_lines(out / METRICS))
    return save(figure, out / PLOT)


def sae(axes: Axes, right: Axes, lines: list[Line]) -> None:
    """Of an autoencoder: training loss and held-out FVU; on the right the dead share."""
    train = _of_kind("train", lines)
    rows = [line["rows"] for line in train]
    axes.plot(rows, [line["loss"] for line in train], lw=1, color=_BLUE, label="training loss")
    _plot_heldout(axes, lines, size=3)
    axes.set(xlabel="training rows", ylabel="share of variance left")
    right.plot(rows, [line["dead"] for line in train], lw=1, color=_GREY, label="dead features")
    right.set(ylabel="dead share", ylim=(0, 1))
    _legend(axes, right, "upper right")


def itda(axes: Axes, right: Axes, lines: list[Line]) -> None:
    """Of an ITDA run's last trial: FVU of new rows and held-out FVU; on the right the atoms."""
    ends = [line["step"] for line in _of_kind("trial", lines)]
    start = ends[-2] if len(ends) > 1 else 0
    lines = [line for line in lines if line["step"] > start]
    train = _of_kind("train", lines)
    rows = [line["rows"] for line in train]
    label = "mean row FVU, new rows"
    axes.plot(rows, [line["fvu"] for line in train], lw=1, color=_BLUE, label=label)
    _plot_heldout(axes, lines, size=4)
    if train:
        axes.axhline(train[-1]["threshold"], lw=0.8, color=_DARK, ls=":", label="threshold")
    axes.set(xlabel="training rows seen", ylabel="share unexplained")
    right.plot(rows, [line["atoms"] for line in train], lw=1.5, color=_GREEN, label="atoms")
    right.set(ylabel="atoms", ylim=(0, None))
    _legend(axes, right, "center right")


def _of_kind(kind: str, lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _plot_heldout(axes: Axes, lines: list[Line], *, size: float) -> None:
    """Held-out FVU in both spaces, with markers of `size` points; lines without it are skipped."""
    held = [line for line in _of_kind("heldout", lines) if "fvu" in line]
    rows = [line["rows"] for line in held]
    for key, space, colour in (("fvu_normalized", "normalized", _BLUE), ("fvu", "raw", _RED)):
        values, label = [line[key] for line in held], f"held-out FVU, {space}"
        axes.plot(rows, values, marker="o", ms=size, ls="--", color=colour, label=label)


def _legend(axes: Axes, right: Axes, place: Literal["upper right", "center right"]) -> None:
    """One legend for the lines of both axes."""
    handles = [*axes.get_legend_handles_labels()[0], *right.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, fontsize=8, loc=place)
