"""An ITDA dictionary while it is built: its state, one batch more, and its checkpoints."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdict.itda import growth
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.growth import Target, power_of_two
from jaxdict.itda.threshold_search import Trial, next_threshold
from jaxdict.pursuit import PreparedAtoms, choose_method
from jaxdict.rows import Batch, Normalizer, SinglePass, bfloat16_rows, normalize
from jaxdict.runs import Checkpoints

# The first capacity. Smaller ones would cost more in compiling than they save in work.
START = 256


class Normalizers(NamedTuple):
    """Normalized spaces of the rows that are read and, if there is a target, of those that are rebuilt."""

    site: Normalizer
    target: Normalizer | None = None

    @property
    def out(self) -> Normalizer:
        """Of the rows that are rebuilt."""
        return self.site if self.target is None else self.target


class Build(NamedTuple):
    """One trial under way: all that a checkpoint holds.

    Attributes:
        atoms: prepared atoms, zero beyond the first m.
        partner: float [capacity, d_out], what each atom stands for at the target, or None.
        m: atoms in use.
        source: int32 [capacity, 3], where each atom came from.
        threshold: per-row FVU above which a row joins.
        batch: batches looked at in this trial.
        total: batches looked at in all trials.
        trials: finished trials.
    """

    atoms: PreparedAtoms
    partner: Array | None
    m: int
    source: np.ndarray
    threshold: float
    batch: int
    total: int
    trials: tuple[Trial, ...]


def fresh(
    config: TrainITDAConfig,
    once: SinglePass,
    trials: tuple[Trial, ...],
    threshold: float | None = None,
    total: int = 0,
) -> Build:
    """An empty dictionary before the first batch of a trial."""
    if threshold is None:
        threshold = config.threshold or next_threshold((), config.atoms, once.rows)
    assert threshold is not None
    d = once.source.d
    # With a small target the last capacity is also the first: one compilation.
    capacity = power_of_two(min(config.atoms, 4 * START)) if config.atoms else START
    gram = choose_method(once.rows, d, max(capacity, config.atoms), config.k) == "gram"
    atoms = growth.empty(capacity, d, gram=gram)
    partner = None if once.target is None else jnp.zeros((capacity, once.target.d))
    places = np.zeros((capacity, 3), np.int32)
    return Build(atoms, partner, 0, places, float(threshold), 0, total, trials)


def grow_by(
    config: TrainITDAConfig, normalizers: Normalizers, build: Build, batch: Batch, most: int
) -> tuple[Build, dict[str, Any], bool]:
    """Look at one batch and let its rows join, unless that makes more than `most` atoms.

    Returns:
        The build after the batch; what was seen, before any row joined: mean per-row FVU (of the
        target, if there is one), share of rows above the threshold, L0; False if there were too many.
    """
    z = normalized(normalizers.site, jnp.asarray(batch.bits), batch.count)
    target = None
    if build.partner is not None:
        assert normalizers.target is not None and batch.target is not None
        y = normalized(normalizers.target, jnp.asarray(batch.target), batch.count)
        target = Target(build.partner, y)
    look = growth.look(
        build.atoms, z, build.threshold, config.duplicate, target, k=config.k, rule=config.rule
    )
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
    atoms, source, partner = build.atoms, build.source, build.partner
    if m > atoms.m:
        atoms = growth.grow(atoms, power_of_two(m))
        more = atoms.m - len(source)
        source = np.pad(source, ((0, more), (0, 0)))
        partner = None if partner is None else jnp.pad(partner, ((0, more), (0, 0)))
    atoms = growth.append(atoms, build.m, look.unit, look.rank)
    if partner is not None:
        assert look.partner is not None
        partner = growth.append_partners(partner, build.m, look.partner, look.rank)
    source[build.m + rank[rank >= 0]] = batch.places[rank >= 0]
    return counted._replace(atoms=atoms, partner=partner, source=source, m=m), seen, True


@jax.jit
def normalized(normalizer: Normalizer, bits: jax.Array, count: int) -> jax.Array:
    """bfloat16 bits [n, d] to rows in the dictionary's own space; zero from row `count` on."""
    z = normalize(normalizer, bfloat16_rows(bits))
    return jnp.where(jnp.arange(len(bits))[:, None] < count, z, 0)


def save(checkpoints: Checkpoints, build: Build) -> None:
    """Write a checkpoint of a trial, in the background."""
    facts = {
        "capacity": build.atoms.m,
        "gram": build.atoms.gram is not None,
        "d_out": None if build.partner is None else build.partner.shape[1],
        "m": build.m,
        "threshold": build.threshold,
        "batch": build.batch,
        "total": build.total,
        "trials": [trial._asdict() for trial in build.trials],
    }
    # The Gram matrix too: computed anew it may differ in the last bit.
    every = {
        "unit": build.atoms.unit,
        "source": build.source,
        "gram": build.atoms.gram,
        "partner": build.partner,
    }
    arrays = {name: value for name, value in every.items() if value is not None}
    checkpoints.save(build.total, arrays, facts)


def stored(checkpoints: Checkpoints, d: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arrays and facts of the newest checkpoint, for atoms of width d."""
    facts = checkpoints.facts()
    capacity = facts["capacity"]
    template: dict[str, Any] = {
        "unit": np.zeros((capacity, d), np.float32),
        "source": np.zeros((capacity, 3), np.int32),
    }
    if facts["gram"]:
        template["gram"] = np.zeros((capacity, capacity), np.float32)
    if facts["d_out"] is not None:
        template["partner"] = np.zeros((capacity, facts["d_out"]), np.float32)
    arrays, _ = checkpoints.restore(template)
    return arrays, facts


def restore(checkpoints: Checkpoints, d: int) -> Build:
    """The build of the newest checkpoint."""
    arrays, facts = stored(checkpoints, d)
    unit = jnp.asarray(arrays["unit"])
    gram = jnp.asarray(arrays["gram"]) if facts["gram"] else None
    partner = jnp.asarray(arrays["partner"]) if facts["d_out"] is not None else None
    return Build(
        PreparedAtoms(unit, jnp.ones(len(unit)), gram),
        partner,
        facts["m"],
        np.array(arrays["source"]),
        facts["threshold"],
        facts["batch"],
        facts["total"],
        tuple(Trial(**trial) for trial in facts["trials"]),
    )
