"""`jaxdict train itda`: a dictionary made of the activations that it could not explain so far.

Rows are read once, in batches. Each batch is encoded by gradient pursuit with the atoms so far; rows of
which more than `threshold` stays unexplained join as unit atoms (`jaxdict.itda.rules`). Each atom keeps
the (image, step, token) it came from. With --atoms N the threshold is searched for by whole builds
(`jaxdict.itda.threshold_search`). With --target another site is rebuilt, and its error decides.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
from tqdm import tqdm

from harvest.atomic import write_json
from harvest.flags import expect, in_memory, print_captured
from harvest.store import open_store
from jaxdict.flags import resumable, when_absent
from jaxdict.itda.build import Build, Normalizers, add_batch, empty_build, restore, save
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.heldout import Evaluator
from jaxdict.itda.labels import sources
from jaxdict.itda.saved_run import SOURCES, Atoms, save_atoms
from jaxdict.itda.threshold_search import Trial, next_threshold
from jaxdict.rows import (
    Normalization,
    NormLimit,
    SinglePass,
    Source,
    ahead,
    fit_once,
    image_rows,
    kept_rows,
    limit_once,
    print_limits,
    print_padding,
    source_of,
    to_device,
    watched,
)
from jaxdict.runs import (
    METRICS,
    NORM_LIMITS,
    NORMALIZATION,
    SUMMARY,
    TARGET_NORMALIZATION,
    Checkpoints,
    Log,
    Stop,
    as_begun,
    as_stored,
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
    config = as_begun(config, resume=config.resume)
    store = as_stored(open_store(config.store), config.out, resume=config.resume)
    source = source_of(store, config.site, steps=config.steps, padding=config.padding)
    print_captured(config.steps, store.step_numbers.tolist())
    target = source.beside(config.target) if config.target else None
    sizes: dict[str, Any] = {"batch": config.batch, "pool": config.pool, "rows": config.rows}
    single_pass = SinglePass(source, seed=config.seed, target=target, **sizes)
    _check_sizes(config, single_pass)
    description = describe(
        config,
        source,
        verb="train itda",
        kind="itda",
        resolved={"d": source.d, "rows": single_pass.rows, "batches": single_pass.batches},
        packages=("jaxdict", "jax", "orbax-checkpoint", "numpy"),
    )
    may_differ = resumable(TrainITDAConfig)
    found = open_run(
        config.out,
        description,
        resume=config.resume,
        may_differ=may_differ,
        absent=when_absent(TrainITDAConfig),
    )
    print_padding([source])
    limit = _norm_limit(config, source, found)
    if limit is not None:
        single_pass = SinglePass(source, seed=config.seed, target=target, limit=limit, **sizes)
    fitted = _normalization(config, source, NORMALIZATION, found, limit)
    normalizers = Normalizers(to_device(fitted))
    if target is not None:
        fitted = _normalization(config, target, TARGET_NORMALIZATION, found)
        normalizers = Normalizers(normalizers.site, to_device(fitted))
    evaluator = Evaluator(config, store, source, normalizers)
    started = time.perf_counter()

    with (
        Checkpoints(config.out, keep=config.keep, verify=config.verify) as checkpoints,
        stop_signals() as stop,
        ExitStack() as stack,
    ):
        build = empty_build(config, single_pass)
        if found and checkpoints.latest is not None:
            build = restore(checkpoints, source.d)
        log = stack.enter_context(closing(Log(config.out / METRICS, step=build.total)))
        builder = _Builder(config, single_pass, normalizers, evaluator, log, checkpoints, stop)
        first = build.total
        while True:
            build, whole = builder.trial(build)
            trial = Trial(build.threshold, builder.rows(build), build.m, whole)
            trials = (*build.trials, trial)
            log.write(kind="trial", step=build.total, **trial._asdict())
            threshold = _next(config, single_pass, trials)
            if threshold is None:
                break
            build = empty_build(
                config, single_pass, trials=trials, threshold=threshold, total=build.total
            )
        build = build._replace(trials=trials)
        building = time.perf_counter() - started - evaluator.seconds
        typical, heldout = evaluator.typical(build), evaluator.heldout(build)
        if heldout is not None:
            builder.log_heldout(build, heldout)

    unit, target_atoms = build.atoms.prepared.unit, build.atoms.target
    atoms = Atoms(
        np.asarray(unit[: build.m]),
        build.source[: build.m],
        typical,
        None if target_atoms is None else np.asarray(target_atoms[: build.m]),
    )
    write_json(config.out / SOURCES, sources(store, config.site, atoms.source), hashed=True)
    path = save_atoms(config.out, atoms)
    seconds = time.perf_counter() - started
    summary = {
        "kind": "itda",
        "site": config.site,
        **({"target": config.target} if config.target else {}),
        "d": source.d,
        "m": build.m,
        "k": config.k,
        "rows": single_pass.rows,
        "threshold": build.threshold,
        "rule": config.rule,
        "normalization": config.normalize,
        "training": {
            "trials": [trial._asdict() for trial in trials],
            "never_active": float((typical == 0).mean()) if build.m else None,
            "never_active_rows": evaluator.training_rows,
        },
        "heldout": heldout,
        "seconds": round(seconds, 2),
        "building_seconds": round(building, 2),
        "rows_per_second": round((build.total - first) * config.batch / max(building, 1e-9), 1),
    }
    write_json(config.out / SUMMARY, summary, hashed=True)
    title = f"itda {config.site}, m={build.m}, k={config.k}"
    plotted = curves.plot(config.out, title, curves.itda)
    _tell(config, summary, path, plotted)
    return summary


def _check_sizes(config: TrainITDAConfig, single_pass: SinglePass) -> None:
    """Refuse what this machine's memory cannot hold, or what the rows cannot give, before anything is made."""
    batch, d = config.batch, single_pass.source.d
    d_out = 0 if single_pass.target is None else single_pass.target.d
    pairs = 3 * batch**2 if config.rule == "cover" else 0
    in_memory(("batch",), batch, 4 * (4 * batch * (d + d_out) + pairs), "a batch and its products")
    # Two slots of state a row and, in the Gram form, k^2 products; rows are taken in parts.
    in_memory(
        ("k", "batch"), config.k, 4 * (4 * batch * config.k + config.k**2), "codes of a batch"
    )
    rows = single_pass.rows
    enough = f"at most the {rows} rows that are looked at, of which atoms are made"
    expect(config.atoms <= rows, "atoms", enough, config.atoms, "lower it or raise --rows")
    atoms = config.atoms * (d + d_out)
    in_memory(("atoms",), config.atoms, 4 * atoms, "the atoms")


def _norm_limit(config: TrainITDAConfig, source: Source, found: bool) -> NormLimit | None:
    """The norm above which rows are left out, kept in the run's folder; None without --max-norm."""
    if not config.max_norm:
        return None
    looked_at = [source.spread(config.fit_rows)]
    limits = limit_once(config.out / NORM_LIMITS, looked_at, config.max_norm, resume=found)
    print_limits(limits)
    return limits[config.site]


def _normalization(
    config: TrainITDAConfig,
    source: Source,
    name: str,
    found: bool,
    limit: NormLimit | None = None,
) -> Normalization:
    """A frozen normalization of the run, kept in its file `name`."""
    chosen = source.spread(config.fit_rows)
    return fit_once(
        config.out / name,
        lambda: kept_rows(image_rows(watched(chosen, "normalization")), limit),
        config.normalize,
        floor=config.eigenvalue_floor,
        resume=found,
    )


def _next(
    config: TrainITDAConfig, single_pass: SinglePass, trials: tuple[Trial, ...]
) -> float | None:
    """The threshold of the next trial; None when the last trial is the result."""
    if not config.atoms:
        return None
    threshold = next_threshold(trials, config.atoms, single_pass.rows)
    if threshold is not None:
        return threshold
    best = max((t for t in trials if t.whole), key=lambda t: t.atoms, default=None)
    if best is None:
        raise ValueError(
            f"--atoms: expected a number that some threshold reaches, got {config.atoms}: every "
            f"threshold up to {trials[-1].threshold:.3f} gives more atoms; raise --atoms or --k"
        )
    # If the best trial was not the last one, it is built once more.
    return None if trials[-1] == best else best.threshold


class _Builder(NamedTuple):
    """Builds dictionaries out of the rows of one run, a trial at a time."""

    config: TrainITDAConfig
    single_pass: SinglePass
    normalizers: Normalizers
    evaluator: Evaluator
    log: Log
    checkpoints: Checkpoints
    stop: Stop

    def trial(self, build: Build) -> tuple[Build, bool]:
        """Go through the rest of the rows; False if cut off at the number of atoms asked for."""
        config, single_pass = self.config, self.single_pass
        number = f", trial {len(build.trials) + 1}" if config.atoms else ""
        bar = tqdm(
            total=single_pass.rows,
            initial=self.rows(build),
            unit="row",
            unit_scale=True,
            desc=f"itda {config.site}{number}",
        )
        with bar, ahead(single_pass.read(build.batch)) as batches:
            for batch in batches:
                build, numbers, fits = add_batch(
                    build, batch, config=config, normalizers=self.normalizers
                )
                if not fits:
                    return build, False
                bar.update(batch.count)
                if build.batch in (1, single_pass.batches) or build.batch % config.log_every == 0:
                    bar.set_postfix_str(f"{build.m} atoms, FVU {numbers['fvu']:.3f}")
                    rows = self.rows(build)
                    self.log.write(
                        kind="train", step=build.total, rows=rows, atoms=build.m, **numbers
                    )
                if build.batch == single_pass.batches:
                    break
                if build.batch % config.eval_every == 0:
                    measured = self.evaluator.heldout(build)
                    if measured is not None:
                        self.log_heldout(build, measured)
                if self.stop or build.batch % config.save_every == 0:
                    save(self.checkpoints, build)
                if self.stop:
                    self._exit(build)
        if self.checkpoints.latest != build.total:
            save(self.checkpoints, build)
            self.checkpoints.wait()
        return build, True

    def _exit(self, build: Build) -> NoReturn:
        """End the process, asked to by a signal; the build is saved."""
        self.checkpoints.wait()
        self.log.close()
        tqdm.write(
            f"stopped after {build.total} batches, saved in "
            f"{self.checkpoints.name(build.total)}; go on with --resume",
            file=sys.stderr,
        )
        raise SystemExit(128 + (self.stop.signal or 0))

    def rows(self, build: Build) -> int:
        """Rows seen in the build's trial."""
        return min(build.batch * self.single_pass.batch, self.single_pass.rows)

    def log_heldout(self, build: Build, measured: dict[str, Any]) -> None:
        """Write a line of held-out numbers to metrics.jsonl."""
        numbers = dict(measured)
        numbers["measured_rows"] = numbers.pop("rows")
        facts = {"rows": self.rows(build), "atoms": build.m, "threshold": build.threshold}
        self.log.write(kind="heldout", step=build.total, **facts, **numbers)


def _tell(
    config: TrainITDAConfig, summary: dict[str, Any], path: Path, plotted: Path | None
) -> None:
    """Print the result and where it is."""
    trials = summary["training"]["trials"]
    searched = f" (found in {len(trials)} trials)" if config.atoms else ""
    print(
        f"{summary['m']} atoms from {summary['rows']:,} rows, threshold "
        f"{summary['threshold']:.4f}{searched}"
    )
    print_result(summary["heldout"], plotted)
    print(f"atoms: {path}")
    print(f"run: {config.out}")
