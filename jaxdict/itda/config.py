"""Settings of `jaxdict train itda`. Imports neither torch nor jax."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from harvest.flags import above_median, at_least, captured_steps, expand_home, expect, one_of
from jaxdict.flags import ABSENT, FREE_ON_RESUME, NORMALIZATIONS


@dataclass(frozen=True)
class TrainITDAConfig:
    """Build a dictionary out of activations themselves (ITDA) from one site of a store."""

    EXAMPLE: ClassVar[str] = (
        "jaxdict train itda --store runs/store --site double.2.img --k 16 --atoms 512 --out runs/itda"
    )

    store: Path = field(metadata=FREE_ON_RESUME)
    """Activation store to build from (a folder written by `jaxdict harvest`)."""
    site: str
    """Site in the store whose rows are decomposed, e.g. double.2.img."""
    out: Path = field(metadata=FREE_ON_RESUME)
    """Folder of the run: config, metrics, checkpoints, atoms, plot."""
    k: int = 32
    """Active atoms per row: steps of gradient pursuit."""
    threshold: float = 0.0
    """A row joins as an atom when more than this share of its squared norm (per-row FVU, in normalized
    space) is left unexplained; in (0, 1], where 1 means that nothing is explained. The paper used 0.1 to
    0.6. Give this or --atoms."""
    atoms: int = 0
    """Dictionary size m to reach, never more: the threshold is searched for, by whole builds."""
    rule: Literal["cover", "worst", "plain"] = "cover"
    """Which rows above the threshold join: cover takes first the one that explains most of what the batch
    has left, worst the one of which most is left, and both skip rows that an atom just added explains; plain
    takes all (the papers' rule). All leave out near-duplicates."""
    target: str = ""
    """Site whose rows are to be rebuilt, for a transcoder; empty means the rows themselves. Rows then join
    by the FVU of their target."""
    rows: int = 1_000_000
    """Training rows to look at, each once, at most (drawn at random); 0 means every training row."""
    batch: int = 2048
    """Rows encoded at a time, before any of them joins: cover and worst choose among more in a larger one."""
    seed: int = 0
    """Seed of the order of the rows."""
    steps: tuple[int, ...] = ()
    """Captured steps to use, by index: 1 is the second one of the store, whichever denoising step that is
    (both are printed); empty means all."""
    max_norm: float = field(default=0.0, metadata={ABSENT: 0.0})
    """Leave rows out of fitting whose norm is above this many times the median one, in normalization and training;
    they are counted, and measured like all others. 0 leaves none out."""
    padding: Literal["drop", "keep"] = field(default="drop", metadata={ABSENT: "keep"})
    """Rows of the text that are padding: drop leaves them out, here and wherever the dictionary is measured, keep
    takes them. Rows of the image have none."""
    normalize: Literal["none", "rms", "standardize", "whiten"] = "standardize"
    """Fixed map applied before pursuit; the exported dictionary keeps it."""
    fit_rows: int = 1_000_000
    """Training rows (whole images, evenly spread) that fit the normalization; 0 means every one."""
    eigenvalue_floor: float = 1e-6
    """Whitening and standardizing treat variances below this share of the mean variance as that share."""
    duplicate: float = 0.99
    """A row whose cosine with an atom just added from its batch is above this is a duplicate of it."""
    pool: int = 262_144
    """Rows shuffled together at a time; they come from images drawn at random over the training split."""
    eval_rows: int = field(default=32_768, metadata=FREE_ON_RESUME)
    """Held-out rows (whole images of the validation split) measured, and training rows that give
    each atom its typical activation."""
    eval_every: int = field(default=500, metadata=FREE_ON_RESUME)
    """Batches between two held-out measurements; one more is made at the end."""
    log_every: int = field(default=5, metadata=FREE_ON_RESUME)
    """Batches between two lines of metrics.jsonl."""
    save_every: int = field(default=200, metadata=FREE_ON_RESUME)
    """Batches between two checkpoints."""
    keep: int = field(default=2, metadata=FREE_ON_RESUME)
    """Newest checkpoints that are kept."""
    resume: bool = field(default=False, metadata=FREE_ON_RESUME)
    """Go on from the newest checkpoint in --out (a run with other settings or another store is refused)."""
    verify: bool = field(default=True, metadata={**FREE_ON_RESUME, ABSENT: True})
    """With --resume, whether the checkpoint has to have the hashes written with it; --no-verify reads it as it is."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without the store."""
        expand_home(self)
        one_of(self, "normalize", NORMALIZATIONS)
        one_of(self, "padding", ("drop", "keep"))
        one_of(self, "rule", ("cover", "worst", "plain"))
        expect(bool(self.site), "site", "a site name", self.site, "see `jaxdict inspect STORE`")
        counts = ("k", "batch", "pool", "eval_rows", "keep")
        at_least(self, 1, counts, "a whole number of at least 1")
        at_least(self, 1, ("eval_every", "log_every", "save_every"), "at least 1 batch")
        at_least(self, 0, ("atoms", "rows", "seed", "fit_rows"), "a number of at least 0")
        if bool(self.threshold) == bool(self.atoms):
            got = f"--threshold {self.threshold} and --atoms {self.atoms}"
            raise ValueError(f"expected --threshold or --atoms, just one of the two, got {got}")
        expect(
            bool(self.atoms) or 0 < self.threshold <= 1,
            "threshold",
            "a share in (0, 1]",
            self.threshold,
            "the paper used 0.1 to 0.6",
        )
        for name in ("eigenvalue_floor", "duplicate"):
            value = getattr(self, name)
            expect(0 < value < 1, name, "a share in (0, 1)", value, "use a value in between")
        above_median(self)
        captured_steps(self)
