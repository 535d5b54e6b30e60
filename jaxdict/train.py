"""`jaxdict train sae`: read from top to bottom, this is the whole training."""

from __future__ import annotations

import math
import sys
import time
from contextlib import closing
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from harvest.store import Store, open_store
from jaxdict import curves, metrics, runs, sae, update
from jaxdict.checkpoint import Checkpoints
from jaxdict.config import TrainSAEConfig
from jaxdict.data import Loader, Source, ahead, image_rows, source_of, watched
from jaxdict.normalize import (
    Normalization,
    Space,
    bfloat16_rows,
    denormalize,
    fit_once,
    normalize,
    to_device,
)
from jaxdict.sae import SAEParams
from jaxdict.update import Recipe, TrainState


class Plan(NamedTuple):
    """The settings that a config leaves to the data.

    Attributes:
        d: width of the site.
        m: atoms.
        k_aux: slots of the AuxK codes.
        lr: peak learning rate.
        steps: optimizer steps.
    """

    d: int
    m: int
    k_aux: int
    lr: float
    steps: int


def resolve(config: TrainSAEConfig, d: int) -> Plan:
    """Fill in what the config leaves open, now that the width is known.

    m = 8 d. lr = 2e-3 sqrt(1024 / m): the 1/sqrt(m) rule of Gao et al. 2024, through
    the better of the two rates tried on a store of the embedded model (held-out FVU 0.100 with
    2e-3, 0.110 with 8e-4, at m = 1024, k = 16, 3M rows). k_aux = min(d / 2, 2 k), where they
    have d / 2, to keep steps that revive features cheap.

    Raises:
        ValueError: k is above m.
    """
    m = config.atoms or 8 * d
    if config.k > m:
        raise ValueError(f"--k: expected at most the number of atoms ({m}), got {config.k}")
    k_aux = min(config.aux_k or max(1, min(d // 2, 2 * config.k)), m) if config.aux else 0
    lr = config.lr or 2e-3 * math.sqrt(1024 / m)
    return Plan(d, m, k_aux, lr, -(-config.rows // config.batch))


def train_sae(config: TrainSAEConfig) -> dict[str, Any]:
    """Train a sparse autoencoder and leave a run folder behind.

    Args:
        config: settings.

    Returns:
        The summary, as in summary.json.

    Raises:
        ValueError: a setting does not fit the store or a resumed run; or the loss is not finite.
        FileExistsError: --out holds something and --resume is off.
        SystemExit: asked to stop (SIGTERM); the state is saved.
    """
    store = open_store(config.store)
    source = source_of(store, config.site, steps=config.steps)
    plan = resolve(config, source.d)
    description = runs.describe(
        config,
        source,
        verb="train sae",
        kind=config.kind,
        resolved=plan._asdict(),
        packages=("jaxdict", "jax", "flax", "optax", "orbax-checkpoint", "numpy"),
    )
    found = runs.open_run(config.out, description, resume=config.resume)
    normalization = _normalization(config, source, found)
    space = to_device(normalization)

    step_once = update.make_update(recipe_of(config, plan, normalization))
    state = fresh_state(config, plan, normalization)
    loader = Loader(
        source,
        batch=config.batch,
        seed=config.seed,
        pool=config.pool,
        memory=int(config.memory * 2**30),
    )
    held_out = HeldOut(config, store, space)
    started = time.perf_counter()

    with Checkpoints(config.out, keep=config.keep) as checkpoints, runs.stop_signals() as stop:
        if found and checkpoints.latest is not None:
            restored, facts = checkpoints.restore(state)
            state = jax.tree.map(jnp.asarray, restored)
            if facts["batches"] != int(state.step):
                raise ValueError(f"{config.out}: expected {int(state.step)} batches, got {facts}")
        first = int(state.step)
        log = runs.Log(config.out / runs.METRICS, step=first)
        watch = Watch(config, plan, log, first, saved=checkpoints.latest)
        with closing(log), ahead(loader.batches(first)) as batches, watch.bar:
            for step in range(first + 1, plan.steps + 1):
                state, numbers = step_once(state, jnp.asarray(next(batches)), space)
                # Asked once: a signal that comes later in this round waits for the next one.
                stopping = bool(stop) and step < plan.steps
                last = step == plan.steps or stopping
                saving = last or step % config.save_every == 0
                watch.see(step, numbers, flush=saving, checkpoints=checkpoints)
                if saving:
                    checkpoints.save(step, state, {"batches": step})
                    watch.saved = step
                if stopping:
                    checkpoints.wait()
                    watch.bar.close()
                    tqdm.write(
                        f"stopped at step {step} of {plan.steps}, saved in "
                        f"{checkpoints.name(step)}; go on with --resume",
                        file=sys.stderr,
                    )
                    raise SystemExit(128 + (stop.signal or 0))
                if last or step % config.eval_every == 0:
                    log.write(**held_out.line(state.best, step, step * config.batch))
        checkpoints.wait()

    summary: dict[str, Any] = {
        "kind": config.kind,
        "site": config.site,
        "d": plan.d,
        "m": plan.m,
        "k": config.k,
        "rows": plan.steps * config.batch,
        "normalization": config.normalize,
        "training": {
            "dead_share": float(np.mean(np.asarray(state.since_fired) >= config.dead_rows)),
            "dead_rows": config.dead_rows,
        },
        "heldout": held_out.summary(state.best),
        "seconds": round(time.perf_counter() - started, 2),
        "rows_per_second": watch.rate,
    }
    runs.write_json(config.out / runs.SUMMARY, summary)
    title = f"{config.kind} {config.site}, m={plan.m}, k={config.k}"
    plotted = curves.plot(config.out, title, curves.sae)
    dead_share = summary["training"]["dead_share"]
    runs.print_result(summary["heldout"], plotted, dead_share=dead_share)
    print(f"run: {config.out}")
    return summary


def recipe_of(config: TrainSAEConfig, plan: Plan, normalization: Normalization) -> Recipe:
    """All numbers of the training step."""
    rate = update.Rate(plan.lr, plan.steps, config.warmup, config.decay)
    adam = update.Adam(config.b1, config.b2, config.eps, config.clip)
    return Recipe(
        config.k,
        normalization.variance,
        config.aux,
        plan.k_aux,
        config.dead_rows,
        config.ema,
        rate,
        adam,
    )


def fresh_state(config: TrainSAEConfig, plan: Plan, normalization: Normalization) -> TrainState:
    """The state before the first step; also the template that a checkpoint is read into."""
    mean = jnp.asarray(normalization.center, jnp.float32)
    recipe = recipe_of(config, plan, normalization)
    return update.initial_state(jax.random.key(config.seed), plan.m, mean=mean, recipe=recipe)


def _normalization(config: TrainSAEConfig, source: Source, found: bool) -> Normalization:
    """The run's frozen normalization, fitted with a progress bar."""
    chosen = source.spread(config.fit_rows)
    return fit_once(
        config.out / runs.NORMALIZATION,
        lambda: image_rows(watched(chosen, "normalization")),
        config.normalize,
        floor=config.eigenvalue_floor,
        resume=found,
    )


class HeldOut:
    """Rows of the validation split and how to measure weights on them; it only reads."""

    def __init__(self, config: TrainSAEConfig, store: Store, space: Space) -> None:
        """Read the rows, once."""
        self.blocks: list[tuple[np.ndarray, np.ndarray]] = []
        self.steps: tuple[int, ...] = ()
        if len(store.indices("validation")):
            source = source_of(store, config.site, split="validation", steps=config.steps)
            source = source.spread(config.eval_rows)
            self.blocks, self.steps = list(source.blocks()), source.steps
        self._space, self._k = space, config.k

    def summary(self, params: SAEParams) -> dict[str, Any] | None:
        """Held-out numbers of some weights; None when the store has no validation images."""
        if not self.blocks:
            return None
        report = partial(_report, params, self._space, k=self._k)
        return metrics.measure(self.blocks, self.steps, report).summary()

    def line(self, params: SAEParams, step: int, rows: int) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        numbers = self.summary(params) or {"note": "the store has no validation images"}
        measured = {"measured_rows": numbers.pop("rows", 0), **numbers}
        return {"kind": "heldout", "step": step, "rows": rows, **measured}


@partial(jax.jit, static_argnames="k")
def _report(
    params: SAEParams, space: Space, bits: jax.Array, weight: jax.Array, *, k: int
) -> metrics.BatchReport:
    x = bfloat16_rows(bits)
    z = normalize(space, x)
    codes, _ = sae.encode(params, z, k)
    z_hat = sae.decode(codes, params.atoms, params.bias)
    return metrics.BatchReport(
        metrics.batch_sums(x, denormalize(space, z_hat), weight, space.mean),
        metrics.batch_sums(z, z_hat, weight, params.bias),
        metrics.fired(codes, len(params.atoms), weight),
    )


class Watch:
    """Progress bar, metrics.jsonl and the check that the loss is finite. Changes no number."""

    def __init__(
        self, config: TrainSAEConfig, plan: Plan, log: runs.Log, first: int, *, saved: int | None
    ) -> None:
        """Start at optimizer step `first`."""
        self._config, self._plan, self._log, self._first = config, plan, log, first
        self._waiting: list[update.Metrics] = []
        self._schedule = update.learning_rate(
            update.Rate(plan.lr, plan.steps, config.warmup, config.decay)
        )
        self._started = time.perf_counter()
        self._flushed = first
        self.saved = saved
        self.bar = tqdm(
            total=plan.steps * config.batch,
            initial=first * config.batch,
            unit="row",
            unit_scale=True,
            desc=f"{config.kind} {config.site}",
        )

    @property
    def rate(self) -> float | None:
        """Rows a second so far, compilation and held-out measurements included."""
        seen = (self._flushed - self._first) * self._config.batch
        return round(seen / max(time.perf_counter() - self._started, 1e-9), 1) if seen else None

    def see(
        self, step: int, numbers: update.Metrics, *, flush: bool, checkpoints: Checkpoints
    ) -> None:
        """Take the numbers of a step; every `log_every` steps fetch, check and write them."""
        self._waiting.append(numbers)
        if not flush and step % self._config.log_every:
            return
        fetched = jax.device_get(self._waiting)
        self._waiting = []
        for before, one in enumerate(reversed(fetched)):
            if not (np.isfinite(one.loss) and np.isfinite(one.gradient)):
                raise ValueError(
                    f"expected a finite loss, got {float(one.loss)} (gradient norm "
                    f"{float(one.gradient)}) at step {step - before}; last good checkpoint: "
                    f"{checkpoints.name(self.saved)}; start again with a lower --lr"
                )
        mean = update.Metrics(*(float(np.mean(values)) for values in zip(*fetched, strict=True)))
        mean = mean._replace(dead=float(fetched[-1].dead))
        self._log.write(
            kind="train",
            step=step,
            rows=step * self._config.batch,
            **mean._asdict(),
            lr=float(self._schedule(step - 1)),
            seconds=round(time.perf_counter() - self._started, 3),
        )
        self.bar.update((step - self._flushed) * self._config.batch)
        self._flushed = step
        self.bar.set_postfix_str(f"FVU {mean.loss:.3f} L0 {mean.l0:.1f} dead {mean.dead:.1%}")
