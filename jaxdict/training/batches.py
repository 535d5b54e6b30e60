"""What a training is fed: frozen normalizations, and batches that are read once for all its members."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from harvest.store import Store
from jaxdict.devices import mesh
from jaxdict.rows import (
    Loader,
    Normalization,
    Normalizer,
    ahead,
    fit_once,
    image_rows,
    load_normalization,
    source_of,
    to_device,
    watched,
)
from jaxdict.runs import NORMALIZATION, TARGET_NORMALIZATION
from jaxdict.sae import Batch, TrainSAEConfig
from jaxdict.training.sweep import Group


class Fitted(NamedTuple):
    """Normalizations of a group: of its site, and of its target's if it has one."""

    site: Normalization
    target: Normalization | None

    @property
    def out(self) -> Normalization:
        """Of the rows that are rebuilt."""
        return self.site if self.target is None else self.target


def fit_group(group: Group, store: Store, found: bool, chief: bool) -> Fitted:
    """The frozen normalizations of a group, fitted with a progress bar, kept by its first member."""
    config = group.members[0].config
    keeper = config.out / NORMALIZATION

    def fit(site: str, path: Path) -> Normalization:
        source = source_of(store, site, steps=config.steps).spread(config.fit_rows)
        if not chief:
            return load_normalization(path)
        return fit_once(
            path,
            lambda: image_rows(watched(source, f"normalization {site}")),
            config.normalize,
            floor=config.eigenvalue_floor,
            resume=found,
        )

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        if chief:
            fit(config.site, keeper)
            if config.target:
                fit(config.target, config.out / TARGET_NORMALIZATION)
        multihost_utils.sync_global_devices("normalization")
        found = True
    site = fit(config.site, keeper)
    target = fit(config.target, config.out / TARGET_NORMALIZATION) if config.target else None
    return Fitted(site, target)


class Rows:
    """Batches of all groups, read once a site: an iterator of {site: Batch}, some steps ahead, on the devices."""

    def __init__(
        self,
        config: TrainSAEConfig,
        store: Store,
        groups: list[Group],
        fitted: list[Fitted],
        devices: Mesh | None,
    ) -> None:
        """Plan the order of every site's rows; nothing is read yet."""
        self._config, self._devices = config, devices
        self._normalizers: dict[str, tuple[str, Normalizer, str, Normalizer | None]] = {}
        for group, fit in zip(groups, fitted, strict=True):
            normalizer = mesh.everywhere(to_device(fit.site), devices)
            target = None
            if fit.target is not None:
                target = mesh.everywhere(to_device(fit.target), devices)
            self._normalizers[self.of(group)] = (group.site, normalizer, config.target, target)
        sites = {site for site, _, _, _ in self._normalizers.values()} | (
            {config.target} if config.target else set()
        )
        sources = {site: source_of(store, site, steps=config.steps) for site in sorted(sites)}
        seed = config.seed if config.order_seed < 0 else config.order_seed
        needed = sum(source.bytes for source in sources.values())
        budget = int(config.memory * 2**30)
        self.loaders = {
            site: Loader(
                source,
                batch=config.batch,
                seed=seed,
                pool=config.pool,
                memory=source.bytes if needed <= budget else 0,
            )
            for site, source in sources.items()
        }

    @staticmethod
    def of(group: Group) -> str:
        """Under which name a group finds its batch."""
        return f"{group.site} {group.members[0].config.normalize}"

    def batches(self, first: int) -> Any:
        """A context manager that gives the iterator, from a batch number on."""
        return ahead(self._made(first), depth=3)

    def _made(self, first: int) -> Iterator[dict[str, Batch]]:
        low, high = mesh.own_rows(self._devices, self._config.batch)
        with ExitStack() as stack:
            streams = {}
            for site, loader in self.loaders.items():
                streams[site] = loader.batches(first, own=(low, high))
                stack.callback(streams[site].close)
            while True:
                bits = {
                    site: mesh.place_rows(next(stream), self._devices, low, self._config.batch)
                    for site, stream in streams.items()
                }
                yield {
                    name: Batch(bits[site], normalizer, bits.get(other) if target else None, target)
                    for name, (site, normalizer, other, target) in self._normalizers.items()
                }
