"""An ITDA dictionary while it is built: its state, the next batch, and its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.growing_atoms import (
    GrowingAtoms,
    append,
    empty_atoms,
    enlarge,
    power_of_two,
)
from jaxdict.itda.select import select_rows
from jaxdict.itda.threshold_search import Trial, next_threshold
from jaxdict.pursuit import PreparedAtoms, choose_method
from jaxdict.rows import LabelledRows, Normalizer, SinglePass, bfloat16_rows, normalize
from jaxdict.runs import Checkpoints

# The first capacity: a smaller one would cost more in compiling than it saves in work.
START = 256


class Normalizers(NamedTuple):
    """Normalizers of the rows that are read and, with a target, of the rows that are rebuilt."""

    site: Normalizer
    target: Normalizer | None = None

    @property
    def out(self) -> Normalizer:
        """Of the rows that are rebuilt."""
        return self.site if self.target is None else self.target


class Build(NamedTuple):
    """The state of a trial: all that a checkpoint holds.

    Attributes:
        atoms: the atoms, zero beyond the first m.
        m: atoms in use.
        source: int32 [capacity, 3], (image, step, token) that each atom came from.
        threshold: per-row FVU above which a row joins.
        batch: batches seen in this trial.
        total: batches seen in all trials.
        trials: finished trials.
    """

    atoms: GrowingAtoms
    m: int
    source: np.ndarray
    threshold: float
    batch: int
    total: int
    trials: tuple[Trial, ...]


def empty_build(
    config: TrainITDAConfig,
    single_pass: SinglePass,
    *,
    trials: tuple[Trial, ...] = (),
    threshold: float | None = None,
    total: int = 0,
) -> Build:
    """An empty dictionary before the first batch of a trial.

    Args:
        config: settings.
        single_pass: the rows to build from.
        trials: finished trials.
        threshold: of this trial; that of the first trial by default.
        total: batches seen in all trials.
    """
    if threshold is None:
        threshold = config.threshold or next_threshold((), config.atoms, single_pass.rows)
    assert threshold is not None
    d, target = single_pass.source.d, single_pass.target
    # If few atoms are asked for, the first capacity is also the last: one compilation.
    capacity = power_of_two(min(config.atoms, 4 * START)) if config.atoms else START
    gram = choose_method(single_pass.rows, d, max(capacity, config.atoms), config.k) == "gram"
    atoms = empty_atoms(capacity, d, d_out=None if target is None else target.d, gram=gram)
    source = np.zeros((capacity, 3), np.int32)
    return Build(
        atoms, m=0, source=source, threshold=float(threshold), batch=0, total=total, trials=trials
    )


def add_batch(
    build: Build, batch: LabelledRows, *, config: TrainITDAConfig, normalizers: Normalizers
) -> tuple[Build, dict[str, Any], bool]:
    """Encode one batch and let its rows join, unless that makes more atoms than are asked for.

    Args:
        build: before the batch.
        batch: its rows.
        config: settings.
        normalizers: of the rows.

    Returns:
        The build after the batch; numbers from before any row joined: mean per-row FVU (of the
        target, if there is one), share of rows above the threshold, L0; False if the atoms were too
        many.
    """
    z = normalized(normalizers.site, jnp.asarray(batch.bits), batch.count)
    y = None
    if build.atoms.target is not None:
        assert normalizers.target is not None and batch.target is not None
        y = normalized(normalizers.target, jnp.asarray(batch.target), batch.count)
    selection = select_rows(
        build.atoms,
        z,
        y,
        threshold=build.threshold,
        duplicate=config.duplicate,
        k=config.k,
        rule=config.rule,
    )
    fvu, l0, rank, joining = jax.device_get(
        (selection.fvu, selection.l0, selection.rank, selection.joining)
    )
    numbers = {
        "threshold": build.threshold,
        "fvu": float(fvu[: batch.count].mean()),
        "over": float((fvu[: batch.count] > build.threshold).mean()),
        "l0": float(l0[: batch.count].mean()),
    }
    counted = build._replace(batch=build.batch + 1, total=build.total + 1)
    if not joining:
        return counted, numbers, True
    m = build.m + int(joining)
    if config.atoms and m > config.atoms:
        return counted._replace(m=m), numbers, False
    atoms, source = build.atoms, build.source
    if m > atoms.capacity:
        atoms = enlarge(atoms, power_of_two(m))
        source = np.pad(source, ((0, atoms.capacity - len(source)), (0, 0)))
    atoms = append(
        atoms, build.m, unit=selection.unit, rank=selection.rank, target=selection.target
    )
    source[build.m + rank[rank >= 0]] = batch.places[rank >= 0]
    return counted._replace(atoms=atoms, source=source, m=m), numbers, True


@jax.jit
def normalized(normalizer: Normalizer, bits: jax.Array, count: int) -> jax.Array:
    """bfloat16 bits [n, d] to rows in the dictionary's own space; zero from row `count` on."""
    z = normalize(normalizer, bfloat16_rows(bits))
    return jnp.where(jnp.arange(len(bits))[:, None] < count, z, 0)


def save(checkpoints: Checkpoints, build: Build) -> None:
    """Write a checkpoint of a trial, in the background."""
    prepared, target = build.atoms
    facts = {
        "capacity": build.atoms.capacity,
        "gram": prepared.gram is not None,
        "d_out": None if target is None else target.shape[1],
        "m": build.m,
        "threshold": build.threshold,
        "batch": build.batch,
        "total": build.total,
        "trials": [trial._asdict() for trial in build.trials],
    }
    # The Gram matrix as well, since recomputing it may change the last bit.
    every = {
        "unit": prepared.unit,
        "source": build.source,
        "gram": prepared.gram,
        "partner": target,
    }
    arrays = {name: value for name, value in every.items() if value is not None}
    checkpoints.save(build.total, arrays, facts)


def stored(
    checkpoints: Checkpoints, d: int, *, place: Callable[[np.ndarray], Any] = np.asarray
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and facts of the newest checkpoint, for atoms of width d; `place` says where the large ones go."""
    facts = checkpoints.facts()
    capacity = facts["capacity"]
    shapes = {"unit": (capacity, d)}
    if facts["gram"]:
        shapes["gram"] = (capacity, capacity)
    if facts["d_out"] is not None:
        shapes["partner"] = (capacity, facts["d_out"])
    template = {
        name: jax.ShapeDtypeStruct(shape, np.dtype(np.float32)) for name, shape in shapes.items()
    }
    template["source"] = jax.ShapeDtypeStruct((capacity, 3), np.dtype(np.int32))
    places = dict.fromkeys(shapes, place) | {"source": np.asarray}
    return checkpoints.restore(template, place=places)


def restore(checkpoints: Checkpoints, d: int) -> Build:
    """The build of the newest checkpoint."""
    arrays, facts = stored(checkpoints, d, place=jnp.array)
    unit, gram, target = arrays["unit"], arrays.get("gram"), arrays.get("partner")
    return Build(
        GrowingAtoms(PreparedAtoms(unit, jnp.ones(len(unit), unit.dtype), gram), target),
        facts["m"],
        arrays["source"],
        facts["threshold"],
        facts["batch"],
        facts["total"],
        tuple(Trial(**trial) for trial in facts["trials"]),
    )
