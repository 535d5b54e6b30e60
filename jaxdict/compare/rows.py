"""CKA and SVCCA of sites on the same rows, read a few images at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from harvest.store import (
    Store,
    as_it_was,
    before,
    check_alike,
    expect_from,
    open_store,
    print_growth,
    stream_of,
)
from jaxdict.compare.config import CompareConfig
from jaxdict.compare.similarity import CrossCovariance, linear_cka, svcca, whitened_components
from jaxdict.compare.sources import ComparedDictionary
from jaxdict.rows import Source, floats, print_padding, source_of, without_padding

_BLOCK = 128 * 2**20
"""Bytes of rows in float64 that are worked on at a time, about."""


class RowSimilarity(NamedTuple):
    """How alike sites are on the same rows.

    Attributes:
        cka: float64 [dictionary, dictionary], NaN for sites of different streams.
        svcca: the same.
        rows: int64 [dictionary], rows that were read of each site.
        components: int64 [dictionary], components that SVCCA keeps of each site.
    """

    cka: np.ndarray
    svcca: np.ndarray
    rows: np.ndarray
    components: np.ndarray


class _SiteCovariance(NamedTuple):
    """What is kept of C_xx of one site.

    Attributes:
        norm: ||C_xx||_F.
        scale: float64 [d], what each dimension is multiplied by.
        components: `whitened_components`.
    """

    norm: float
    scale: np.ndarray
    components: np.ndarray


def open_stores(
    paths: Sequence[str], dictionaries: Sequence[ComparedDictionary]
) -> dict[str, Store]:
    """Open stores of the same prompts, one for each that the dictionaries come from.

    Args:
        paths: folders or URLs; may be empty.
        dictionaries: what is compared.

    Returns:
        Fingerprint -> store; one that has grown since is as it was for the newest of its dictionaries.

    Raises:
        ValueError: a dictionary comes from none of the stores, or its store lacks its site.
    """
    opened = list(map(open_store, paths))
    stores: dict[str, Store] = {}
    for store in opened:
        found = {one.fingerprint: before(store, one.fingerprint) for one in dictionaries}
        held = {name: then for name, then in found.items() if then is not None}
        if held:
            largest = max(held.values(), key=lambda then: (then.images, len(then.sites)))
            print_growth(store, largest, "what is compared")
            stores |= dict.fromkeys(held, as_it_was(store, largest))
    for one in dictionaries if opened else ():
        if one.fingerprint not in stores:
            expect_from(opened[-1], one.fingerprint, str(one.path))
        store = stores[one.fingerprint]
        if one.site not in store.sites:
            raise ValueError(
                f"--store: expected {one.site} in {store.path} for {one.path}, which holds "
                f"{', '.join(store.sites)}; name the store that the dictionary was built from"
            )
    return stores


def measure_rows(
    dictionaries: Sequence[ComparedDictionary], stores: Mapping[str, Store], config: CompareConfig
) -> RowSimilarity:
    """CKA and SVCCA of each pair of dictionaries' sites.

    Args:
        dictionaries: what is compared.
        stores: of all of them, by fingerprint.
        config: `split`, `padding`, `rows`, `variance`, `standardize` and `memory_mb` are used.

    Returns:
        The two matrices. Two dictionaries of one site of one store have the same rows, so that both
        are 1.

    Raises:
        ValueError: the stores are not of the same images, steps and tokens.
    """
    keys = [(one.fingerprint, one.site) for one in dictionaries]
    padding = _padding(dictionaries, config)
    sources = _same_rows(dict.fromkeys(keys), stores, config, padding=padding)
    print_padding(list(sources.values()))
    names = list(sources)
    cka, cca = (np.full((len(names), len(names)), np.nan) for _ in range(2))
    components = np.zeros(len(names), np.int64)
    for stream in dict.fromkeys(stream_of(site) for _, site in names):
        places = [i for i, (_, site) in enumerate(names) if stream_of(site) == stream]
        chosen = [sources[names[i]] for i in places]
        own = _site_covariances(chosen, config)
        for i, one in zip(places, own, strict=True):
            varies = one.norm > 0
            cka[i, i] = cca[i, i] = 1.0 if varies else np.nan
            components[i] = one.components.shape[1]
        pairs = [(i, j) for i in range(len(places)) for j in range(i)]
        for (i, j), xy in _cross_covariances(chosen, pairs, config.memory_mb, f"{stream} pairs"):
            a, b = own[i], own[j]
            xy *= np.outer(a.scale, b.scale)
            at, to = places[i], places[j]
            cka[at, to] = cka[to, at] = linear_cka(xy, a.norm, b.norm)
            cca[at, to] = cca[to, at] = svcca(a.components, b.components, xy)
    of = np.array([names.index(key) for key in keys])
    rows = np.array([sources[name].rows for name in names])
    return RowSimilarity(cka[np.ix_(of, of)], cca[np.ix_(of, of)], rows[of], components[of])


def _padding(dictionaries: Sequence[ComparedDictionary], config: CompareConfig) -> str:
    """Whether rows of padding are left out: drop or keep."""
    if config.padding != "same":
        return config.padding
    texts = [one for one in dictionaries if stream_of(one.site) == "txt"]
    return "drop" if all(one.card.get("padding") == "drop" for one in texts) else "keep"


def _same_rows(
    keys: Mapping[tuple[str, str], None],
    stores: Mapping[str, Store],
    config: CompareConfig,
    *,
    padding: str,
) -> dict[tuple[str, str], Source]:
    """The same rows of every site, of images that all stores have finished."""
    used = [stores[name] for name in dict.fromkeys(name for name, _ in keys)]
    first = used[0]
    for other in used[1:]:
        check_alike(first, other, [], [])
        if first.grid != other.grid:
            raise ValueError(
                f"expected stores of one grid of tokens, got {first.grid} in {first.path} and "
                f"{other.grid} in {other.path}; harvest pictures of one size"
            )
    streams: dict[str, tuple[Store, str]] = {}
    found = {}
    images = np.asarray(first.indices(config.split))
    for store in used[1:]:
        images = np.intersect1d(images, store.indices("all"))
    if not len(images):
        paths = " and ".join(str(store.path) for store in used)
        raise ValueError(
            f"expected {config.split} images finished in {paths}, found none; harvest more prompts"
        )
    for fingerprint, site in keys:
        store = stores[fingerprint]
        one, other = streams.setdefault(stream_of(site), (store, site))
        positions = one.positions(other, images), store.positions(site, images)
        if positions[0].shape != positions[1].shape or (positions[0] != positions[1]).any():
            raise ValueError(
                f"expected the same tokens at {other} of {one.path} and at {site} of {store.path}, "
                "got others; harvest both with the same --tokens-per-image and --seed"
            )
        every = source_of(store, site, split="all", padding="keep").steps
        # As the first store of the stream tells it, so that the rows are the same.
        taken = without_padding(Source(one, other, images, every), padding)
        found[fingerprint, site] = Source(store, site, taken.images, every, taken.tokens).spread(
            config.rows
        )
    return found


def _site_covariances(sources: Sequence[Source], config: CompareConfig) -> list[_SiteCovariance]:
    """Of each site by itself."""
    found = []
    pairs = [(i, i) for i in range(len(sources))]
    for (i, _), xx in _cross_covariances(sources, pairs, config.memory_mb, "sites"):
        scale = np.ones(len(xx))
        if config.standardize:
            variance = np.diag(xx)
            scale = np.where(variance > 0, 1 / np.sqrt(np.where(variance > 0, variance, 1)), 0)
            xx *= np.outer(scale, scale)
        norm = float(np.linalg.norm(xx))
        found.append((i, _SiteCovariance(norm, scale, whitened_components(xx, config.variance))))
    return [one for _, one in sorted(found, key=lambda pair: pair[0])]


def _cross_covariances(
    sources: Sequence[Source], pairs: Sequence[tuple[int, int]], memory_mb: int, name: str
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """C_xy of pairs of sites, float64 [d, e]; as many are summed in one reading as fit the memory."""
    parts: list[list[tuple[int, int]]] = [[]]
    room = memory_mb * 2**20
    for i, j in pairs:
        size = 8 * sources[i].d * sources[j].d
        if parts[-1] and size > room:
            parts.append([])
            room = memory_mb * 2**20
        parts[-1].append((i, j))
        room -= size
    total = sum(sources[i].rows for part in parts for i in {k for pair in part for k in pair})
    with tqdm(total=total, unit="row", unit_scale=True, desc=name, disable=not pairs) as bar:
        for part in parts:
            needed = sorted({k for pair in part for k in pair})
            sums = {pair: CrossCovariance(sources[pair[0]].d, sources[pair[1]].d) for pair in part}
            for rows in _blocks([sources[k] for k in needed]):
                found = dict(zip(needed, rows, strict=True))
                for (i, j), cross in sums.items():
                    cross.add(found[i], found[j])
                bar.update(sum(map(len, rows)))
            for pair in part:
                yield pair, sums.pop(pair).centred


def _blocks(sources: Sequence[Source]) -> Iterator[list[np.ndarray]]:
    """The same rows of several sites, float64 [n, d] each, less the mean row of their first image."""
    if not sources:
        return
    per_image = sum(int(source.rows_of.max()) * source.d * 8 for source in sources)
    size = max(1, _BLOCK // per_image)
    images = sources[0].images
    firsts = [floats(source.read(images[:1])).mean(0, dtype=np.float64) for source in sources]
    for start in range(0, len(images), size):
        some = images[start : start + size]
        yield [
            floats(source.read(some)) - first for source, first in zip(sources, firsts, strict=True)
        ]
