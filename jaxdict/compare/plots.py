"""Heat maps of similarities: all dictionaries, group against group, and the groups themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxdict.compare.comparison import Comparison
from jaxdict.plots import available, save
from jaxdict.tables import some

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_WRITTEN = 10
"""Dictionaries up to which numbers are written into the cells."""
_MOST_TICKS = 24
_LETTER = 0.085
"""Inches that a letter of a name takes, at most."""
_WRONG = "#d62728"


def draw(out: Path, found: Comparison, *, titles: Mapping[str, str]) -> list[Path] | None:
    """Draw the heat maps, a panel a measure.

    Args:
        out: folder.
        found: the comparison.
        titles: measure -> its title.

    Returns:
        The pictures: similarity.png; matching.png of two groups, or matching-1-2.png and so on of
        several; groups.png of three groups or more. None without matplotlib.
    """
    if not available():
        return None
    panels = {titles[name]: values for name, values in found.measures.items()}
    groups = found.groups
    pictures = [save(_draw_all(panels, found), out / "similarity.png")]
    pairs = list(combinations(range(len(groups.names)), 2))
    for a, b in pairs:
        name = "matching.png" if len(pairs) == 1 else f"matching-{a + 1}-{b + 1}.png"
        pictures.append(save(_draw_pair(panels, found, a, b), out / name))
    if len(groups.names) > 2:
        panels = {titles[name]: values for name, values in found.between.items()}
        title = "Groups: mean similarity at the same site"
        figure = _draw_square(panels, groups.names, title)
        pictures.append(save(figure, out / "groups.png"))
    return pictures


def _draw_all(panels: Mapping[str, np.ndarray], found: Comparison) -> Figure:
    """Each dictionary against each, with white lines between groups."""
    figure = _draw_square(panels, found.names, "Similarity of ITDA dictionaries")
    for axes in figure.axes[: len(panels)]:
        for edge in np.flatnonzero(np.diff(found.groups.of)) + 1:
            axes.axhline(edge - 0.5, color="white", lw=1.5)
            axes.axvline(edge - 0.5, color="white", lw=1.5)
    return figure


def _draw_square(panels: Mapping[str, np.ndarray], names: Sequence[str], title: str) -> Figure:
    """Each name against each; the diagonal does not decide the colours."""
    figure = _figure(panels, names, names, title)
    for axes, values in zip(figure.axes, panels.values(), strict=True):
        off = np.where(np.eye(len(names), dtype=bool), np.nan, values)
        _map(axes, values, _highest(off), names, names)
    return figure


def _draw_pair(panels: Mapping[str, np.ndarray], found: Comparison, a: int, b: int) -> Figure:
    """The dictionaries of one group against those of another."""
    groups, sites = found.groups, found.sites
    rows, columns = (np.flatnonzero(groups.of == group) for group in (a, b))
    title = f"{groups.names[a]} (rows) and {groups.names[b]} (columns)"
    y, x = ([sites[i] for i in chosen.tolist()] for chosen in (rows, columns))
    figure = _figure(panels, y, x, title)
    for axes, values in zip(figure.axes, panels.values(), strict=True):
        part = values[np.ix_(rows, columns)]
        _map(axes, part, _highest(part), y, x)
        _mark_best(axes, part, y, x)
    figure.supxlabel(
        "framed: the most similar of the row (red: another site)", fontsize=9, color="#555555"
    )
    return figure


def _highest(values: np.ndarray) -> float:
    """Upper end of the colour scale: the largest value, or 1 if all are equal."""
    known = values[np.isfinite(values)]
    apart = known.size and np.ptp(known) > 1e-6 and known.max() > 0
    return float(known.max()) if apart else 1.0


def _figure(
    measures: Mapping[str, np.ndarray], rows: Sequence[str], columns: Sequence[str], title: str
) -> Figure:
    """A row of panels with titles, and room for the names of rows and columns."""
    from matplotlib.figure import Figure

    width, height = (float(np.clip(0.42 * len(names), 2.6, 8)) for names in (columns, rows))
    beside, below = (_LETTER * max(map(len, names)) for names in (rows, columns))
    size = (len(measures) * (width + beside + 1.2), height + below + 1.4)
    figure = Figure(figsize=size, layout="compressed")
    figure.suptitle(title, fontsize=12)
    panels = figure.subplots(1, len(measures), squeeze=False)[0]
    for axes, name in zip(panels, measures, strict=True):
        axes.set_title(name, fontsize=11)
    return figure


def _map(
    axes: Axes, values: np.ndarray, highest: float, rows: Sequence[str], columns: Sequence[str]
) -> None:
    """One heat map with its colour bar; what has no value stays white."""
    image = axes.imshow(values, vmin=0, vmax=highest, cmap="viridis", aspect="equal")
    figure: Any = axes.figure
    over = bool((values[np.isfinite(values)] > highest * (1 + 1e-9)).any())
    figure.colorbar(image, ax=axes, shrink=0.8, pad=0.02, extend="max" if over else "neither")
    x, y = some(len(columns), _MOST_TICKS), some(len(rows), _MOST_TICKS)
    axes.set_xticks(x, [columns[i] for i in x], fontsize=8, rotation=90)
    axes.set_yticks(y, [rows[i] for i in y], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if max(values.shape) > _MOST_WRITTEN:
        return
    for i, j in np.argwhere(np.isfinite(values)):
        dark = values[i, j] < 0.6 * highest
        text = f"{values[i, j]:.2f}".replace("0.", ".", 1) if values[i, j] < 0.995 else "1"
        colour = "white" if dark else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color=colour)


def _mark_best(axes: Axes, values: np.ndarray, rows: Sequence[str], columns: Sequence[str]) -> None:
    """A frame around the most similar cell of each row, red where it is of another site."""
    from matplotlib.patches import Rectangle

    for i, row in enumerate(values):
        if not np.isfinite(row).any():
            continue
        j = int(np.nanargmax(row))
        right = rows[i] == columns[j]
        axes.add_patch(
            Rectangle(
                (j - 0.45, i - 0.45), 0.9, 0.9, fill=False, lw=1.8, ec="white" if right else _WRONG
            )
        )
