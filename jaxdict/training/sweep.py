"""What one `jaxdict train sae` trains: a member for each site and each combination of a sweep.

Members that a compiled step can serve together form a group; see `Group`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from harvest.store import Store
from jaxdict.rows import match_sites, source_of
from jaxdict.sae import (
    SINGLE_DEVICE,
    AdamConfig,
    Execution,
    Hyperparams,
    ScheduleConfig,
    StepConfig,
    TrainSAEConfig,
    kinds,
)

_FIXED = ("store", "out", "site", "sweep", "resume", "batch", "rows", "steps", "pool", "order_seed")
_FIXED += ("memory", "mesh", "coordinator", "processes", "process", "tracker", "preset", "fit_rows")
_FIXED += (
    "log_every",
    "save_every",
    "eval_every",
    "eval_rows",
    "keep",
    "target",
    "eigenvalue_floor",
)
_PER_MEMBER = ("lr", "aux", "sparsity", "seed")
"""Settings in which members of one group may differ."""


class Plan(NamedTuple):
    """The settings that a config leaves to the data.

    Attributes:
        d: width of the site.
        m: atoms.
        k_aux: slots of the AuxK codes.
        lr: peak learning rate.
        steps: optimizer steps.
        slots: active atoms that a row may have.
        sparsity: weight of the sparsity penalty, 0 for a kind without one.
        prefixes: sizes of nested dictionaries, of a kind that has them.
    """

    d: int
    m: int
    k_aux: int
    lr: float
    steps: int
    slots: int
    sparsity: float
    prefixes: tuple[int, ...]


def resolve(config: TrainSAEConfig, d: int) -> Plan:
    """Fill in what the config leaves open, now that the width is known.

    m = 8 d. lr = 2e-3 sqrt(1024 / m): the 1/sqrt(m) rule of Gao et al. 2024, through
    the better of the two rates tried on a store of the embedded model (held-out FVU 0.100 with
    2e-3, 0.110 with 8e-4, at m = 1024, k = 16, 3M rows, Adam's b1 0.9 and b2 0.999). k_aux = min(d / 2, 2 k), where they
    have d / 2, to keep steps that revive features cheap.

    Raises:
        ValueError: k is above m.
    """
    m = config.atoms or 8 * d
    if config.k > m:
        raise ValueError(f"--k: expected at most the number of atoms ({m}), got {config.k}")
    k_aux = min(config.aux_k or max(1, min(d // 2, 2 * config.k)), m) if config.aux else 0
    lr = config.lr or 2e-3 * math.sqrt(1024 / m)
    kind = kinds.REGISTRY[config.kind]
    slots = kind.slots(config.k, m, asked=config.slots)
    steps = -(-config.rows // config.batch)
    sparsity = config.sparsity or kind.sparsity
    return Plan(d, m, k_aux, lr, steps, slots, sparsity, kind.prefixes(m))


@dataclass(frozen=True)
class Member:
    """One dictionary to be trained.

    Attributes:
        name: its folder in a run of several, such as double.2.img/lr=0.001_seed=0; empty in a run of one.
        config: its settings, without sweep: the run that it would be on its own.
        plan: what they resolve to.
    """

    name: str
    config: TrainSAEConfig
    plan: Plan


@dataclass
class Group:
    """Members that one compiled step serves: the same site, shapes and fixed numbers.

    Attributes:
        members: they differ in `_PER_MEMBER` alone.
        step_config: the fixed numbers.
    """

    step_config: StepConfig
    members: list[Member] = field(default_factory=list)

    @property
    def stacked(self) -> int:
        """Members on a first axis of the state; 0 for a single one, which needs none."""
        return len(self.members) if len(self.members) > 1 else 0

    @property
    def site(self) -> str:
        """Site that all of them read."""
        return self.members[0].config.site


def sites_of(config: TrainSAEConfig, store: Store) -> list[str]:
    """Sites of the store that --site names, in the store's order.

    Raises:
        ValueError: a part of it names none.
    """
    found, missing = match_sites(store.sites, [config.site])
    if missing:
        raise ValueError(
            f"--site: expected a site of {store.path} ({', '.join(store.sites)}), got "
            f"{missing[0]!r}; pick one of them"
        )
    return found


def read_sweep(parts: tuple[str, ...]) -> dict[str, list[Any]]:
    """Values of each swept setting, from such as ("lr=1e-4,2e-4", "k=16,32").

    Raises:
        ValueError: no such setting, one that cannot be swept, or a value of another type.
    """
    fields = {field.name: field for field in dataclasses.fields(TrainSAEConfig)}
    found: dict[str, list[Any]] = {}
    for part in parts:
        name, equals, values = part.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or name not in fields or name in _FIXED:
            allowed = ", ".join(sorted(set(fields) - set(_FIXED)))
            raise ValueError(
                f"--sweep: expected name=value,value with a name among {allowed}, got {part!r}; "
                "correct it"
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
    if config.target:
        source_of(store, sites[0], steps=config.steps).beside(config.target)
    order = config.seed if config.order_seed < 0 else config.order_seed
    members = []
    for site in sites:
        for values in itertools.product(*sweep.values()):
            chosen = dict(zip(sweep, values, strict=True))
            label = "_".join(f"{name}={_short(value)}" for name, value in chosen.items())
            parts = [site] if len(sites) > 1 else []
            name = "/".join(parts + ([label] if label else []))
            own = {"site": site, "sweep": (), "out": Path(config.out / name), **chosen}
            if sweep:
                own["order_seed"] = order
            single = dataclasses.replace(config, **own)
            members.append(Member(name, single, resolve(single, int(store.shape(site)[3]))))
    return members


def grouped(members: list[Member], execution: Execution) -> list[Group]:
    """Members by what a compiled step is made for, each group in the order they came."""
    groups: dict[tuple[Any, ...], Group] = {}
    for member in members:
        step_config, config = step_config_of(member, execution), member.config
        key = (config.site, member.plan.m, config.normalize, config.resample, step_config)
        groups.setdefault(key, Group(step_config)).members.append(member)
    return list(groups.values())


def step_config_of(member: Member, execution: Execution = SINGLE_DEVICE) -> StepConfig:
    """All fixed numbers of a member's step."""
    config, plan = member.config, member.plan
    return StepConfig(
        kind=config.kind,
        k=config.k,
        slots=plan.slots,
        k_aux=plan.k_aux,
        aux_form=config.aux_form,
        dead_rows=config.dead_rows,
        ema=config.ema,
        rate=ScheduleConfig(plan.steps, config.warmup, config.decay),
        adam=AdamConfig(config.b1, config.b2, config.eps, config.clip),
        prefixes=plan.prefixes,
        ramp=round(config.ramp * plan.steps) if plan.sparsity else 0,
        execution=execution._replace(bfloat16=config.precision == "bfloat16", recall=config.recall),
        **kinds.REGISTRY[config.kind].own_settings(config),
    )


def hyperparams_of(member: Member, variance: float) -> Hyperparams:
    """The numbers in which members of a group may differ, as Python floats."""
    plan = member.plan
    return Hyperparams(plan.lr, member.config.aux, plan.sparsity, variance)


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
