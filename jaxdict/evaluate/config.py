"""Settings of `jaxdict eval`. Imports neither torch nor jax, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro.conf

from harvest.flags import at_least, expand_home, expect, one_of


@dataclass(frozen=True)
class EvalConfig:
    """Measure an exported dictionary on held-out rows of a store, and baselines on the same rows.

    The plots lie beside the JSON: eval.json gives eval.png, for both streams also eval-img.png and
    eval-txt.png, and for several sites of a stream eval-sites.png.
    """

    EXAMPLE: ClassVar[str] = "jaxdict eval runs/sae/dictionary --store runs/store --out eval.json"

    dictionary: tyro.conf.Positional[Path]
    """Exported dictionary (a folder with dictionary.safetensors and card.json)."""
    store: Path
    """Activation store to measure on."""
    out: Path
    """JSON file to write."""
    site: tuple[str, ...] = ()
    """Sites of the store, names or globs such as 'double.*.img', all of the dictionary's width;
    empty means the site of the dictionary's card."""
    split: Literal["validation", "train", "all"] = "validation"
    """Images to measure on."""
    padding: Literal["same", "drop", "keep"] = "same"
    """Rows of the text that are padding: drop leaves them out, keep takes them; same does as the dictionary's
    training did."""
    encoder: Literal["own", "pursuit"] = "own"
    """own measures the dictionary with its own encoder; pursuit also, side by side, with gradient
    pursuit on its atoms in place of the encoder (inference-time optimization)."""
    rows: int = 65_536
    """Rows to measure on at each site, at most (whole images); 0 means all of the split."""
    fit_rows: int = 200_000
    """Training rows (whole images, evenly spread) that fit the baselines at each site."""
    random: bool = True
    """Also measure a random dictionary of the same size, by gradient pursuit. It takes longest."""
    seed: int = 0
    """Seed of the random dictionary's atoms."""
    plots: bool = True
    """Also draw plots beside the JSON (needs matplotlib)."""
    batch: int = 4096
    """Rows encoded at a time."""
    memory_mb: int = 512
    """Memory, in MB, that what is dense in the atoms may take while encoding a batch."""
    verify: bool = True
    """Whether the dictionary has to have the hashes written with it; --no-verify reads it as it is."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without the store."""
        expand_home(self)
        expect(
            self.out.suffix != ".png", "out", "a JSON file", str(self.out), "plots lie beside it"
        )
        named = isinstance(self.site, tuple) and all(self.site)
        expect(named, "site", "names or globs of sites", self.site, "leave out none")
        one_of(self, "split", ("validation", "train", "all"))
        one_of(self, "padding", ("same", "drop", "keep"))
        one_of(self, "encoder", ("own", "pursuit"))
        expect(self.rows >= 0, "rows", "a number of at least 0", self.rows, "use 0 for all rows")
        at_least(self, 2, ["fit_rows"], "at least 2")
        at_least(self, 0, ["seed"], "a number of at least 0")
        at_least(self, 1, ["batch"], "at least 1 row")
        at_least(self, 1, ["memory_mb"], "at least 1 MB")
