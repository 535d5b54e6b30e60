"""The numbers of a training step: those compiled into it, and those it takes as arguments."""

from __future__ import annotations

from typing import Any, NamedTuple


class ScheduleConfig(NamedTuple):
    """A learning-rate schedule; its peak is in `Hyperparams`.

    Attributes:
        steps: optimizer steps of the whole run.
        warmup: steps of linear warm-up.
        decay: share of the run, at its end, over which the rate falls to 0; 0 for none.
        since: steps that a run had taken when more were asked for.
        share: the rate there, as a share of what the schedule of the larger number has there; below 1 it rises to
            that over `warmup` steps.
    """

    steps: int
    warmup: int
    decay: float
    since: int = 0
    share: float = 1.0


class AdamConfig(NamedTuple):
    """Adam, and the clipping of the gradient before it.

    Attributes:
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment.
        clip: largest global norm of the gradient; 0 for any.
    """

    b1: float
    b2: float
    eps: float
    clip: float


class Execution(NamedTuple):
    """How products and selection are computed, and over which axes of a mesh.

    Attributes:
        data: mesh axis that rows are split over, None for none.
        features: mesh axis that atoms are split over, None for none.
        bfloat16: multiply by the encoder in bfloat16, sums in float32.
        recall: share of the k largest that `jax.lax.approx_max_k` should find; 0 means exactly all.
    """

    data: str | None = None
    features: str | None = None
    bfloat16: bool = False
    recall: float = 0.0


SINGLE_DEVICE = Execution()
"""One device, float32, exact selection."""


class StepConfig(NamedTuple):
    """What is compiled into a training step; equal configs share one compilation.

    Attributes:
        kind: of autoencoder.
        k: active atoms a row: kept by topk, kept on average by batchtopk and matryoshka, and the
            number that the penalty of jumprelu aims at.
        slots: active atoms that a row may have while it trains, at least k.
        k_aux: slots of the AuxK codes; 0 for no such loss.
        aux_form: see `jaxdict.sae.losses.auxk_loss`.
        dead_rows: rows without firing that make a feature dead.
        ema: decay of the moving average of the weights, 0 for none.
        schedule: of the learning rate.
        adam: the optimizer.
        prefixes: sizes of the nested dictionaries of kind matryoshka, ascending, the last one m.
        penalty: form of the sparsity penalty.
        bandwidth: width of the kernel that gives thresholds a gradient.
        ramp: optimizer steps over which the sparsity penalty rises from 0.
        execution: precision, exactness, axes of the mesh.
    """

    kind: str
    k: int
    slots: int
    k_aux: int
    aux_form: str
    dead_rows: int
    ema: float
    schedule: ScheduleConfig
    adam: AdamConfig
    prefixes: tuple[int, ...] = ()
    penalty: str = ""
    bandwidth: float = 0.0
    ramp: int = 0
    execution: Execution = SINGLE_DEVICE


class Hyperparams(NamedTuple):
    """Numbers that a compiled step takes as arguments, so that the members of a sweep can share it.

    Attributes:
        lr: peak learning rate.
        aux: weight of the AuxK loss.
        sparsity: weight of the sparsity penalty.
        variance: total variance of the target's normalized training rows.
    """

    lr: Any
    aux: Any
    sparsity: Any
    variance: Any
