"""`jaxdict train sae`: read from top to bottom, this is the whole training."""

from __future__ import annotations

import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from harvest.atomic import write_json
from harvest.store import Store, open_store
from jaxdict.devices import mesh
from jaxdict.rows import Source, save_normalization, source_of, to_device
from jaxdict.runs import (
    CONFIG,
    NORMALIZATION,
    SUMMARY,
    TARGET_NORMALIZATION,
    Checkpoints,
    Stop,
    curves,
    describe,
    open_run,
    print_result,
    stop_signals,
)
from jaxdict.sae import (
    Execution,
    Hyperparams,
    TrainSAEConfig,
    TrainState,
    dead_features,
    kinds,
    make_update,
    sharding,
    state_of,
)
from jaxdict.training import initialize, pareto, sweep
from jaxdict.training.batches import Fitted, Rows, fit_group
from jaxdict.training.heldout import HeldOut
from jaxdict.training.progress import Watch
from jaxdict.training.saved_run import first_state
from jaxdict.training.sweep import Group, Member
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
    Tracker.check(config.tracker)
    mesh.join(config.coordinator, config.processes, config.process)
    chief = jax.process_index() == 0
    store = open_store(config.store)
    found_members = sweep.expand(config, store)
    devices = mesh.make_mesh(
        config.mesh, batch=config.batch, atoms=tuple(one.plan.m for one in found_members)
    )
    groups = sweep.grouped(found_members, Execution(*mesh.axes(devices)))
    found = _open_runs(config, store, found_members, chief)
    fitted = _fit_all(groups, store, found, chief)
    rows = Rows(config, store, groups, fitted, devices)
    states = [_start(g, fit, rows, devices) for g, fit in zip(groups, fitted, strict=True)]
    steps = [_step_of(group, devices) for group in groups]
    hyperparams = [
        _hyperparams(group, fit, devices) for group, fit in zip(groups, fitted, strict=True)
    ]
    held_out = _held_out(groups, fitted, store)
    started, total = time.perf_counter(), found_members[0].plan.steps
    measured: dict[str, dict[str, Any]] = {}

    with Checkpoints(config.out, keep=config.keep) as checkpoints, stop_signals() as stop:
        if found and checkpoints.latest is not None:
            restored, facts = checkpoints.restore(_template(states))
            states = _placed(restored, states, groups, devices)
            if facts["batches"] != int(states[0].step.reshape(-1)[0]):
                raise ValueError(f"{config.out}: expected the step of its state, got {facts}")
        first = int(np.asarray(states[0].step).reshape(-1)[0])
        watch = Watch(config, groups, first, saved=checkpoints.latest, quiet=not chief)
        with watch, rows.batches(first) as batches:
            for step in range(first + 1, total + 1):
                asked = time.perf_counter()
                batch = next(batches)
                watch.waited += time.perf_counter() - asked
                numbers = []
                for place, group in enumerate(groups):
                    inputs = batch[rows.of(group)]
                    states[place], one = steps[place](states[place], inputs, hyperparams[place])
                    every = group.members[0].config.resample
                    if every and step % every == 0 and step < total:
                        seeds = [member.config.seed for member in group.members]
                        states[place] = dead_features.revive(
                            states[place], inputs, group.step_config, seeds, step, devices
                        )
                    numbers.append(one)
                # Asked once: a signal that comes later in this round waits for the next one.
                stopping = _stopping(stop, step, config) and step < total
                last = step == total or stopping
                saving = last or step % config.save_every == 0
                watch.see(step, numbers, flush=saving, last_good=checkpoints.name)
                measuring = last or step % config.eval_every == 0
                if measuring and not stopping:
                    measured = _measure(groups, states, held_out, watch, step, config.batch)
                if saving:
                    score = _score(measured) if measuring and not stopping else None
                    checkpoints.save(step, _template(states), {"batches": step}, score=score)
                    watch.saved = step
                if stopping:
                    checkpoints.wait()
                    watch.bar.close()
                    tqdm.write(
                        f"stopped at step {step} of {total}, saved in {checkpoints.name(step)}; "
                        "go on with --resume",
                        file=sys.stderr,
                    )
                    raise SystemExit(128 + (stop.signal or 0))
        checkpoints.wait()
    if not measured:  # a finished run, asked to go on
        measured = _measure(groups, states, held_out, None, total, config.batch)

    pace = {
        "seconds": round(time.perf_counter() - started, 2),
        "rows_per_second": watch.rate,
        "waited_for_rows": round(watch.waited / watch.seconds, 4),
    }
    whole = [mesh.collected(state) for state in states]
    if len(found_members) > 1:
        _save_members(groups, whole, measured)
    if not chief:
        return {}
    summaries = {}
    for group, state in zip(groups, whole, strict=True):
        for place, member in enumerate(group.members):
            own = _one(state, group, place)
            summary = _summary(member, own, measured.get(member.name), pace)
            _finish(member, summary, alone=len(found_members) == 1)
            summaries[member.name] = summary
    if len(found_members) == 1:
        print(f"run: {config.out}")
        return summaries[found_members[0].name]
    summaries = {one.name: summaries[one.name] for one in found_members}
    return pareto.finish(config, summaries, pace)


def _open_runs(config: TrainSAEConfig, store: Store, every: list[Member], chief: bool) -> bool:
    """Make the run's folders, or see that they may be gone on with; whether there was a run."""
    if jax.process_count() == 1:
        return _open_all(config, store, every)
    from jax.experimental import multihost_utils

    answer, refusal = 0, None
    if chief:
        try:
            answer = int(_open_all(config, store, every))
        except (ValueError, OSError) as error:
            answer, refusal = 2, error
    # The others must hear of it too, or they would wait for ever.
    answer = int(multihost_utils.broadcast_one_to_all(np.asarray(answer)))
    if refusal is not None:
        raise refusal
    if answer == 2:
        raise ValueError(f"process 0 refused to open {config.out}; see what it says")
    return bool(answer)


def _open_all(config: TrainSAEConfig, store: Store, every: list[Member]) -> bool:
    sites = [source_of(store, one.config.site, steps=config.steps) for one in every]
    description = _describe(every[0].config if len(every) == 1 else config, sites[0], every)
    found = open_run(config.out, description, resume=config.resume)
    if len(every) > 1:
        for one, source in zip(every, sites, strict=True):
            one.config.out.mkdir(parents=True, exist_ok=True)
            write_json(one.config.out / CONFIG, _describe(one.config, source, [one]))
    return found


def _describe(config: TrainSAEConfig, source: Source, every: list[Member]) -> dict[str, Any]:
    description = describe(
        config,
        source,
        verb="train sae",
        kind=config.kind,
        resolved={**every[0].plan._asdict(), "prefixes": list(every[0].plan.prefixes)},
        packages=("jaxdict", "jax", "flax", "optax", "orbax-checkpoint", "numpy"),
    )
    if len(every) > 1:
        description["members"] = [one.name for one in every]
    return description


def _fit_all(groups: list[Group], store: Store, found: bool, chief: bool) -> list[Fitted]:
    """The frozen normalizations of all groups, each fitted once, kept in the folder of every member."""
    done: dict[str, Fitted] = {}
    for group in groups:
        new = Rows.of(group) not in done
        if new:
            done[Rows.of(group)] = fit_group(group, store, found, chief)
        site, target = done[Rows.of(group)]
        for member in group.members[1 if new else 0 :] if chief else []:
            save_normalization(site, member.config.out / NORMALIZATION)
            if target is not None:
                save_normalization(target, member.config.out / TARGET_NORMALIZATION)
    return [done[Rows.of(group)] for group in groups]


def _step_of(group: Group, devices: Mesh | None) -> Any:
    return make_update(group.step_config, members=group.stacked, mesh=devices)


def _start(group: Group, fitted: Fitted, rows: Rows, devices: Mesh | None) -> TrainState:
    states = []
    for member in group.members:
        state, loader = first_state(member, fitted), rows.loaders[group.site]
        params = state.params
        if member.config.init == "rows":
            target = rows.loaders[member.config.target] if member.config.target else None
            params = initialize.from_rows(params, loader, fitted, target)
        params = params._replace(encoder=params.encoder * member.config.encoder_scale)
        state = state_of(params, group.step_config)
        if kinds.REGISTRY[member.config.kind].log_threshold:
            start = initialize.threshold_from_rows(params, loader, fitted, member.config.k)
            state = state_of(params, group.step_config, threshold=start)
        states.append(state)
    state = states[0]
    if group.stacked:
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    return sharding.place_state(state, devices, members=group.stacked)


def _hyperparams(group: Group, fitted: Fitted, devices: Mesh | None) -> Hyperparams:
    every = [sweep.hyperparams_of(member, fitted.out.variance) for member in group.members]
    stacked = Hyperparams(*(np.asarray(values, np.float32) for values in zip(*every, strict=True)))
    if not group.stacked:
        stacked = Hyperparams(*(np.asarray(values[0]) for values in stacked))
    return mesh.everywhere(jax.tree.map(jnp.asarray, stacked), devices)


def _held_out(groups: list[Group], fitted: list[Fitted], store: Store) -> list[HeldOut]:
    """Held-out rows of each group, read once a site and normalization."""
    done: dict[str, HeldOut] = {}
    for group, fit in zip(groups, fitted, strict=True):
        if Rows.of(group) not in done:
            target = None if fit.target is None else to_device(fit.target)
            rows = HeldOut(group.members[0], store, to_device(fit.site), target)
            done[Rows.of(group)] = rows
    return [done[Rows.of(group)].of(group.members[0]) for group in groups]


def _template(states: list[TrainState]) -> Any:
    """What a checkpoint holds: the one state, or all of them by number."""
    whole = [mesh.collected(state) for state in states]
    return whole[0] if len(whole) == 1 else {str(i): one for i, one in enumerate(whole)}


def _placed(
    restored: Any, states: list[TrainState], groups: list[Group], devices: Mesh | None
) -> list[TrainState]:
    every = [restored] if len(states) == 1 else [restored[str(i)] for i in range(len(states))]
    return [
        jax.tree.map(jnp.asarray, state)
        if devices is None
        else sharding.place_state(state, devices, members=group.stacked)
        for state, group in zip(every, groups, strict=True)
    ]


def _one(state: Any, group: Group, place: int) -> TrainState:
    """One member's state out of a group's."""
    return jax.tree.map(lambda leaf: leaf[place], state) if group.stacked else state


def _stopping(stop: Stop, step: int, config: TrainSAEConfig) -> bool:
    """Whether to stop now; processes agree on it now and then, so that all stop at one step."""
    if jax.process_count() == 1:
        return bool(stop)
    if step % config.log_every:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.asarray(bool(stop))).any())


def _measure(
    groups: list[Group],
    states: list[TrainState],
    held_out: list[HeldOut],
    watch: Watch | None,
    step: int,
    batch: int,
) -> dict[str, dict[str, Any]]:
    """Held-out numbers of every member, written to its log."""
    found: dict[str, dict[str, Any]] = {}
    for group, state, held in zip(groups, states, held_out, strict=True):
        if jax.process_count() > 1:
            state = mesh.collected(state)
        for place, member in enumerate(group.members):
            line = held.line(_one(state, group, place).best(member.config.kind), step, step * batch)
            found[member.name] = line
            if watch is not None and member.name in watch.logs:
                watch.logs[member.name].write(**line)
    return found


def _score(measured: dict[str, dict[str, Any]]) -> float | None:
    """Mean held-out FVU of the members, None where there are no held-out rows."""
    found = [line["fvu"] for line in measured.values() if "fvu" in line]
    return float(np.mean(found)) if found else None


def _summary(
    member: Member, state: TrainState, line: dict[str, Any] | None, pace: dict[str, Any]
) -> dict[str, Any]:
    config, plan = member.config, member.plan
    held = None
    if line is not None and "note" not in line:
        dropped = ("kind", "step", "rows", "measured_rows")
        held = {"rows": line["measured_rows"]}
        held |= {name: value for name, value in line.items() if name not in dropped}
    return {
        "kind": config.kind,
        "site": config.site,
        **({"target": config.target} if config.target else {}),
        "d": plan.d,
        "m": plan.m,
        "k": config.k,
        "rows": plan.steps * config.batch,
        "normalization": config.normalize,
        "training": {
            "dead_share": float(np.mean(np.asarray(state.since_fired) >= config.dead_rows)),
            "dead_rows": config.dead_rows,
        },
        "heldout": held,
        **pace,
    }


def _save_members(
    groups: list[Group], states: list[Any], measured: dict[str, dict[str, Any]]
) -> None:
    """A checkpoint of its own, with its own score, for each member of a run of several.

    All processes take part.
    """
    for group, state in zip(groups, states, strict=True):
        for place, member in enumerate(group.members):
            steps = member.plan.steps
            with Checkpoints(member.config.out, keep=1) as own:
                if own.latest != steps:
                    score = _score({member.name: measured[member.name]})
                    own.save(steps, _one(state, group, place), {"batches": steps}, score=score)


def _finish(member: Member, summary: dict[str, Any], *, alone: bool) -> None:
    """What a finished run leaves: its summary and its plot."""
    config, plan = member.config, member.plan
    write_json(config.out / SUMMARY, summary)
    title = f"{config.kind} {config.site}, m={plan.m}, k={config.k}"
    plotted = curves.plot(config.out, title, curves.sae)
    if alone:
        dead_share = summary["training"]["dead_share"]
        print_result(summary["heldout"], plotted, dead_share=dead_share)
