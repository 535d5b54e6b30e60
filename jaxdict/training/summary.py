"""The results of a finished training: summaries, plots, and a checkpoint of each member."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from harvest.atomic import write_json
from jaxdict.runs import SUMMARY, Checkpoints, curves, print_result
from jaxdict.sae import TrainState
from jaxdict.training.sweep import Member

Line = dict[str, Any]


def mean_fvu(lines: Mapping[str, Line]) -> float | None:
    """Mean held-out FVU of the members, None where there are no held-out rows."""
    found = [line["fvu"] for line in lines.values() if "fvu" in line]
    return float(np.mean(found)) if found else None


def save_member(member: Member, state: TrainState, line: Line) -> None:
    """A checkpoint of its own, with its own score, for a member of a run of several; all processes take part."""
    steps = member.resolved.optimizer_steps
    with Checkpoints(member.config.out, keep=1) as own:
        if own.latest != steps:
            own.save(steps, state, {"batches": steps}, score=mean_fvu({member.name: line}))


def summary_of(member: Member, state: TrainState, *, line: Line, pace: dict[str, Any]) -> Line:
    """The content of summary.json.

    Args:
        member: what was trained.
        state: its last state.
        line: its held-out numbers.
        pace: of the whole run.
    """
    config, resolved = member.config, member.resolved
    dead_rows = config.dead_features.dead_rows
    held = None
    if "note" not in line:
        dropped = ("kind", "step", "rows", "measured_rows")
        held = {"rows": line["measured_rows"]}
        held |= {name: value for name, value in line.items() if name not in dropped}
    return {
        "kind": config.model.kind,
        "site": config.site,
        **({"target": config.target} if config.target else {}),
        "d": resolved.d,
        "m": resolved.m,
        "k": config.model.k,
        "rows": resolved.optimizer_steps * config.data.batch,
        "normalization": config.data.normalize,
        "training": {
            "dead_share": float(np.mean(np.asarray(state.since_fired) >= dead_rows)),
            "dead_rows": dead_rows,
        },
        "heldout": held,
        **pace,
    }


def finish_member(member: Member, summary: Line, *, alone: bool) -> None:
    """Write a member's summary and plot, and print its result if it is `alone` in its run."""
    config, m = member.config, member.resolved.m
    write_json(config.out / SUMMARY, summary, hashed=True)
    title = f"{config.model.kind} {config.site}, m={m}, k={config.model.k}"
    plotted = curves.plot(config.out, title, curves.sae)
    if alone:
        dead_share = summary["training"]["dead_share"]
        print_result(summary["heldout"], plotted, dead_share=dead_share)
        print(f"run: {config.out}")
