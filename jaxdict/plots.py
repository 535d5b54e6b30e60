"""What all plots share: whether they can be drawn, their quiet axes, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harvest.atomic import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#8a8f98"
MISSING = "matplotlib is not installed (pip install 'jaxdict[interp]')"
"""Why there is no plot."""


def available() -> bool:
    """Whether matplotlib is installed; without it, what is measured is written all the same."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def quiet(axes: Axes, *, title: int) -> None:
    """A light grid behind the data, two spines, a title of so many points."""
    axes.grid(alpha=0.25, which="major")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.title.set_fontsize(title)


def save(figure: Figure, path: Path, *, dpi: int = 130) -> Path:
    """Write a PNG: the picture there is the old one or the new one, never half of it."""
    with whole_file(path) as draft:
        figure.savefig(draft, dpi=dpi, format="png")
    return path
