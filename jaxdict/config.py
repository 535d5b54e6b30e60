"""Settings of the training room's verbs: one frozen dataclass a verb, checked when it is made.

Imports neither torch nor jax, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import tyro.conf

from jaxdict.config_sae import NORMALIZATIONS
from jaxdict.flags import at_least, captured_steps, expect, one_of


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

    def __post_init__(self) -> None:
        """Check every field that can be checked without the store."""
        expect(
            self.out.suffix != ".png", "out", "a JSON file", str(self.out), "plots lie beside it"
        )
        named = isinstance(self.site, tuple) and all(self.site)
        expect(named, "site", "names or globs of sites", self.site, "leave out none")
        one_of(self, "split", ("validation", "train", "all"))
        one_of(self, "encoder", ("own", "pursuit"))
        expect(self.rows >= 0, "rows", "a number of at least 0", self.rows, "use 0 for all rows")
        at_least(self, 2, ["fit_rows"], "at least 2")
        at_least(self, 0, ["seed"], "a number of at least 0")
        at_least(self, 1, ["batch"], "at least 1 row")
        at_least(self, 1, ["memory_mb"], "at least 1 MB")


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

    def __post_init__(self) -> None:
        """Check the sizes and the format."""
        expect(self.format == "jaxdict", "format", "jaxdict", self.format, "use --format jaxdict")
        one_of(self, "checkpoint", ("newest", "best"))
        at_least(self, 1, ["rows"], "at least 1 row")


@dataclass(frozen=True)
class TrainITDAConfig:
    """Build a dictionary out of activations themselves (ITDA) from one site of a store."""

    EXAMPLE: ClassVar[str] = (
        "jaxdict train itda --store runs/store --site double.2.img --k 16 --atoms 512 --out runs/itda"
    )

    store: Path
    """Activation store to build from (a folder written by `jaxdict harvest`)."""
    site: str
    """Site in the store whose rows are decomposed, e.g. double.2.img."""
    out: Path
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
    """Denoising steps of the store to use (indices into its captured steps); empty means all."""
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
    eval_rows: int = 32_768
    """Held-out rows (whole images of the validation split) measured, and training rows that give
    each atom its typical activation."""
    eval_every: int = 500
    """Batches between two held-out measurements; one more is made at the end."""
    log_every: int = 5
    """Batches between two lines of metrics.jsonl."""
    save_every: int = 200
    """Batches between two checkpoints."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    resume: bool = False
    """Go on from the newest checkpoint in --out (a run with other settings or another store is refused)."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without the store."""
        one_of(self, "normalize", NORMALIZATIONS)
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
        captured_steps(self)


@dataclass(frozen=True)
class InspectConfig:
    """Show what an activation store, a run or a dictionary holds.

    A store's table comes from its headers and statistics, without reading activations, and is quick.
    --spectrum and --plot read --rows rows of each site; --verify and --compare read everything.
    """

    EXAMPLE: ClassVar[str] = "jaxdict inspect runs/store --plot runs/store-plots"

    path: tyro.conf.Positional[str]
    """What to look into: the folder or URL of an activation store, a run or a dictionary."""
    sites: tuple[str, ...] = ()
    """Sites of the store to show, names or globs such as 'double.*.img'; empty means all."""
    spectrum: bool = False
    """Show how much of each site's variance the first principal components hold."""
    rows: int = 20_000
    """Rows of each site that the spectrum, or the use of atoms, is taken from, evenly spread over images."""
    verify: bool = False
    """Read the whole store and test checksums, done flags, missing parts, NaN and statistics; the
    exit status is not zero if anything is wrong."""
    compare: str = ""
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
        expect(bool(self.path), "path", "a folder or a URL", self.path, "name one")
        at_least(self, 2, ["rows"], "at least 2 rows")
        at_least(self, 0, ["images"], "a number of at least 0")
        expect(all(self.sites), "sites", "names or globs of sites", self.sites, "leave out none")
