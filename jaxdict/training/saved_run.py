"""A run of `jaxdict train sae` on the disk: its folders are opened here, and its weights read back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from harvest.atomic import write_json
from harvest.store import Store
from jaxdict.flags import flatten, growing, resumable, settings_of, when_absent
from jaxdict.rows import Source, load_normalization, print_padding, source_of, to_device
from jaxdict.runs import (
    CONFIG,
    NORMALIZATION,
    TARGET_NORMALIZATION,
    Checkpoints,
    describe,
    open_run,
    read_run,
)
from jaxdict.sae import SAE, SAEParams, TrainSAEConfig, TrainState
from jaxdict.training import more_rows
from jaxdict.training.batches import Normalizations
from jaxdict.training.initialize import random_state
from jaxdict.training.sweep import Member, resolve


def open_runs(
    config: TrainSAEConfig,
    store: Store,
    members: list[Member],
    *,
    origin: dict[str, Any] | None = None,
) -> bool:
    """Make a run's folders, or check that the run in them can be resumed.

    Args:
        config: of the whole run.
        store: the rows.
        members: what is trained; several have a folder each.
        origin: what is kept of the dictionary that they start from.

    Returns:
        Whether there was a run.
    """
    data = config.data
    sources = [
        source_of(store, one.config.site, steps=data.steps, padding=data.padding) for one in members
    ]
    print_padding(list({source.site: source for source in sources}.values()))
    whole = config if len(members) > 1 else members[0].config
    start = {"init_from": origin} if origin else {}
    first = _description(whole, sources[0], members) | start
    may_differ = resumable(TrainSAEConfig) | growing(TrainSAEConfig)
    found = open_run(
        config.out,
        first,
        resume=config.run.resume,
        may_differ=may_differ,
        absent=when_absent(TrainSAEConfig),
    )
    legs = more_rows.with_more(config.out, config.data.rows) if found else None
    if legs is not None:
        write_json(config.out / CONFIG, more_rows.described(first, legs), hashed=True)
    if len(members) > 1:
        legs = read_run(config.out).get(more_rows.LEGS, [])
        for one, source in zip(members, sources, strict=True):
            one.config.out.mkdir(parents=True, exist_ok=True)
            description = _description(one.config, source, [one]) | start
            description = more_rows.described(description, legs)
            write_json(one.config.out / CONFIG, description, hashed=True)
    return found


def _description(config: TrainSAEConfig, source: Source, members: list[Member]) -> dict[str, Any]:
    resolved = members[0].resolved
    description = describe(
        config,
        source,
        verb="train sae",
        kind=config.model.kind,
        resolved={**resolved._asdict(), "prefixes": list(resolved.prefixes)},
        packages=("jaxdict", "jax", "flax", "optax", "orbax-checkpoint", "numpy"),
    )
    if len(members) > 1:
        description["members"] = [one.name for one in members]
    return description


class Trained(NamedTuple):
    """A run of `train sae`, read back.

    Attributes:
        params: weights to use, averaged where the run averages.
        normalizations: of the rows.
        config: settings.
        slots: active atoms that a row may have.
        step: optimizer steps that the weights have taken.
    """

    params: SAEParams
    normalizations: Normalizations
    config: TrainSAEConfig
    slots: int
    step: int


def read_sae(
    run: Path, description: dict[str, Any], *, checkpoint: str = "newest", verify: bool = True
) -> Trained:
    """Read a run of `train sae`.

    Args:
        run: its folder.
        description: its config.json.
        checkpoint: newest, or best by held-out FVU.
        verify: whether files have to have the hashes that were written into them.

    Raises:
        ValueError: it has no such checkpoint, none with a score where the best is asked for, or it
            holds the runs of several members.
    """
    if "members" in description:
        names = ", ".join(description["members"])
        raise ValueError(
            f"expected the run of one dictionary, got {run}, which holds several ({names}); name "
            "the folder of one in it"
        )
    config = _config_of(run, description)
    names = [NORMALIZATION, *([TARGET_NORMALIZATION] if config.target else [])]
    normalizations = Normalizations(
        *(load_normalization(run / name, verify=verify) for name in names)
    )
    member = Member("", config, resolve(config, len(normalizations.site.mean)))
    with Checkpoints(run, keep=config.run.keep, verify=verify) as checkpoints:
        wanted = None
        if checkpoint == "best" and checkpoints.latest is not None:
            wanted = checkpoints.best
            if wanted is None:
                raise ValueError(
                    f"--checkpoint best: expected one measured on held-out rows in {checkpoints.folder}, "
                    "found none; use --checkpoint newest"
                )
        # The averages where there are some, else the weights themselves; the moments are left on the disk.
        template = state_template(member, normalizations)._replace(optimizer=None, since_fired=None)
        if template.ema is not None:
            template = template._replace(params=None)
        place = jax.tree.map(lambda _: jnp.array, template)
        state, _ = checkpoints.restore(template, wanted, place=place)
    best = state.best(config.model.kind)
    return Trained(best, normalizations, config, member.resolved.slots, int(state.step))


def state_template(member: Member, normalizations: Normalizations) -> TrainState:
    """Shapes and dtypes of a member's state, which a checkpoint is read into; no arrays are made."""
    return jax.eval_shape(lambda: random_state(member, normalizations))


def _config_of(run: Path, description: dict[str, Any]) -> TrainSAEConfig:
    """Settings of a run, with or without groups in its config.json.

    Raises:
        ValueError: another version has made it.
    """
    settings = {**when_absent(TrainSAEConfig), **flatten(description["config"])}
    known = settings_of(TrainSAEConfig).keys()
    for age, names in (("an older", known - settings.keys()), ("a newer", settings.keys() - known)):
        if names:
            raise ValueError(
                f"expected a run of this version, got {run}, which {age} jaxdict made and whose settings differ in "
                f"{', '.join(sorted(names))}; train again with `jaxdict train sae`"
                + (", or install a newer jaxdict" if age == "a newer" else "")
            )
    paths = [name for name in ("store", "out", "init_from") if settings[name]]
    settings |= {name: Path(settings[name]) for name in paths}
    settings |= {name: tuple(settings[name]) for name in ("steps", "sweep")}
    return TrainSAEConfig.of(**settings)


def load_sae(run: Path | str, *, checkpoint: str = "newest") -> SAE:
    """The autoencoder that `jaxdict train sae` trained; it acts on raw rows, through the run's normalization.

    Args:
        run: folder of one dictionary's run.
        checkpoint: newest, or best by held-out FVU.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the run of an ITDA, of several dictionaries, or without such a checkpoint.
    """
    run = Path(os.path.expanduser(run))
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
