"""Settings of `jaxdict export` and `jaxdict prune`. Imports neither torch nor jax."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro.conf

from harvest.flags import at_least, expand_home, expect, one_of

MEMORY_MB = 64
"""Memory, in MB, that what is dense in the atoms may take while rows are encoded."""


@dataclass(frozen=True)
class PruneConfig:
    """Drop and merge atoms of an exported dictionary by their use, and measure what that costs.

    Ask for one or more of --unused, --merge and --keep; they are done in this order. Atoms that stay keep
    their order, sources and labels; the new card's `pruning` tells what was done.
    """

    EXAMPLE: ClassVar[str] = (
        "jaxdict prune runs/itda/dictionary --store runs/store --unused --merge 0.95 --keep 512 "
        "--out runs/itda/small"
    )

    dictionary: tyro.conf.Positional[Path]
    """Exported dictionary of any kind (a folder with dictionary.safetensors and card.json)."""
    store: Path
    """Activation store: training rows tell how much each atom is used, held-out rows what pruning costs."""
    out: Path
    """Folder to write the smaller dictionary to."""
    unused: bool = False
    """Drop atoms that are never active."""
    merge: float = 0.0
    """Cosine in (0, 1) above which two atoms count as one: the one used less is dropped; 0 merges none."""
    keep: int = 0
    """Atoms to keep: those of least energy (sum of value^2 over rows) are dropped; 0 keeps all."""
    rows: int = 200_000
    """Rows (whole images, evenly spread) of each split that are measured, at most; 0 means all."""
    site: str = ""
    """Site of the store; empty means that of the dictionary's card."""
    padding: Literal["same", "drop", "keep"] = "same"
    """Rows of the text that are padding: drop leaves them out, keep takes them; same does as the dictionary's
    training did."""
    verify: bool = True
    """Whether the dictionary has to have the hashes written with it; --no-verify reads it as it is."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without the dictionary."""
        expand_home(self)
        asked = self.unused or self.merge or self.keep
        expect(
            bool(asked), "unused", "--unused, --merge or --keep", "none of them", "say what to drop"
        )
        expect(0 <= self.merge < 1, "merge", "a cosine in (0, 1)", self.merge, "0.95 is usual")
        one_of(self, "padding", ("same", "drop", "keep"))
        at_least(self, 0, ("keep", "rows"), "a number of at least 0")
        same = self.out.resolve() == self.dictionary.resolve()
        expect(
            not same, "out", "another folder than the dictionary's", str(self.out), "name another"
        )


@dataclass(frozen=True)
class ExportConfig:
    """Turn a finished run into a dictionary that acts on raw activations."""

    EXAMPLE: ClassVar[str] = "jaxdict export runs/sae --out runs/sae/dictionary"

    run: tyro.conf.Positional[Path]
    """Folder of a run written by `jaxdict train sae` or `jaxdict train itda`."""
    out: Path
    """Folder to write: dictionary.safetensors and card.json."""
    format: Literal["jaxdict"] = "jaxdict"
    """File format: jaxdict is safetensors beside a JSON card."""
    store: Path | None = None
    """Activation store, when it is no longer where the run's config says."""
    checkpoint: Literal["newest", "best"] = "newest"
    """Weights of an autoencoder to export: the newest, or the best ones kept by held-out FVU."""
    rows: int = 65_536
    """Rows of the store that measure the folding error and each feature's typical activation."""
    verify: bool = True
    """Whether the run has to have the hashes written with it; --no-verify reads it as it is."""

    def __post_init__(self) -> None:
        """Check the sizes and the format."""
        expand_home(self)
        expect(self.format == "jaxdict", "format", "jaxdict", self.format, "use --format jaxdict")
        one_of(self, "checkpoint", ("newest", "best"))
        at_least(self, 1, ["rows"], "at least 1 row")
