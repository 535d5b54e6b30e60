"""The input of a training: frozen normalizations, and batches that are read once for all its members."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from harvest.store import Store
from jaxdict.devices import Processes, mesh
from jaxdict.rows import (
    Loader,
    Normalization,
    Normalizer,
    NormLimit,
    ahead,
    fit_once,
    image_rows,
    kept_rows,
    limit_once,
    load_normalization,
    print_limits,
    save_normalization,
    source_of,
    to_device,
    watched,
)
from jaxdict.runs import NORM_LIMITS, NORMALIZATION, TARGET_NORMALIZATION
from jaxdict.sae import Batch, TrainSAEConfig
from jaxdict.training.sweep import BatchKey, Group, order_seed_of


class Normalizations(NamedTuple):
    """Normalizations of a group.

    Attributes:
        site: of the rows that are encoded.
        target: of the rows that a transcoder predicts, None for an autoencoder.
    """

    site: Normalization
    target: Normalization | None = None

    @property
    def out(self) -> Normalization:
        """Of the rows that are rebuilt."""
        return self.site if self.target is None else self.target


def find_limits(
    config: TrainSAEConfig,
    groups: list[Group],
    store: Store,
    processes: Processes,
    *,
    resumed: bool,
) -> dict[str, NormLimit]:
    """Norms above which rows are left out, by site; nothing without --max-norm.

    Args:
        config: of the whole run.
        groups: what is trained.
        store: the rows.
        processes: process 0 measures and writes, the others read.
        resumed: whether an earlier start of this run may have measured them.
    """
    data, path = config.data, config.out / NORM_LIMITS
    if not data.max_norm:
        return {}
    sites = sorted({group.config.site for group in groups})
    sources = [source_of(store, one, steps=data.steps, padding=data.padding) for one in sites]
    looked_at = [source.spread(data.fit_rows) for source in sources]
    if processes.chief:
        print_limits(limit_once(path, looked_at, data.max_norm, resume=resumed))
    processes.barrier("norm limits")
    return limit_once(path, looked_at, data.max_norm, resume=True)


def fit_normalizations(
    groups: list[Group],
    store: Store,
    processes: Processes,
    *,
    resumed: bool,
    limits: Mapping[str, NormLimit],
) -> list[Normalizations]:
    """The frozen normalizations of each group, fitted once a site and kept in the folder of every member.

    Args:
        groups: what is trained.
        store: the rows.
        processes: process 0 fits and writes, the others read.
        resumed: whether an earlier start of this run may have fitted them.
        limits: of the norms, by site.
    """
    done: dict[BatchKey, Normalizations] = {}
    for group in groups:
        copies = group.members
        if group.batch_key not in done:
            done[group.batch_key] = _fit(
                group.config, store, processes, resumed=resumed, limits=limits
            )
            copies = copies[1:]
        fitted = done[group.batch_key]
        for member in copies if processes.chief else []:
            save_normalization(fitted.site, member.config.out / NORMALIZATION)
            if fitted.target is not None:
                save_normalization(fitted.target, member.config.out / TARGET_NORMALIZATION)
    return [done[group.batch_key] for group in groups]


def _fit(
    config: TrainSAEConfig,
    store: Store,
    processes: Processes,
    *,
    resumed: bool,
    limits: Mapping[str, NormLimit],
) -> Normalizations:
    data = config.data

    def fit(site: str, path: Path) -> Normalization:
        source = source_of(store, site, steps=data.steps, padding=data.padding).spread(
            data.fit_rows
        )
        return fit_once(
            path,
            lambda: kept_rows(
                image_rows(watched(source, f"normalization {site}")), limits.get(site)
            ),
            data.normalize,
            floor=data.eigenvalue_floor,
            resume=resumed,
        )

    paths = {config.out / NORMALIZATION: config.site}
    if config.target:
        paths[config.out / TARGET_NORMALIZATION] = config.target
    fitted = [fit(site, path) for path, site in paths.items()] if processes.chief else []
    processes.barrier("normalization")
    return Normalizations(*(fitted or map(load_normalization, paths)))


class _Inputs(NamedTuple):
    """What a batch is made of, besides its rows."""

    normalizer: Normalizer
    target_normalizer: Normalizer | None


class TrainingBatches:
    """Batches of all groups, each site read once.

    Attributes:
        loaders: order of the rows, by site.
    """

    def __init__(
        self,
        store: Store,
        groups: list[Group],
        normalizations: list[Normalizations],
        *,
        devices: Mesh | None,
        limits: Mapping[str, NormLimit],
    ) -> None:
        """Plan the order of every site's rows; nothing is read yet.

        Args:
            store: the rows.
            groups: what is trained; how rows are read is alike in all of them.
            normalizations: of each group.
            devices: where batches are to lie, None for one device.
            limits: of the norms, by site.
        """
        config = groups[0].config
        data = config.data
        self._devices, self._rows, self._target = devices, data.batch, config.target
        self._inputs: dict[BatchKey, _Inputs] = {}
        for group, fitted in zip(groups, normalizations, strict=True):
            own, target = (
                None if one is None else mesh.everywhere(to_device(one), devices) for one in fitted
            )
            assert own is not None
            self._inputs[group.batch_key] = _Inputs(own, target)
        sites = {key.site for key in self._inputs} | ({config.target} if config.target else set())
        sources = {
            site: source_of(store, site, steps=data.steps, padding=data.padding)
            for site in sorted(sites)
        }
        needed = sum(source.bytes for source in sources.values())
        resident = needed <= int(data.memory * 2**30)
        self.loaders = {
            site: Loader(
                source,
                batch=data.batch,
                seed=order_seed_of(config),
                pool=data.pool,
                memory=source.bytes if resident else 0,
                limit=limits.get(site),
            )
            for site, source in sources.items()
        }

    def starting_at(self, number: int) -> AbstractContextManager[Iterator[dict[BatchKey, Batch]]]:
        """A context manager that gives an endless iterator, some batches ahead, from batch `number` on."""
        return ahead(self._made(number), depth=3)

    def _made(self, first: int) -> Iterator[dict[BatchKey, Batch]]:
        low, high = mesh.own_rows(self._devices, self._rows)
        with ExitStack() as stack:
            streams = {}
            for site, loader in self.loaders.items():
                streams[site] = loader.batches(first, own=(low, high))
                stack.callback(streams[site].close)
            while True:
                bits = {
                    site: mesh.place_rows(next(stream), self._devices, low, self._rows)
                    for site, stream in streams.items()
                }
                target = bits[self._target] if self._target else None
                yield {
                    key: Batch(bits[key.site], inputs.normalizer, target, inputs.target_normalizer)
                    for key, inputs in self._inputs.items()
                }
