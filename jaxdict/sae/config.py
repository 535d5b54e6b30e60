"""Settings of `jaxdict train sae`. Imports neither torch nor jax, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro.conf

from harvest.flags import (
    above_median,
    at_least,
    at_most,
    captured_steps,
    expand_home,
    expect,
    one_of,
)
from jaxdict.dictionary import ENCODER_KINDS as KINDS
from jaxdict.flags import ABSENT, FREE_ON_RESUME, MAY_GROW, NORMALIZATIONS, NOT_SWEPT, Grouped

PENALTIES = ("target", "l0", "tanh")
PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "flux-paper": {
        "kind": "topk",
        "atoms": 65_536,
        "k": 64,
        "rows": 30_000 * 1024,
        "batch": 1024,
        "normalize": "whiten",
        "lr": 2e-4,
        "encoder_scale": 1.0,
        "b1": 0.0,
        "b2": 0.99,
        "eps": 1e-10,
        "clip": 10.0,
        "warmup": 50,
        "decay": 0.0,
        "ema": 0.995,
        "aux": 0.0,
    },
}
_KIND = tyro.conf.arg(
    metavar="{" + ",".join(KINDS) + "}",
    help="Kind of autoencoder, by what it keeps of a row. "
    + "; ".join(f"{name}: {kind.keeps}" for name, kind in KINDS.items())
    + ".",
)


@dataclass(frozen=True)
class ModelConfig:
    """The autoencoder: its kind, its size, its first weights."""

    kind: Annotated[str, _KIND] = "topk"
    atoms: int = 0
    """Dictionary size m, in atoms; 0 means 8 times the width of the site."""
    k: int = 32
    """Active atoms per row: of topk exactly, of batchtopk and matryoshka on average, of jumprelu the aim of
    its penalty, of relu a unit of its penalty."""
    slots: int = 0
    """Active atoms that a row may have at most while training; 0 means as many as the kind wants: k where
    every row has k (topk), 2 k where a batch shares them (batchtopk, matryoshka), else 4 k."""
    init: Literal["random", "rows"] = "random"
    """First atoms: random directions, or centred training rows drawn at random."""
    init_from: Path | None = field(default=None, metadata={**NOT_SWEPT, ABSENT: None})
    """Dictionary to start from in place of --init: an exported one, or a run of train sae. Its atoms and widths are
    taken over (leave out --atoms); --kind, --k and --normalize may be others."""
    encoder_scale: float = 0.25
    """The encoder starts as the atoms' transpose times this; 1 is usual, a quarter gave lower errors in trials."""

    def check(self) -> None:
        """Check each field on its own."""
        one_of(self, "kind", KINDS)
        one_of(self, "init", ("random", "rows"))
        at_least(self, 1, ("k",), "a whole number of at least 1")
        at_least(self, 0, ("atoms", "slots"), "a number of at least 0")
        scale = self.encoder_scale
        expect(scale > 0, "encoder_scale", "a number above 0", scale, "use 0.25")
        expect(
            not self.atoms or self.k <= self.atoms,
            "k",
            f"at most the number of atoms ({self.atoms})",
            self.k,
            "lower --k or raise --atoms",
        )
        expect(
            not self.slots or self.slots >= self.k,
            "slots",
            f"0 or at least k ({self.k})",
            self.slots,
            "raise --slots",
        )


@dataclass(frozen=True)
class DataConfig:
    """Training rows: how many, in which order, normalized how."""

    steps: tuple[int, ...] = field(default=(), metadata=NOT_SWEPT)
    """Captured steps to train on, by index: 1 is the second one of the store, whichever denoising step that
    is (both are printed); empty means all."""
    max_norm: float = field(default=0.0, metadata={**NOT_SWEPT, ABSENT: 0.0})
    """Leave rows out of fitting whose norm is above this many times the median one, in normalization and training;
    they are counted, and measured like all others. 0 leaves none out."""
    padding: Literal["drop", "keep"] = field(default="drop", metadata={**NOT_SWEPT, ABSENT: "keep"})
    """Rows of the text that are padding: drop leaves them out, here and wherever the dictionary is measured, keep
    takes them. Rows of the image have none."""
    rows: int = field(default=10_000_000, metadata=MAY_GROW)
    """Training rows seen in all, over as many epochs as it takes (rounded up to whole batches). With --resume a
    larger number goes on, a finished run too."""
    batch: int = field(default=1024, metadata=NOT_SWEPT)
    """Rows in one optimizer step."""
    order_seed: int = field(default=-1, metadata=NOT_SWEPT)
    """Seed of the order of the rows; -1 means --seed."""
    pool: int = field(default=262_144, metadata=NOT_SWEPT)
    """Rows shuffled together at a time; they come from images drawn at random."""
    memory: float = field(default=4.0, metadata=FREE_ON_RESUME)
    """Training rows that take at most this many GiB in bfloat16 are kept in memory; else they are
    read in blocks. Changes nothing about the order."""
    normalize: Literal["none", "rms", "standardize", "whiten"] = "standardize"
    """Fixed map before the autoencoder: none, rms (one scale), standardize (per dimension) or
    whiten (PCA)."""
    fit_rows: int = field(default=1_000_000, metadata=NOT_SWEPT)
    """Training rows (whole images, evenly spread) that fit the normalization; 0 means all."""
    eigenvalue_floor: float = field(default=1e-6, metadata=NOT_SWEPT)
    """Variances (whitening: eigenvalues) below this share of their mean count as that share."""

    def check(self) -> None:
        """Check each field on its own."""
        one_of(self, "normalize", NORMALIZATIONS)
        one_of(self, "padding", ("drop", "keep"))
        at_least(self, 1, ("batch", "pool"), "a whole number of at least 1")
        at_least(self, 0, ("fit_rows", "memory"), "a number of at least 0")
        at_least(self, -1, ("order_seed",), "a number of at least -1")
        above_median(self)
        floor = self.eigenvalue_floor
        expect(0 < floor < 1, "eigenvalue_floor", "a share in (0, 1)", floor, "use 1e-06")
        batch = f"at least one batch ({self.batch})"
        expect(self.rows >= self.batch, "rows", batch, self.rows, "raise --rows or lower --batch")
        captured_steps(self)


@dataclass(frozen=True)
class OptimizerConfig:
    """Adam, its learning rate's schedule, and the average of the weights."""

    lr: float = 0.0
    """Peak learning rate of Adam; 0 means 2e-3 * sqrt(1024 / m), the usual 1/sqrt(m) rule."""
    b1: float = 0.7
    """Decay of Adam's first moment, in [0, 1)."""
    b2: float = 0.99
    """Decay of Adam's second moment, in [0, 1)."""
    eps: float = 1e-8
    """Adam's epsilon, added to the root of the second moment."""
    clip: float = 1.0
    """Largest global norm of the gradient, of the loss as a share of the variance; 0 means any."""
    warmup: int = 100
    """Optimizer steps of linear warm-up from 0 to the peak learning rate."""
    decay: float = 0.2
    """Share of the run, at its end, over which the learning rate falls linearly to 0."""
    ema: float = 0.0
    """Decay of a moving average of the weights, exported in their place; 0 means none."""

    def check(self) -> None:
        """Check each field on its own."""
        at_least(self, 0, ("lr", "clip", "warmup"), "a number of at least 0")
        at_most(self, 2**31 - 1, ["warmup"], "at most 2147483647 optimizer steps")
        for name in ("b1", "b2", "ema"):
            value = getattr(self, name)
            expect(0 <= value < 1, name, "a decay in [0, 1)", value, "lower it")
        expect(self.eps > 0, "eps", "a number above 0", self.eps, "use 1e-8")
        expect(0 <= self.decay <= 1, "decay", "a share in [0, 1]", self.decay, "use 0.2")


@dataclass(frozen=True)
class SparsityPenaltyConfig:
    """The penalty of the kinds whose sparsity is learned."""

    sparsity: float = 0.0
    """Weight of the sparsity penalty of a kind that has one; 0 means the kind's own: 0.3 for jumprelu, 1 for relu."""
    penalty: Literal["target", "l0", "tanh"] = "target"
    """Penalty of jumprelu: target (squared distance of L0 from k, in units of k), l0 (L0 / k), or tanh
    (a smooth L0 / k that also shrinks activations)."""
    bandwidth: float = 0.5
    """Width of the kernel that gives jumprelu's thresholds a gradient, as a share of each threshold."""
    ramp: float = 0.1
    """Share of the run, at its start, over which the sparsity penalty rises from 0."""

    def check(self) -> None:
        """Check each field on its own."""
        one_of(self, "penalty", PENALTIES)
        at_least(self, 0, ("sparsity",), "a number of at least 0")
        expect(0 <= self.ramp <= 1, "ramp", "a share in [0, 1]", self.ramp, "use 0.1")
        width = self.bandwidth
        expect(0 < width < 1, "bandwidth", "a share in (0, 1)", width, "use 0.5")


@dataclass(frozen=True)
class DeadFeaturesConfig:
    """Which features count as dead, and what brings them back."""

    aux: float = 1 / 32
    """Weight of the AuxK loss, which lets dead features rebuild the residual; 0 means none."""
    aux_k: int = 0
    """Dead features a row may use in the AuxK loss; 0 means 2 k, or half the
    width of the site where that is less."""
    aux_form: Literal["residual", "variance"] = "residual"
    """AuxK as a share of the residual (Gao et al.), or of the variance, times the share of its slots
    that there are dead features for (as in sparsify)."""
    dead_rows: int = 200_000
    """Rows without firing after which a feature counts as dead."""
    resample: int = 0
    """Optimizer steps between two resamplings of dead features from badly rebuilt rows (Bricken et al.);
    0 means never."""

    def check(self) -> None:
        """Check each field on its own."""
        one_of(self, "aux_form", ("residual", "variance"))
        at_least(self, 1, ("dead_rows",), "a whole number of at least 1")
        at_most(self, 2**31 - 1, ("dead_rows",), "a number of at most 2147483647")
        at_least(self, 0, ("aux", "aux_k", "resample"), "a number of at least 0")


@dataclass(frozen=True)
class DevicesConfig:
    """Precision, devices and processes."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Multiply by the encoder in float32, or in bfloat16 with float32 sums (weights stay float32)."""
    recall: float = 0.0
    """Share of the largest activations to find on an accelerator, e.g. 0.95 for an approximate and faster
    selection; 0 means all of them, exactly."""
    mesh: str = field(default="auto", metadata=FREE_ON_RESUME)
    """Devices to use, such as data=4,features=2 (rows split in 4, atoms in 2); auto splits the rows over
    all devices of all processes."""
    coordinator: str = field(default="", metadata=FREE_ON_RESUME)
    """Address and port of process 0, to join several processes; auto finds it from Slurm, MPI or a cloud."""
    processes: int = field(default=0, metadata=FREE_ON_RESUME)
    """How many processes there are, with --coordinator."""
    process: int = field(default=-1, metadata=FREE_ON_RESUME)
    """Number of this process, from 0, with --coordinator."""

    def check(self) -> None:
        """Check each field on its own."""
        one_of(self, "precision", ("float32", "bfloat16"))
        expect(0 <= self.recall < 1, "recall", "a share in [0, 1)", self.recall, "use 0 or 0.95")
        at_least(self, -1, ("process",), "a number of at least -1")
        expect(
            not self.coordinator
            or self.coordinator == "auto"
            or (self.processes > 0 and 0 <= self.process < self.processes),
            "coordinator",
            "--processes and --process beside it",
            f"{self.processes} and {self.process}",
            "give all three, or --coordinator auto",
        )


@dataclass(frozen=True)
class RunConfig:
    """What is measured, written and kept while training."""

    eval_rows: int = field(default=32_768, metadata=FREE_ON_RESUME)
    """Held-out rows (whole images of the validation split) measured while training."""
    eval_every: int = field(default=1000, metadata=FREE_ON_RESUME)
    """Optimizer steps between two held-out measurements."""
    log_every: int = field(default=50, metadata=FREE_ON_RESUME)
    """Optimizer steps between two lines of metrics.jsonl."""
    save_every: int = field(default=1000, metadata=FREE_ON_RESUME)
    """Optimizer steps between two checkpoints."""
    keep: int = field(default=2, metadata=FREE_ON_RESUME)
    """Newest checkpoints that are kept, beside the best one by held-out FVU."""
    tracker: Literal["none", "tensorboard", "wandb"] = field(
        default="none", metadata=FREE_ON_RESUME
    )
    """Send the numbers of metrics.jsonl to TensorBoard (files in the run's folder) or Weights & Biases too."""
    resume: bool = field(default=False, metadata=FREE_ON_RESUME)
    """Go on from the newest checkpoint in --out, to as many --rows as before or more; other settings or another
    store are refused."""
    verify: bool = field(default=True, metadata={**FREE_ON_RESUME, ABSENT: True})
    """With --resume, whether the checkpoint has to have the hashes written with it; --no-verify reads it as it is."""

    def check(self) -> None:
        """Check each field on its own."""
        one_of(self, "tracker", ("none", "tensorboard", "wandb"))
        at_least(self, 1, ("eval_rows", "keep"), "a whole number of at least 1")
        at_least(self, 1, ("eval_every", "log_every", "save_every"), "at least 1 optimizer step")


@dataclass(frozen=True)
class TrainSAEConfig(Grouped):
    """Train sparse autoencoders on sites of an activation store: one, or many in one pass.

    Several sites (a glob) give a dictionary each, a --sweep one for each combination of values; all are
    trained side by side from rows that are read once, and each gets a run folder of its own in --out.
    """

    EXAMPLE: ClassVar[str] = (
        "jaxdict train sae --store runs/store --site double.2.img --atoms 1024 --k 16 "
        "--rows 3000000 --out runs/sae\n"
        "  jaxdict train sae --store runs/store --site 'double.*.img' --kind batchtopk "
        "--sweep lr=5e-4,1e-3,2e-3 k=8,16 --out runs/sweep\n"
        "  jaxdict train sae --init-from runs/sae/dictionary --store runs/store --site double.2.img --k 16 "
        "--rows 500000 --out runs/tuned\n"
        "  jaxdict train sae --preset flux-paper --store runs/flux --site double.18.img --out runs/paper"
    )

    store: Path = field(metadata=FREE_ON_RESUME)
    """Activation store to train on (a folder written by `jaxdict harvest`)."""
    site: str = field(metadata=NOT_SWEPT)
    """Site in the store whose rows are learned, e.g. double.2.img; or a glob or names with commas
    between them, e.g. 'double.*.img', for a dictionary of each."""
    out: Path = field(metadata=FREE_ON_RESUME)
    """Folder of the run: config, metrics, checkpoints, loss plot."""
    preset: Literal["none", "flux-paper"] = field(default="none", metadata=FREE_ON_RESUME)
    """Settings to start from, which other flags change: flux-paper is the recipe of arXiv 2505.24360
    (see `jaxdict train sae --preset flux-paper --help`). It is applied on the command line only: in Python
    set the fields, as in TrainSAEConfig.of(**PRESETS["flux-paper"], store=..., site=..., out=...)."""
    target: str = field(default="", metadata=NOT_SWEPT)
    """Site whose rows are to be predicted, for a transcoder; empty means the rows themselves."""
    seed: int = 0
    """Seed of the initial weights and, unless --order-seed is given, of the order of the rows."""
    sweep: tuple[str, ...] = field(default=(), metadata=NOT_SWEPT)
    """Values to try together, such as lr=1e-4,2e-4 k=16,32 seed=0,1: every combination is trained, in one pass
    over the rows. Those that differ in lr, aux, sparsity or seed alone share one compiled step."""
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    sparsity_penalty: SparsityPenaltyConfig = SparsityPenaltyConfig()
    dead_features: DeadFeaturesConfig = DeadFeaturesConfig()
    devices: DevicesConfig = DevicesConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        """Check all that can be checked without the store."""
        expand_home(self)
        one_of(self, "preset", tuple(PRESETS))
        expect(bool(self.site), "site", "a site name", self.site, "see `jaxdict inspect STORE`")
        at_least(self, 0, ("seed",), "a number of at least 0")
        at_most(self, 2**63 - 1, ("seed",), "a number below 2^63")
        rows_and_model = (self.data, self.model, self.optimizer, self.sparsity_penalty)
        for group in (*rows_and_model, self.dead_features, self.devices, self.run):
            group.check()
