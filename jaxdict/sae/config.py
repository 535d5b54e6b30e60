"""Settings of `jaxdict train sae`. Imports neither torch nor jax, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro.conf

from harvest.flags import at_least, expect, one_of
from jaxdict.dictionary import ENCODER_KINDS as KINDS
from jaxdict.flags import NORMALIZATIONS, captured_steps

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
class TrainSAEConfig:
    """Train sparse autoencoders on sites of an activation store: one, or many in one pass.

    Several sites (a glob) give a dictionary each, a --sweep one for each combination of values; all are
    trained side by side from rows that are read once, and each gets a run folder of its own in --out.
    """

    EXAMPLE: ClassVar[str] = (
        "jaxdict train sae --store runs/store --site double.2.img --atoms 1024 --k 16 "
        "--rows 3000000 --out runs/sae\n"
        "  jaxdict train sae --store runs/store --site 'double.*.img' --kind batchtopk "
        "--sweep lr=5e-4,1e-3,2e-3 k=8,16 --out runs/sweep\n"
        "  jaxdict train sae --preset flux-paper --store runs/flux --site double.18.img --out runs/paper"
    )

    store: Path
    """Activation store to train on (a folder written by `jaxdict harvest`)."""
    site: str
    """Site in the store whose rows are learned, e.g. double.2.img; or a glob or names with commas
    between them, e.g. 'double.*.img', for a dictionary of each."""
    out: Path
    """Folder of the run: config, metrics, checkpoints, loss plot."""
    preset: Literal["none", "flux-paper"] = "none"
    """Settings to start from, which other flags change: flux-paper is the recipe of arXiv 2505.24360
    (see `jaxdict train sae --preset flux-paper --help`). It is applied on the command line only: in Python
    set the fields, as in TrainSAEConfig(**PRESETS["flux-paper"], store=..., site=..., out=...)."""
    target: str = ""
    """Site whose rows are to be predicted, for a transcoder; empty means the rows themselves."""
    kind: Annotated[str, _KIND] = "topk"
    atoms: int = 0
    """Dictionary size m, in atoms; 0 means 8 times the width of the site."""
    k: int = 32
    """Active atoms per row: of topk exactly, of batchtopk and matryoshka on average, of jumprelu the aim of
    its penalty, of relu a unit of its penalty."""
    slots: int = 0
    """Active atoms that a row may have at most while training; 0 means as many as the kind wants: k where
    every row has k (topk), 2 k where a batch shares them (batchtopk, matryoshka), else 4 k."""
    rows: int = 10_000_000
    """Training rows seen in all, over as many epochs as it takes (rounded up to whole batches)."""
    batch: int = 1024
    """Rows in one optimizer step."""
    seed: int = 0
    """Seed of the initial weights and, unless --order-seed is given, of the order of the rows."""
    order_seed: int = -1
    """Seed of the order of the rows; -1 means --seed."""
    sweep: tuple[str, ...] = ()
    """Values to try together, such as lr=1e-4,2e-4 k=16,32 seed=0,1: every combination is trained, in one pass
    over the rows. Those that differ in lr, aux, sparsity or seed alone share one compiled step."""
    steps: tuple[int, ...] = ()
    """Denoising steps to train on (indices into the store's captured steps); empty means all."""
    normalize: Literal["none", "rms", "standardize", "whiten"] = "standardize"
    """Fixed map before the autoencoder: none, rms (one scale), standardize (per dimension) or
    whiten (PCA)."""
    fit_rows: int = 1_000_000
    """Training rows (whole images, evenly spread) that fit the normalization; 0 means all."""
    eigenvalue_floor: float = 1e-6
    """Variances (whitening: eigenvalues) below this share of their mean count as that share."""
    init: Literal["random", "rows"] = "random"
    """First atoms: random directions, or centred training rows drawn at random."""
    encoder_scale: float = 0.25
    """The encoder starts as the atoms' transpose times this; 1 is usual, a quarter gave lower errors in trials."""
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
    sparsity: float = 0.0
    """Weight of the sparsity penalty of a kind that has one; 0 means the kind's own: 0.3 for jumprelu, 1 for relu."""
    penalty: Literal["target", "l0", "tanh"] = "target"
    """Penalty of jumprelu: target (squared distance of L0 from k, in units of k), l0 (L0 / k), or tanh
    (a smooth L0 / k that also shrinks activations)."""
    bandwidth: float = 0.5
    """Width of the kernel that gives jumprelu's thresholds a gradient, as a share of each threshold."""
    ramp: float = 0.1
    """Share of the run, at its start, over which the sparsity penalty rises from 0."""
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
    precision: Literal["float32", "bfloat16"] = "float32"
    """Multiply by the encoder in float32, or in bfloat16 with float32 sums (weights stay float32)."""
    recall: float = 0.0
    """Share of the largest activations to find on an accelerator, e.g. 0.95 for an approximate and faster
    selection; 0 means all of them, exactly."""
    mesh: str = "auto"
    """Devices to use, such as data=4,features=2 (rows split in 4, atoms in 2); auto splits the rows over
    all devices of all processes."""
    coordinator: str = ""
    """Address and port of process 0, to join several processes; auto finds it from Slurm, MPI or a cloud."""
    processes: int = 0
    """How many processes there are, with --coordinator."""
    process: int = -1
    """Number of this process, from 0, with --coordinator."""
    pool: int = 262_144
    """Rows shuffled together at a time; they come from images drawn at random."""
    memory: float = 4.0
    """Training rows that take at most this many GiB in bfloat16 are kept in memory; else they are
    read in blocks. Changes nothing about the order."""
    eval_rows: int = 32_768
    """Held-out rows (whole images of the validation split) measured while training."""
    eval_every: int = 1000
    """Optimizer steps between two held-out measurements."""
    log_every: int = 50
    """Optimizer steps between two lines of metrics.jsonl."""
    save_every: int = 1000
    """Optimizer steps between two checkpoints."""
    keep: int = 2
    """Newest checkpoints that are kept, beside the best one by held-out FVU."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Send the numbers of metrics.jsonl to TensorBoard (files in the run's folder) or Weights & Biases too."""
    resume: bool = False
    """Go on from the newest checkpoint in --out; other settings or another store are refused."""

    def __post_init__(self) -> None:
        """Check every field that can be checked without the store."""
        one_of(self, "preset", tuple(PRESETS))
        one_of(self, "kind", KINDS)
        one_of(self, "normalize", NORMALIZATIONS)
        one_of(self, "penalty", PENALTIES)
        one_of(self, "init", ("random", "rows"))
        one_of(self, "aux_form", ("residual", "variance"))
        one_of(self, "precision", ("float32", "bfloat16"))
        one_of(self, "tracker", ("none", "tensorboard", "wandb"))
        expect(bool(self.site), "site", "a site name", self.site, "see `jaxdict inspect STORE`")
        counts = ("k", "batch", "dead_rows", "pool", "eval_rows", "keep")
        at_least(self, 1, counts, "a whole number of at least 1")
        at_least(self, 1, ("eval_every", "log_every", "save_every"), "at least 1 optimizer step")
        amounts = ("atoms", "slots", "seed", "fit_rows", "lr", "clip", "warmup", "aux", "aux_k")
        at_least(self, 0, (*amounts, "memory", "sparsity", "resample"), "a number of at least 0")
        at_least(self, -1, ("order_seed", "process"), "a number of at least -1")
        for name in ("b1", "b2", "ema"):
            value = getattr(self, name)
            expect(0 <= value < 1, name, "a decay in [0, 1)", value, "lower it")
        scale = self.encoder_scale
        expect(scale > 0, "encoder_scale", "a number above 0", scale, "use 0.25")
        expect(self.eps > 0, "eps", "a number above 0", self.eps, "use 1e-8")
        for name, usual in (("decay", 0.2), ("ramp", 0.1)):
            value = getattr(self, name)
            expect(0 <= value <= 1, name, "a share in [0, 1]", value, f"use {usual}")
        expect(0 <= self.recall < 1, "recall", "a share in [0, 1)", self.recall, "use 0 or 0.95")
        for name, usual in (("eigenvalue_floor", 1e-6), ("bandwidth", 0.5)):
            value = getattr(self, name)
            expect(0 < value < 1, name, "a share in (0, 1)", value, f"use {usual}")
        expect(
            self.rows >= self.batch,
            "rows",
            f"at least one batch ({self.batch})",
            self.rows,
            "raise --rows or lower --batch",
        )
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
        expect(
            not self.coordinator
            or self.coordinator == "auto"
            or (self.processes > 0 and 0 <= self.process < self.processes),
            "coordinator",
            "--processes and --process beside it",
            f"{self.processes} and {self.process}",
            "give all three, or --coordinator auto",
        )
        captured_steps(self)
