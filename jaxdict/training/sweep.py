"""What one `jaxdict train sae` trains: a member for each site and each combination of a sweep.

Members that a compiled step can serve together form a group; see `Group`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax

from harvest.flags import expect, in_memory
from harvest.sites import match_sites
from harvest.store import Store
from jaxdict.flags import settings_of, sweepable
from jaxdict.rows import source_of
from jaxdict.sae import (
    SINGLE_DEVICE,
    AdamConfig,
    Execution,
    Hyperparams,
    ScheduleConfig,
    StepConfig,
    TrainSAEConfig,
    kinds,
    learning_rate_schedule,
)


class ResolvedSettings(NamedTuple):
    """The settings that a config leaves to the data, as config.json shows them under `resolved`.

    Attributes:
        d: width of the site.
        m: atoms.
        k_aux: slots of the AuxK codes.
        lr: peak learning rate.
        optimizer_steps: steps of the whole run.
        slots: active atoms that a row may have.
        sparsity: weight of the sparsity penalty, 0 for a kind without one.
        prefixes: sizes of nested dictionaries, of a kind that has them.
    """

    d: int
    m: int
    k_aux: int
    lr: float
    optimizer_steps: int
    slots: int
    sparsity: float
    prefixes: tuple[int, ...]


def resolve(config: TrainSAEConfig, d: int) -> ResolvedSettings:
    """Fill in what the config leaves open, now that the width is known.

    m = 8 d. lr = 2e-3 sqrt(1024 / m): the 1/sqrt(m) rule of Gao et al. 2024, through the better of two rates
    tried on a store of the embedded model (see docs/training.md). k_aux = min(d / 2, 2 k), where they have
    d / 2, to keep steps with dead features cheap.

    Raises:
        ValueError: k is above m.
    """
    model, aux = config.model, config.dead_features
    m = model.atoms or 8 * d
    if model.k > m:
        raise ValueError(f"--k: expected at most the number of atoms ({m}), got {model.k}")
    kind = kinds.REGISTRY[model.kind]
    return ResolvedSettings(
        d=d,
        m=m,
        k_aux=min(aux.aux_k or max(1, min(d // 2, 2 * model.k)), m) if aux.aux else 0,
        lr=config.optimizer.lr or 2e-3 * math.sqrt(1024 / m),
        optimizer_steps=steps_of(config.data.rows, config),
        slots=kinds.slots_of(model.kind, model.k, m, asked=model.slots),
        sparsity=config.sparsity_penalty.sparsity or kind.sparsity,
        prefixes=kind.prefixes(m),
    )


class BatchKey(NamedTuple):
    """What groups that are given the same batch have in common."""

    site: str
    normalize: str


class Leg(NamedTuple):
    """A part of a run that was given more rows later.

    Attributes:
        step: optimizer steps that it had taken then.
        rows: that had been asked for until then.
    """

    step: int
    rows: int


@dataclass(frozen=True)
class Member:
    """One dictionary to be trained.

    Attributes:
        name: its folder in a run of several, such as double.2.img/lr=0.001_seed=0; empty in a run of one.
        config: its settings, without sweep: the run that it would be on its own.
        resolved: what the settings that it leaves open come to.
        legs: of a run that was given more rows, the parts before the last one.
    """

    name: str
    config: TrainSAEConfig
    resolved: ResolvedSettings
    legs: tuple[Leg, ...] = ()


@dataclass
class Group:
    """Members that one compiled step serves: the same site, shapes and fixed numbers.

    Attributes:
        step_config: the fixed numbers.
        members: they differ in what `hyperparams_of` gives and in their first weights alone.
    """

    step_config: StepConfig
    members: list[Member] = field(default_factory=list)

    @property
    def stacked(self) -> int:
        """Members on a first axis of the state; 0 for a single one, which needs none."""
        return len(self.members) if len(self.members) > 1 else 0

    @property
    def config(self) -> TrainSAEConfig:
        """Settings of its first member, for those that all of them share."""
        return self.members[0].config

    @property
    def batch_key(self) -> BatchKey:
        """Under which its batch is found."""
        return BatchKey(self.config.site, self.config.data.normalize)


def sites_of(config: TrainSAEConfig, store: Store) -> list[str]:
    """Sites of the store that --site names, in the store's order.

    Raises:
        ValueError: a part of it names none.
    """
    found, missing = match_sites(store.sites, [config.site])
    known = f"a site of {store.path} ({', '.join(store.sites)})"
    expect(not missing, "site", known, next(iter(missing), None), "pick one of them")
    return found


def read_sweep(parts: tuple[str, ...]) -> dict[str, list[Any]]:
    """Values of each swept setting, from such as ("lr=1e-4,2e-4", "k=16,32").

    Raises:
        ValueError: no such setting, one that cannot be swept, or a value of another type.
    """
    fields, allowed = settings_of(TrainSAEConfig), sweepable(TrainSAEConfig)
    found: dict[str, list[Any]] = {}
    for part in parts:
        name, equals, values = part.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or name not in allowed:
            raise ValueError(
                "--sweep: expected name=value,value with a name among "
                f"{', '.join(sorted(allowed))}, got {part!r}; correct it"
            )
        kind = type(fields[name].default)
        try:
            read = [_whole(value) if kind is int else kind(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(
                f"--sweep: expected values of type {kind.__name__} for {name}, got {values!r}"
            ) from None
        if name in found or len(set(read)) != len(read):
            raise ValueError(f"--sweep: expected each setting and value once, got {part!r}")
        found[name] = read
    return found


def expand(config: TrainSAEConfig, store: Store) -> list[Member]:
    """The members of a run: sites times combinations of the sweep.

    Raises:
        ValueError: a site, a sweep or a combination is wrong.
    """
    sites, sweep = sites_of(config, store), read_sweep(config.sweep)
    if config.target and len(sites) > 1:
        raise ValueError(f"--target: expected one --site with it, got {', '.join(sites)}")
    times = config.data.max_norm
    expect(not (config.target and times), "max_norm", "0 beside --target", times, "leave one out")
    if config.target:
        source_of(store, sites[0], steps=config.data.steps).beside(config.target)
    members = []
    for site in sites:
        for values in itertools.product(*sweep.values()):
            chosen = dict(zip(sweep, values, strict=True))
            label = "_".join(f"{name}={_short(value)}" for name, value in chosen.items())
            parts = [site] if len(sites) > 1 else []
            name = "/".join(parts + ([label] if label else []))
            own = {"site": site, "sweep": (), "out": Path(config.out / name), **chosen}
            if sweep:
                own["order_seed"] = order_seed_of(config)
            single = config.replace(**own)
            members.append(Member(name, single, resolve(single, int(store.shape(site)[3]))))
    return members


def check_sizes(members: list[Member], store: Store) -> None:
    """Refuse what this machine's memory cannot hold, before anything is made.

    Raises:
        ValueError: weights and moments, or a batch, take more than all of it; or there are too many steps to count.
    """
    first = members[0]
    data, m = first.config.data, max(member.resolved.m for member in members)
    parts = max(1, jax.process_count())
    weights = sum(_numbers(member, store) for member in members)
    what = f"weights and moments of {len(members)} dictionaries" if len(members) > 1 else ""
    in_memory(("atoms",), m, 4 * weights / parts, what or "the weights and their moments")
    dense = 4 * data.batch * (m + 3 * first.resolved.d) / parts
    in_memory(("batch", "atoms"), data.batch, dense, "a batch and its activations on all atoms")
    steps, most = first.resolved.optimizer_steps, 2**31 - 1
    expect(steps <= most, "rows", f"at most {most:,} optimizer steps", data.rows, "lower --rows")


def _numbers(member: Member, store: Store) -> int:
    """Numbers in a member's weights, the moments of Adam and the average."""
    config, resolved = member.config, member.resolved
    d_out = int(store.shape(config.target or config.site)[3])
    return resolved.m * (resolved.d + d_out + 1) * (4 if config.optimizer.ema else 3)


def order_seed_of(config: TrainSAEConfig) -> int:
    """Seed of the order of the rows."""
    return config.seed if config.data.order_seed < 0 else config.data.order_seed


def grouped(members: list[Member], execution: Execution) -> list[Group]:
    """Members by what a compiled step is made for, each group in the order they came."""
    groups: dict[tuple[Any, ...], Group] = {}
    for member in members:
        step_config, config = step_config_of(member, execution), member.config
        own = (config.data.normalize, config.dead_features.resample)
        key = (config.site, member.resolved.m, *own, step_config)
        groups.setdefault(key, Group(step_config)).members.append(member)
    return list(groups.values())


def step_config_of(member: Member, execution: Execution = SINGLE_DEVICE) -> StepConfig:
    """All fixed numbers of a member's step."""
    config, resolved = member.config, member.resolved
    model, optimizer, devices = config.model, config.optimizer, config.devices
    # It stays as it was if more rows came later: the penalty has risen by then, or is about to.
    first_steps = steps_of(member.legs[0].rows, config) if member.legs else resolved.optimizer_steps
    ramp = round(config.sparsity_penalty.ramp * first_steps)
    return StepConfig(
        kind=model.kind,
        k=model.k,
        slots=resolved.slots,
        k_aux=resolved.k_aux,
        aux_form=config.dead_features.aux_form,
        dead_rows=config.dead_features.dead_rows,
        ema=optimizer.ema,
        schedule=schedule_of(member),
        adam=AdamConfig(optimizer.b1, optimizer.b2, optimizer.eps, optimizer.clip),
        prefixes=resolved.prefixes,
        ramp=ramp if resolved.sparsity else 0,
        execution=execution._replace(
            bfloat16=devices.precision == "bfloat16", recall=devices.recall
        ),
        **kinds.REGISTRY[model.kind].own_settings(config),
    )


def schedule_of(member: Member) -> ScheduleConfig:
    """The learning rate's schedule: that of all rows; where it was lower before more came, it rises to it."""
    optimizer = member.config.optimizer
    rows = [*(leg.rows for leg in member.legs), member.config.data.rows]
    schedules = [
        ScheduleConfig(steps_of(one, member.config), optimizer.warmup, optimizer.decay)
        for one in rows
    ]
    schedule = schedules[0]
    for leg, longer in zip(member.legs, schedules[1:], strict=True):
        before, after = (float(learning_rate_schedule(one)(leg.step)) for one in (schedule, longer))
        share = before / after if before < after else 1.0
        schedule = longer._replace(since=leg.step, share=share) if share < 1 else longer
    return schedule


def steps_of(rows: int, config: TrainSAEConfig) -> int:
    """Optimizer steps that so many rows take."""
    return -(-rows // config.data.batch)


def hyperparams_of(member: Member, variance: float) -> Hyperparams:
    """The numbers in which members of a group may differ, as Python floats."""
    resolved = member.resolved
    return Hyperparams(resolved.lr, member.config.dead_features.aux, resolved.sparsity, variance)


def _whole(text: str) -> int:
    """A whole number, which may be written as 1e6; ValueError for anything else."""
    value = float(text)
    if not value.is_integer():
        raise ValueError(text)
    return int(value)


def _short(value: Any) -> str:
    """A value in a folder's name: as short as it can be without being that of another value."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
