"""Settings of `jaxdict inspect`. Imports neither torch nor jax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro.conf

from harvest.flags import Place, at_least, expand_home, expect, one_of


@dataclass(frozen=True)
class InspectConfig:
    """Show what an activation store, a run or a dictionary holds.

    A store's table comes from its headers and statistics, without reading activations, and is quick.
    --spectrum and --plot read --rows rows of each site; --verify and --compare read everything.
    """

    EXAMPLE: ClassVar[str] = "jaxdict inspect runs/store --plot runs/store-plots"

    path: tyro.conf.Positional[Place]
    """What to look into: the folder or URL of an activation store, a run or a dictionary."""
    sites: tuple[str, ...] = ()
    """Sites of the store to show, names or globs such as 'double.*.img'; empty means all."""
    spectrum: bool = False
    """Show how much of each site's variance the first principal components hold."""
    rows: int = 20_000
    """Rows of each site that the spectrum, or the use of atoms, is taken from, evenly spread over images."""
    padding: Literal["drop", "keep"] = "drop"
    """Rows of the text that are padding, for the spectrum: drop leaves them out, keep takes them. A store's table
    has them all."""
    verify: bool = False
    """Read the whole store and test checksums, done flags, missing parts, NaN and statistics; the
    exit status is not zero if anything is wrong."""
    compare: Place = ""
    """Another store of the same prompts, seeds, sites and steps, such as a quantized one: show the
    relative error and the cosine of its activations against those of the first."""
    images: int = 0
    """Finished images that --compare reads, evenly spread; 0 means all."""
    plot: Path | None = None
    """Folder for plots (PNG). Of a store: norms through the blocks by step, spectrum by site. Of an ITDA
    dictionary: the pictures that its most used atoms came from."""
    out: Path | None = None
    """JSON file for everything that is shown."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without looking."""
        expand_home(self)
        expect(bool(self.path), "path", "a folder or a URL", self.path, "name one")
        one_of(self, "padding", ("drop", "keep"))
        at_least(self, 2, ["rows"], "at least 2 rows")
        at_least(self, 0, ["images"], "a number of at least 0")
        expect(all(self.sites), "sites", "names or globs of sites", self.sites, "leave out none")
