"""A run that goes on: how far it had come, and whether more rows are asked for than before."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harvest.flags import expect
from jaxdict.flags import flatten
from jaxdict.runs import FOLDER, read_run
from jaxdict.sae import TrainSAEConfig
from jaxdict.training.sweep import Leg, Member, schedule_of, steps_of

LEGS = "legs"


def with_more(run: Path, rows: int) -> list[dict[str, int]] | None:
    """The legs of a run once it is given `rows` in all; None where it has as many already.

    Args:
        run: its folder.
        rows: that are asked for.

    Raises:
        ValueError: they are fewer than the run was given before.
    """
    description = read_run(run)
    before, legs = flatten(description["config"])["rows"], description.get(LEGS, [])
    enough = f"at least the {before} of the run in {run}"
    expect(rows >= before, "rows", enough, rows, "ask for more, or name another --out")
    if rows == before:
        return None
    step = _newest_step(run)
    return [*legs, {"step": step, "rows": before}] if step else legs


def _newest_step(run: Path) -> int:
    """Optimizer step of the newest whole checkpoint, 0 without one; nothing is opened."""
    folder = run / FOLDER
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return max((int(name) for name in names if name.isdecimal()), default=0)


def with_legs(members: list[Member], run: Path) -> list[Member]:
    """The members with the legs that the run's config.json tells of."""
    legs = tuple(Leg(**leg) for leg in read_run(run).get(LEGS, []))
    return [dataclasses.replace(member, legs=legs) for member in members]


def ended_at(member: Member, step: int) -> bool:
    """Whether the run was finished at this step before more rows were asked for."""
    steps = (steps_of(leg.rows, member.config) for leg in member.legs if leg.step == step)
    return step in steps


def how_far(config: TrainSAEConfig, members: list[Member], first: int) -> str:
    """A line for `--resume`: how many steps were there, how many come, and what the learning rate does.

    Args:
        config: of the whole run.
        members: what is trained.
        first: optimizer steps that the states have taken.
    """
    total = members[0].resolved.optimizer_steps
    said = f"{config.out}: {first} of {total} steps were there, {total - first or 'none'} come"
    if first == total:
        return f"{said}; a larger --rows goes on"
    schedule = min(map(schedule_of, members), key=lambda one: one.share)
    if first > schedule.since + schedule.warmup or schedule.share == 1:
        return said
    return (
        f"{said}; the learning rate, which had fallen to {schedule.share:.0%} of its peak when more rows were "
        f"asked for, rises again over {schedule.warmup} steps and falls over the last "
        f"{round(schedule.decay * total)} of all"
    )


def described(description: dict[str, Any], legs: list[dict[str, int]]) -> dict[str, Any]:
    """The content of config.json with the legs of the run, if it has any."""
    return {**description, LEGS: legs} if legs else description
