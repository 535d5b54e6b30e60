"""`jaxdict train sae`: read from top to bottom, this is the whole training."""

from __future__ import annotations

import sys
import time
from typing import Any, NoReturn

import jax
from tqdm import tqdm

from harvest.flags import expect_captured, print_captured
from harvest.store import open_store
from jaxdict.devices import Processes, mesh
from jaxdict.runs import Checkpoints, Stop, as_begun, as_stored, stop_signals
from jaxdict.sae import Execution, TrainSAEConfig
from jaxdict.training import more_rows, pareto, start, sweep
from jaxdict.training.batches import TrainingBatches, find_limits, fit_normalizations
from jaxdict.training.group_trainer import GroupTrainer
from jaxdict.training.heldout import HeldOut, read_held_out
from jaxdict.training.progress import Progress
from jaxdict.training.saved_run import open_runs
from jaxdict.training.summary import finish_member, mean_fvu, save_member, summary_of
from jaxdict.training.sweep import BatchKey
from jaxdict.training.tracker import Tracker


def train_sae(config: TrainSAEConfig) -> dict[str, Any]:
    """Train sparse autoencoders and leave a run folder behind, with one in it for each where there are several.

    Args:
        config: settings.

    Returns:
        The summary, as in summary.json.

    Raises:
        ValueError: a setting does not fit the store or a resumed run; or a loss is not finite.
        FileExistsError: --out holds something and --resume is off.
        SystemExit: asked to stop (SIGTERM); the state is saved.
    """
    config = as_begun(config, resume=config.run.resume)
    run, asked = config.run, config.devices
    Tracker.check(run.tracker)
    processes = Processes.join(asked.coordinator, count=asked.processes, number=asked.process)
    store = as_stored(
        open_store(config.store), config.out, resume=run.resume, quiet=not processes.chief
    )
    expect_captured(config.data.steps, store.step_numbers.tolist())
    if processes.chief:
        print_captured(config.data.steps, store.step_numbers.tolist())
    config, origin = start.chosen_start(config)
    members = sweep.expand(config, store)
    start.check_start(origin, members)
    sweep.check_sizes(members, store)
    total = members[0].resolved.optimizer_steps
    atoms = tuple(member.resolved.m for member in members)
    devices = mesh.make_mesh(asked.mesh, batch=config.data.batch, atoms=atoms)
    found = processes.from_chief(
        lambda: open_runs(config, store, members, origin=origin),
        refusal=f"process 0 refused to open {config.out}; see what it says",
    )
    members = more_rows.with_legs(members, config.out)
    groups = sweep.grouped(members, Execution(*mesh.axes(devices)))
    limits = find_limits(config, groups, store, processes, resumed=found)
    normalizations = fit_normalizations(groups, store, processes, resumed=found, limits=limits)
    batches = TrainingBatches(store, groups, normalizations, devices=devices, limits=limits)
    trainers = [
        GroupTrainer(group, fitted, devices=devices)
        for group, fitted in zip(groups, normalizations, strict=True)
    ]
    held_out = read_held_out(groups, store, normalizations)
    started, measured = time.perf_counter(), {}

    opened = Checkpoints(config.out, keep=run.keep, verify=run.verify)
    with opened as checkpoints, stop_signals() as stop:
        if found and checkpoints.latest is not None:
            _restore(trainers, checkpoints)
        else:
            for one in trainers:
                one.start(batches.loaders)
        first = trainers[0].optimizer_steps
        if run.resume and processes.chief:
            tqdm.write(more_rows.how_far(config, members, first), file=sys.stderr)
        if origin and not first:
            measured = _measure(trainers, held_out, processes, first)
            if processes.chief:
                tqdm.write(start.told(origin, measured), file=sys.stderr)
        if more_rows.ended_at(members[0], first):
            _resample_at_the_end(trainers, batches, first)
        progress = Progress(
            config, groups, first=first, saved=checkpoints.latest, quiet=not processes.chief
        )
        with progress, batches.starting_at(first) as stream:
            progress.write(measured)
            for step in range(first + 1, total + 1):
                with progress.waiting():
                    batch = next(stream)
                numbers = [one.step(batch[one.group.batch_key], step) for one in trainers]
                # Asked once: a signal that comes later in this round waits for the next one.
                stopping = step < total and processes.agree(
                    bool(stop), ask=step % run.log_every == 0
                )
                saving = stopping or step == total or step % run.save_every == 0
                measuring = not stopping and (step == total or step % run.eval_every == 0)
                progress.update(step, numbers, flush=saving, last_good=checkpoints.name)
                if measuring:
                    measured = _measure(trainers, held_out, processes, step)
                    progress.write(measured)
                if saving:
                    score = mean_fvu(measured) if measuring else None
                    state = _by_number([one.state for one in trainers])
                    checkpoints.save(step, state, {"batches": step}, score=score)
                    progress.saved = step
                if stopping:
                    _stop(stop, checkpoints, progress, f"step {step} of {total}")
        checkpoints.wait()
    if not measured:  # a finished run, resumed
        measured = _measure(trainers, held_out, processes, total)

    pace = {"seconds": round(time.perf_counter() - started, 2), **progress.pace()}
    summaries = {}
    for trainer in trainers:
        # The last state is not donated to a further step, so NumPy may share its memory.
        whole = jax.device_get(processes.gathered(trainer.state))
        for member, state in trainer.members(whole):
            if len(members) > 1:
                save_member(member, state, measured[member.name])
            summaries[member.name] = summary_of(
                member, state, line=measured[member.name], pace=pace
            )
    if not processes.chief:
        return {}
    for member in members:
        finish_member(member, summaries[member.name], alone=len(members) == 1)
    if len(members) == 1:
        return summaries[members[0].name]
    return pareto.finish(config, {one.name: summaries[one.name] for one in members}, pace)


def _by_number(trees: list[Any]) -> Any:
    """The content of a checkpoint: the one tree, or all of them by number."""
    return trees[0] if len(trees) == 1 else {str(i): one for i, one in enumerate(trees)}


def _restore(trainers: list[GroupTrainer], checkpoints: Checkpoints) -> None:
    """Go on from the newest checkpoint."""
    templates = _by_number([one.template for one in trainers])
    place = _by_number([one.placing for one in trainers])
    restored, facts = checkpoints.restore(templates, place=place)
    for i, trainer in enumerate(trainers):
        trainer.state = restored if len(trainers) == 1 else restored[str(i)]
    if facts["batches"] != trainers[0].optimizer_steps:
        raise ValueError(f"{checkpoints.folder}: expected the step of its state, got {facts}")


def _resample_at_the_end(trainers: list[GroupTrainer], batches: TrainingBatches, step: int) -> None:
    """Resample dead features where it was not worth while, since the run ended there before more rows came."""
    due = [one for one in trainers if one.resampling_at(step)]
    if due:
        with batches.starting_at(step - 1) as stream:
            batch = next(stream)
        for one in due:
            one.resample(batch[one.group.batch_key], step)


def _measure(
    trainers: list[GroupTrainer],
    held_out: dict[BatchKey, HeldOut],
    processes: Processes,
    step: int,
) -> dict[str, dict[str, Any]]:
    """Held-out numbers of every member, as lines of its metrics.jsonl."""
    found = {}
    for trainer in trainers:
        rows = held_out[trainer.group.batch_key]
        for member, state in trainer.members(processes.gathered(trainer.state)):
            found[member.name] = rows.line(
                state.best(member.config.model.kind),
                slots=member.resolved.slots,
                step=step,
                rows=step * member.config.data.batch,
            )
    return found


def _stop(stop: Stop, checkpoints: Checkpoints, progress: Progress, where: str) -> NoReturn:
    """End the process, once the checkpoint that was just made is on the disk."""
    checkpoints.wait()
    progress.bar.close()
    saved = checkpoints.name(progress.saved)
    tqdm.write(f"stopped at {where}, saved in {saved}; go on with --resume", file=sys.stderr)
    raise SystemExit(128 + (stop.signal or 0))
