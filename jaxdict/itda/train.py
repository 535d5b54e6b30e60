"""`jaxdict train itda`: a dictionary made of the activations that the dictionary cannot explain.

Rows stream by once, in batches. Each batch is encoded by gradient pursuit with the atoms so far;
rows of which more than `threshold` stays unexplained join as unit atoms (`jaxdict.itda.select`). Each atom
keeps the (image, step, token) it came from. With --atoms N the threshold is searched for by whole
builds (`jaxdict.itda.threshold_search`). With --target another site is rebuilt, and its error is what counts.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from harvest.atomic import write_json
from harvest.store import open_store
from jaxdict.itda import build as itda_build
from jaxdict.itda.build import Build, Normalizers, grow_by
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.heldout import Probe
from jaxdict.itda.labels import sources
from jaxdict.itda.saved_run import SOURCES, Atoms, save_atoms
from jaxdict.itda.threshold_search import Trial, next_threshold
from jaxdict.rows import (
    Normalization,
    SinglePass,
    Source,
    ahead,
    fit_once,
    image_rows,
    source_of,
    to_device,
    watched,
)
from jaxdict.runs import (
    METRICS,
    NORMALIZATION,
    SUMMARY,
    TARGET_NORMALIZATION,
    Checkpoints,
    Log,
    Stop,
    curves,
    describe,
    open_run,
    print_result,
    stop_signals,
)


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
    target = source.beside(config.target) if config.target else None
    sizes = {"batch": config.batch, "pool": config.pool, "rows": config.rows}
    once = SinglePass(source, seed=config.seed, target=target, **sizes)
    description = describe(
        config,
        source,
        verb="train itda",
        kind="itda",
        resolved={"d": source.d, "rows": once.rows, "batches": once.batches},
        packages=("jaxdict", "jax", "orbax-checkpoint", "numpy"),
    )
    found = open_run(config.out, description, resume=config.resume)
    normalizers = Normalizers(to_device(_normalization(config, source, NORMALIZATION, found)))
    if target is not None:
        fitted = _normalization(config, target, TARGET_NORMALIZATION, found)
        normalizers = Normalizers(normalizers.site, to_device(fitted))
    probe = Probe(config, store, source, normalizers)
    started = time.perf_counter()

    with (
        Checkpoints(config.out, keep=config.keep) as checkpoints,
        stop_signals() as stop,
        ExitStack() as stack,
    ):
        build = itda_build.fresh(config, once, ())
        if found and checkpoints.latest is not None:
            build = itda_build.restore(checkpoints, source.d)
        log = stack.enter_context(closing(Log(config.out / METRICS, step=build.total)))
        first = build.total
        while True:
            build, whole = _trial(config, once, normalizers, build, log, checkpoints, stop, probe)
            trial = Trial(build.threshold, _rows(once, build.batch), build.m, whole)
            trials = (*build.trials, trial)
            log.write(kind="trial", step=build.total, **trial._asdict())
            threshold = _next(config, once, trials)
            if threshold is None:
                break
            build = itda_build.fresh(config, once, trials, threshold, build.total)
        build = build._replace(trials=trials)
        building = time.perf_counter() - started - probe.seconds
        typical, heldout = probe.typical(build), probe.heldout(build)
        if heldout is not None:
            log.write(kind="heldout", step=build.total, **_line(heldout, once, build))

    partner = None if build.partner is None else np.asarray(build.partner[: build.m])
    atoms = Atoms(
        np.asarray(build.atoms.unit[: build.m]), build.source[: build.m], typical, partner
    )
    write_json(config.out / SOURCES, sources(store, config.site, atoms.source))
    path = save_atoms(config.out, atoms)
    seconds = time.perf_counter() - started
    summary = {
        "kind": "itda",
        "site": config.site,
        **({"target": config.target} if config.target else {}),
        "d": source.d,
        "m": build.m,
        "k": config.k,
        "rows": once.rows,
        "threshold": build.threshold,
        "rule": config.rule,
        "normalization": config.normalize,
        "training": {
            "trials": [trial._asdict() for trial in trials],
            "never_active": float((typical == 0).mean()) if build.m else None,
            "never_active_rows": probe.training_rows,
        },
        "heldout": heldout,
        "seconds": round(seconds, 2),
        "building_seconds": round(building, 2),
        "rows_per_second": round((build.total - first) * config.batch / max(building, 1e-9), 1),
    }
    write_json(config.out / SUMMARY, summary)
    title = f"itda {config.site}, m={build.m}, k={config.k}"
    plotted = curves.plot(config.out, title, curves.itda)
    _tell(config, summary, path, plotted)
    return summary


def _normalization(
    config: TrainITDAConfig, source: Source, name: str, found: bool
) -> Normalization:
    """A frozen normalization of the run, kept in its file `name`."""
    chosen = source.spread(config.fit_rows)
    return fit_once(
        config.out / name,
        lambda: image_rows(watched(chosen, "normalization")),
        config.normalize,
        floor=config.eigenvalue_floor,
        resume=found,
    )


def _next(config: TrainITDAConfig, once: SinglePass, trials: tuple[Trial, ...]) -> float | None:
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
    once: SinglePass,
    normalizers: Normalizers,
    build: Build,
    log: Log,
    checkpoints: Checkpoints,
    stop: Stop,
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
            build, seen, fits = grow_by(config, normalizers, build, batch, most)
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
                measured = probe.heldout(build)
                if measured is not None:
                    log.write(kind="heldout", step=build.total, **_line(measured, once, build))
            if stop or build.batch % config.save_every == 0:
                itda_build.save(checkpoints, build)
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
        itda_build.save(checkpoints, build)
        checkpoints.wait()
    return build, True


def _rows(once: SinglePass, batch: int) -> int:
    return min(batch * once.batch, once.rows)


def _line(measured: dict[str, Any], once: SinglePass, build: Build) -> dict[str, Any]:
    numbers = dict(measured)
    numbers["measured_rows"] = numbers.pop("rows")
    rows = _rows(once, build.batch)
    return {"rows": rows, "atoms": build.m, "threshold": build.threshold, **numbers}


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
    print_result(summary["heldout"], plotted)
    print(f"atoms: {path}")
    print(f"run: {config.out}")
