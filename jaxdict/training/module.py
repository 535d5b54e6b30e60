"""Runs and their settings as Flax modules.

The functions stand here, not in `jaxdict.sae.SAE`, because reading a run is above the autoencoder's own room.
"""

from __future__ import annotations

from pathlib import Path

from flax import nnx

from jaxdict.rows import to_device
from jaxdict.runs import read_run
from jaxdict.sae import SAE, TrainSAEConfig
from jaxdict.training.saved_run import read_sae
from jaxdict.training.sweep import resolve


def load_sae(run: Path | str, *, checkpoint: str = "newest") -> SAE:
    """The autoencoder that `jaxdict train sae` trained; it acts on raw rows, through the run's normalization.

    Args:
        run: folder of one dictionary's run.
        checkpoint: newest, or best by held-out FVU.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the run of an ITDA, of several dictionaries, or without such a checkpoint.
    """
    run = Path(run)
    description = read_run(run)
    if description.get("kind") == "itda":
        raise ValueError(
            f"expected a run of `jaxdict train sae`, got {run}, an ITDA, which has no encoder; "
            "export it and use jaxdict.encode"
        )
    trained = read_sae(run, description, checkpoint=checkpoint)
    site, target = trained.normalizations
    return SAE.from_params(
        trained.params,
        trained.slots,
        kind=trained.config.model.kind,
        normalizer=to_device(site),
        target_normalizer=None if target is None else to_device(target),
    )


def initial_sae(config: TrainSAEConfig, d: int, *, d_out: int | None = None, rngs: nnx.Rngs) -> SAE:
    """An untrained autoencoder of the kind and size that settings ask for.

    Args:
        config: settings of `jaxdict train sae`.
        d: width of a row.
        d_out: width of the rows that a transcoder rebuilds; None for an autoencoder.
        rngs: Flax's random streams; `params` is used.

    Raises:
        ValueError: k is above m.
    """
    resolved, kind = resolve(config, d), config.model.kind
    sae = SAE(d=d, m=resolved.m, k=resolved.slots, kind=kind, d_out=d_out, rngs=rngs)
    sae.encoder[...] = config.model.encoder_scale * sae.encoder[...]
    return sae
