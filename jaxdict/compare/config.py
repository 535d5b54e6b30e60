"""Settings of `jaxdict compare`. Imports neither torch nor jax, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro.conf

from harvest.flags import Place, at_least, expand_home, expect, one_of

GROUPINGS = ("store", "seed", "folder")
PARTS = ("image", "prompt", "step", "token")


@dataclass(frozen=True)
class CompareConfig:
    """Compare ITDA dictionaries by where their atoms came from, and layers by their rows.

    Every atom is labelled by its source: image (prompt and seed), step and token. Two dictionaries
    are as similar as their sets of sources, J(A, B) = |A and B| / |A or B|. With --store, linear CKA
    and SVCCA of the sites' rows stand beside it. Where the dictionaries form groups (models,
    quantizations, seeds), each one is matched with the most similar one of every other group.
    """

    EXAMPLE: ClassVar[str] = (
        "jaxdict compare runs/plain/* runs/nf4/* --store runs/store runs/store-nf4 --out runs/compare"
    )

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Exported ITDA dictionaries, ITDA runs, or folders that hold some of them."""
    out: Path
    """Folder to write: compare.json and heat maps (PNG)."""
    by: tuple[Literal["image", "prompt", "step", "token"], ...] = ("image", "step", "token")
    """Parts of a source that have to be the same; prompt is the image whatever its seed. Leave out
    step to compare dictionaries of different steps, or token for those of different streams."""
    groups: Literal["auto", "none", "store", "seed", "folder"] = "auto"
    """What tells groups apart: the store (so the model or its quantization), the seed of the ITDA
    run, or the folder that holds them. auto takes the first of these by which no group has a site
    twice."""
    store: tuple[Place, ...] = ()
    """Stores that the dictionaries were built from, folders or URLs, of the same prompts: measure
    CKA and SVCCA on their rows."""
    split: Literal["validation", "train", "all"] = "all"
    """Images whose rows CKA and SVCCA are measured on."""
    padding: Literal["same", "drop", "keep"] = "same"
    """Rows of the text that are padding, for CKA and SVCCA: drop leaves them out, keep takes them; same leaves them
    out if the training of every dictionary of a text site did."""
    rows: int = 32_768
    """Rows of each site for CKA and SVCCA, at most (whole images, evenly spread); 0 means all."""
    variance: float = 0.99
    """Share of a site's variance that the components kept by SVCCA hold, in (0, 1]."""
    standardize: bool = False
    """Divide each dimension by its standard deviation before CKA and SVCCA, so that a few wide
    dimensions do not decide."""
    plots: bool = True
    """Also draw heat maps (needs matplotlib)."""
    memory_mb: int = 1024
    """Memory, in MB, for the covariances that are summed at a time; fewer at a time means that the
    rows are read more often."""
    verify: bool = True
    """Whether what is read of dictionaries and runs has to have the hashes written with it; --no-verify reads it
    as it is."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without the dictionaries."""
        expand_home(self)
        got = tuple(map(str, self.paths))
        expect(bool(got), "paths", "at least one folder", got, "name ITDA dictionaries")
        expect(self.out.suffix != ".json", "out", "a folder", str(self.out), "leave out .json")
        known = bool(self.by) and set(self.by) <= set(PARTS) and len(set(self.by)) == len(self.by)
        expect(known, "by", f"different ones of {', '.join(PARTS)}", self.by, "name at least one")
        one_of(self, "groups", ("auto", "none", *GROUPINGS))
        expect(all(self.store), "store", "folders or URLs of stores", self.store, "leave out none")
        one_of(self, "padding", ("same", "drop", "keep"))
        one_of(self, "split", ("validation", "train", "all"))
        at_least(self, 0, ["rows"], "a number of at least 0")
        share = 0 < self.variance <= 1
        expect(share, "variance", "a share in (0, 1]", self.variance, "use 0.99")
        at_least(self, 1, ["memory_mb"], "at least 1 MB")
