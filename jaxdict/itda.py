"""`jaxdict train itda`: a dictionary made of the activations that the dictionary cannot explain.

Rows stream by once, in batches. Each batch is encoded by gradient pursuit with the atoms so far;
rows of which more than `threshold` stays unexplained join as unit atoms, the worst first. Each atom
keeps the (image, step, token) it came from. With a target of N atoms the threshold is searched for
by whole builds (`jaxdict.threshold`).
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from harvest.store import open_store
from jaxdict import curves, growth, itda_run, runs
from jaxdict.checkpoint import Checkpoints
from jaxdict.config import TrainITDAConfig
from jaxdict.data import Source, ahead, image_rows, source_of, watched
from jaxdict.growth import power_of_two
from jaxdict.itda_run import Atoms, Probe
from jaxdict.normalize import (
    Normalization,
    Space,
    bfloat16_rows,
    fit_once,
    normalize,
    to_device,
)
from jaxdict.once import Batch, Once
from jaxdict.pursuit import PreparedAtoms, choose_method
from jaxdict.threshold import Trial, next_threshold

# The first capacity. Smaller ones would cost more in compiling than they save in work.
START = 256


class Build(NamedTuple):
    """One trial under way: all that a checkpoint holds.

    Attributes:
        atoms: prepared atoms, zero beyond the first m.
        m: atoms in use.
        source: int32 [capacity, 3], where each atom came from.
        threshold: per-row FVU above which a row joins.
        batch: batches looked at in this trial.
        total: batches looked at in all trials.
        trials: finished trials.
    """

    atoms: PreparedAtoms
    m: int
    source: np.ndarray
    threshold: float
    batch: int
    total: int
    trials: tuple[Trial, ...]


def train_itda(config: TrainITDAConfig) -> dict[str, Any]:
    """Build an ITDA dictionary and leave a run folder behind.

    Args:
        config: settings.

    Returns:
        The summary, as in summary.json.

    Raises:
        ValueError: a setting does not fit the store or a resumed run.
        FileExistsError: --out holds something and --resume is off.
        SystemExit: asked to stop (SIGTERM); the state is saved.
    """
    store = open_store(config.store)
    source = source_of(store, config.site, steps=config.steps)
    once = Once(source, batch=config.batch, seed=config.seed, pool=config.pool, rows=config.rows)
    description = runs.describe(
        config,
        source,
        verb="train itda",
        kind="itda",
        resolved={"d": source.d, "rows": once.rows, "batches": once.batches},
        packages=("jaxdict", "jax", "orbax-checkpoint", "numpy"),
    )
    found = runs.open_run(config.out, description, resume=config.resume)
    space = to_device(_normalization(config, source, found))
    probe = Probe(config, store, source, space)
    started = time.perf_counter()

    with (
        Checkpoints(config.out, keep=config.keep) as checkpoints,
        runs.stop_signals() as stop,
        ExitStack() as stack,
    ):
        build = _fresh(config, source, once, ())
        if found and checkpoints.latest is not None:
            build = _restore(checkpoints, build)
        log = stack.enter_context(closing(runs.Log(config.out / runs.METRICS, step=build.total)))
        first = build.total
        while True:
            build, whole = _trial(config, once, space, build, log, checkpoints, stop, probe)
            trial = Trial(build.threshold, _rows(once, build.batch), build.m, whole)
            trials = (*build.trials, trial)
            log.write(kind="trial", step=build.total, **trial._asdict())
            threshold = _next(config, once, trials)
            if threshold is None:
                break
            build = _fresh(config, source, once, trials, threshold, build.total)
        build = build._replace(trials=trials)
        atoms = Atoms(np.asarray(build.atoms.unit[: build.m]), build.source[: build.m])
        typical, heldout = probe.typical(build.atoms, build.m), probe.heldout(build.atoms, build.m)
        if heldout is not None:
            log.write(kind="heldout", step=build.total, **_line(heldout, once, build))

    path = itda_run.save_atoms(config.out, atoms._replace(typical=typical))
    seconds = time.perf_counter() - started
    summary = {
        "kind": "itda",
        "site": config.site,
        "d": source.d,
        "m": build.m,
        "k": config.k,
        "rows": once.rows,
        "threshold": build.threshold,
        "normalization": config.normalize,
        "training": {
            "trials": [trial._asdict() for trial in trials],
            "never_active": float((typical == 0).mean()) if build.m else None,
            "never_active_rows": probe.training_rows,
        },
        "heldout": heldout,
        "seconds": round(seconds, 2),
        "rows_per_second": round((build.total - first) * config.batch / max(seconds, 1e-9), 1),
    }
    runs.write_json(config.out / runs.SUMMARY, summary)
    title = f"itda {config.site}, m={build.m}, k={config.k}"
    plotted = curves.plot(config.out, title, curves.itda)
    _tell(config, summary, path, plotted)
    return summary


def _normalization(config: TrainITDAConfig, source: Source, found: bool) -> Normalization:
    """The run's frozen normalization."""
    chosen = source.spread(config.fit_rows)
    return fit_once(
        config.out / runs.NORMALIZATION,
        lambda: image_rows(watched(chosen, "normalization")),
        config.normalize,
        floor=config.eigenvalue_floor,
        resume=found,
    )


def _fresh(
    config: TrainITDAConfig,
    source: Source,
    once: Once,
    trials: tuple[Trial, ...],
    threshold: float | None = None,
    total: int = 0,
) -> Build:
    """An empty dictionary before the first batch of a trial."""
    if threshold is None:
        threshold = config.threshold or next_threshold((), config.atoms, once.rows)
    assert threshold is not None
    # With a small target the last capacity is also the first: one compilation.
    capacity = power_of_two(min(config.atoms, 4 * START)) if config.atoms else START
    gram = choose_method(once.rows, source.d, max(capacity, config.atoms), config.k) == "gram"
    atoms = growth.empty(capacity, source.d, gram=gram)
    places = np.zeros((capacity, 3), np.int32)
    return Build(atoms, 0, places, float(threshold), 0, total, trials)


def _next(config: TrainITDAConfig, once: Once, trials: tuple[Trial, ...]) -> float | None:
    """The threshold of the next trial; None when the last trial is the result."""
    if not config.atoms:
        return None
    threshold = next_threshold(trials, config.atoms, once.rows)
    if threshold is not None:
        return threshold
    best = max((t for t in trials if t.whole), key=lambda t: t.atoms, default=None)
    if best is None:
        raise ValueError(
            f"--atoms: expected a number that some threshold reaches, got {config.atoms}: every "
            f"threshold up to {trials[-1].threshold:.3f} gives more atoms; raise --atoms or --k"
        )
    # The best trial is built once more when it was not the last one.
    return None if trials[-1] == best else best.threshold


def _trial(
    config: TrainITDAConfig,
    once: Once,
    space: Space,
    build: Build,
    log: runs.Log,
    checkpoints: Checkpoints,
    stop: runs.Stop,
    probe: Probe,
) -> tuple[Build, bool]:
    """Look at the rest of the rows; False if it was cut off at the number of atoms asked for."""
    bar = tqdm(
        total=once.rows,
        initial=_rows(once, build.batch),
        unit="row",
        unit_scale=True,
        desc=f"itda {config.site}" + (f", trial {len(build.trials) + 1}" if config.atoms else ""),
    )
    most = config.atoms or sys.maxsize
    with bar, ahead(once.read(build.batch)) as batches:
        for batch in batches:
            build, seen, fits = grow_by(config, space, build, batch, most)
            if not fits:
                return build, False
            bar.update(batch.count)
            if build.batch in (1, once.batches) or build.batch % config.log_every == 0:
                bar.set_postfix_str(f"{build.m} atoms, FVU {seen['fvu']:.3f}")
                rows = _rows(once, build.batch)
                log.write(kind="train", step=build.total, rows=rows, atoms=build.m, **seen)
            if build.batch == once.batches:
                break
            if build.batch % config.eval_every == 0:
                measured = probe.heldout(build.atoms, build.m)
                if measured is not None:
                    log.write(kind="heldout", step=build.total, **_line(measured, once, build))
            if stop or build.batch % config.save_every == 0:
                _save(checkpoints, build)
            if stop:
                checkpoints.wait()
                log.close()
                tqdm.write(
                    f"stopped after {build.total} batches, saved in "
                    f"{checkpoints.name(build.total)}; go on with --resume",
                    file=sys.stderr,
                )
                raise SystemExit(128 + (stop.signal or 0))
    if checkpoints.latest != build.total:
        _save(checkpoints, build)
        checkpoints.wait()
    return build, True


def grow_by(
    config: TrainITDAConfig, space: Space, build: Build, batch: Batch, most: int
) -> tuple[Build, dict[str, Any], bool]:
    """Look at one batch and let its rows join, unless that makes more than `most` atoms.

    Returns:
        The build after the batch; what was seen, before any row joined: mean per-row FVU, share of
        rows above the threshold, L0; False if there were too many.
    """
    z = normalized(space, jnp.asarray(batch.bits), batch.count)
    look = growth.look(build.atoms, z, build.threshold, config.duplicate, k=config.k)
    fvu, l0, rank, joining = jax.device_get((look.fvu, look.l0, look.rank, look.joining))
    seen = {
        "threshold": build.threshold,
        "fvu": float(fvu[: batch.count].mean()),
        "over": float((fvu[: batch.count] > build.threshold).mean()),
        "l0": float(l0[: batch.count].mean()),
    }
    counted = build._replace(batch=build.batch + 1, total=build.total + 1)
    if not joining:
        return counted, seen, True
    m = build.m + int(joining)
    if m > most:
        return counted._replace(m=m), seen, False
    atoms, source = build.atoms, build.source
    if m > atoms.m:
        atoms = growth.grow(atoms, power_of_two(m))
        source = np.pad(source, ((0, atoms.m - len(source)), (0, 0)))
    atoms = growth.append(atoms, build.m, look.unit, look.rank)
    source[build.m + rank[rank >= 0]] = batch.places[rank >= 0]
    return counted._replace(atoms=atoms, source=source, m=m), seen, True


@jax.jit
def normalized(space: Space, bits: jax.Array, count: int) -> jax.Array:
    """bfloat16 bits [n, d] to rows in the dictionary's own space; zero from row `count` on."""
    z = normalize(space, bfloat16_rows(bits))
    return jnp.where(jnp.arange(len(bits))[:, None] < count, z, 0)


def _rows(once: Once, batch: int) -> int:
    return min(batch * once.batch, once.rows)


def _line(measured: dict[str, Any], once: Once, build: Build) -> dict[str, Any]:
    numbers = dict(measured)
    numbers["measured_rows"] = numbers.pop("rows")
    rows = _rows(once, build.batch)
    return {"rows": rows, "atoms": build.m, "threshold": build.threshold, **numbers}


def _save(checkpoints: Checkpoints, build: Build) -> None:
    facts = {
        "capacity": build.atoms.m,
        "gram": build.atoms.gram is not None,
        "m": build.m,
        "threshold": build.threshold,
        "batch": build.batch,
        "total": build.total,
        "trials": [trial._asdict() for trial in build.trials],
    }
    checkpoints.save(build.total, _arrays(build.atoms, build.source), facts)


def _arrays(atoms: PreparedAtoms, source: np.ndarray) -> dict[str, Any]:
    """What a checkpoint stores. The Gram matrix too: computed anew it may differ in the last bit."""
    arrays = {"unit": atoms.unit, "source": source}
    return arrays if atoms.gram is None else {**arrays, "gram": atoms.gram}


def _restore(checkpoints: Checkpoints, fresh: Build) -> Build:
    facts = checkpoints.facts()
    atoms = growth.empty(facts["capacity"], fresh.atoms.d, gram=facts["gram"])
    source = np.zeros((facts["capacity"], 3), np.int32)
    arrays, _ = checkpoints.restore(_arrays(atoms, source))
    gram = jnp.asarray(arrays["gram"]) if facts["gram"] else None
    atoms = PreparedAtoms(jnp.asarray(arrays["unit"]), atoms.norm, gram)
    trials = tuple(Trial(**trial) for trial in facts["trials"])
    return Build(
        atoms,
        facts["m"],
        np.array(arrays["source"]),
        facts["threshold"],
        facts["batch"],
        facts["total"],
        trials,
    )


def _tell(
    config: TrainITDAConfig, summary: dict[str, Any], path: Path, plotted: Path | None
) -> None:
    """Say in a few lines what came out and where it is."""
    trials = summary["training"]["trials"]
    searched = f" (found in {len(trials)} trials)" if config.atoms else ""
    print(
        f"{summary['m']} atoms from {summary['rows']:,} rows, threshold "
        f"{summary['threshold']:.4f}{searched}"
    )
    runs.print_result(summary["heldout"], plotted)
    print(f"atoms: {path}")
    print(f"run: {config.out}")
