"""Reading a run of `jaxdict train sae` back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdict.rows import load_normalization
from jaxdict.runs import NORMALIZATION, TARGET_NORMALIZATION, Checkpoints
from jaxdict.sae import SAEParams, TrainSAEConfig, TrainState, initial_state
from jaxdict.training import sweep
from jaxdict.training.batches import Fitted
from jaxdict.training.sweep import Member, resolve


class Trained(NamedTuple):
    """What a run of `train sae` holds.

    Attributes:
        params: weights to use, averaged where the run averages.
        fitted: normalizations.
        config: settings.
        slots: active atoms that a row may have.
        step: of the optimizer.
    """

    params: SAEParams
    fitted: Fitted
    config: TrainSAEConfig
    slots: int
    step: int


def read_sae(run: Path, description: dict[str, Any], *, checkpoint: str = "newest") -> Trained:
    """Read a run of `train sae`.

    Args:
        run: its folder.
        description: its config.json.
        checkpoint: newest, or best by held-out FVU.

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
    settings = dict(description["config"])
    known = {field.name for field in dataclasses.fields(TrainSAEConfig)}
    for age, names in (("an older", known - set(settings)), ("a newer", set(settings) - known)):
        if names:
            raise ValueError(
                f"expected a run of this version, got {run}, which {age} jaxdict made and whose settings differ in "
                f"{', '.join(sorted(names))}; train again with `jaxdict train sae`"
                + (", or install a newer jaxdict" if age == "a newer" else "")
            )
    settings |= {name: Path(settings[name]) for name in ("store", "out")}
    settings |= {name: tuple(settings[name]) for name in ("steps", "sweep")}
    config = TrainSAEConfig(**settings)
    target = load_normalization(run / TARGET_NORMALIZATION) if config.target else None
    fitted = Fitted(load_normalization(run / NORMALIZATION), target)
    member = Member("", config, resolve(config, len(fitted.site.mean)))
    template = jax.eval_shape(lambda: first_state(member, fitted))
    with Checkpoints(run, keep=config.keep) as checkpoints:
        wanted = None
        if checkpoint == "best" and checkpoints.latest is not None:
            wanted = checkpoints.best
            if wanted is None:
                raise ValueError(
                    f"--checkpoint best: expected one measured on held-out rows in {checkpoints.folder}, "
                    "found none; use --checkpoint newest"
                )
        state, _ = checkpoints.restore(template, wanted)
    best = jax.tree.map(jnp.asarray, state).best(config.kind)
    return Trained(best, fitted, config, member.plan.slots, int(state.step))


def first_state(member: Member, fitted: Fitted) -> TrainState:
    """The state of a member before the first step; also the template that a checkpoint is read into."""
    step_config = sweep.step_config_of(member)
    mean = jnp.asarray(fitted.site.center, jnp.float32)
    other = None
    if fitted.target is not None:
        other = jnp.asarray(fitted.target.center, jnp.float32)
    key = jax.random.key(member.config.seed)
    return initial_state(key, member.plan.m, mean=mean, step_config=step_config, out_mean=other)
