"""Writing an activation store: shard by shard, each one whole or not there at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

from harvest.schema import (
    FORMAT,
    STATISTICS,
    VERSION,
    StoreSpec,
    chunk_shape,
    fingerprint,
    first_difference,
    from_bits,
    stamp,
    to_bits,
)

_BLOCK = 2**17
"""Values that statistics are taken over at a time: few enough to stay in a core's cache."""


def create_store(path: str | Path, spec: StoreSpec) -> StoreWriter:
    """Create a store, or go on with an identical one.

    The empty store is made in a folder beside `path` and then moved there, so a kill leaves either
    no store or a whole one.

    Args:
        path: Folder of the store.
        spec: What it holds.

    Returns:
        A writer; ``pending()`` lists what is still missing.

    Raises:
        ValueError: If `path` holds a different store (naming the field and both values) or
            something else.
    """
    path = Path(path)
    if path.is_dir() and any(path.iterdir()):
        _refuse_other(path, spec)
        return StoreWriter(path, spec)
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected --out to be a folder for the store, got the file {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.parent / f".{path.name}.new"
    shutil.rmtree(draft, ignore_errors=True)
    _make(draft, spec)
    os.replace(draft, path)
    return StoreWriter(path, spec)


class StoreWriter:
    """Writes shards. A shard's done flag is written last, so it is either finished or pending."""

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        """Open the store that `create_store` made or found."""
        self.path = path
        self.spec = spec
        self._group = zarr.open_group(path, mode="r+")
        self.fingerprint = str(self._group.attrs["fingerprint"])

    def pending(self) -> list[int]:
        """Numbers of the shards that are not done."""
        done = np.asarray(self._array("images/done")[:], bool)
        return [n for n in range(self.spec.shards) if not done[self.images_of(n)].all()]

    def images_of(self, shard: int) -> slice:
        """The images of a shard."""
        start = shard * self.spec.images_per_shard
        return slice(start, min(start + self.spec.images_per_shard, self.spec.images))

    def write(
        self,
        shard: int,
        activations: Mapping[str, np.ndarray],
        pictures: np.ndarray | None = None,
    ) -> None:
        """Write one shard, its statistics, then its done flag. Writing it again changes nothing.

        Args:
            shard: Its number.
            activations: Site -> [images of the shard, step, token, d]; floats are rounded to
                bfloat16 (nearest, ties to even), uint16 are bfloat16 bits.
            pictures: uint8 [images of the shard, H, W, 3], or None if the store keeps none.

        Raises:
            ValueError: If a site is missing or too many, a shape is wrong, or a value is not finite
                (naming site, step and prompt). Nothing is marked done then.
        """
        spec, where = self.spec, self.images_of(shard)
        count = where.stop - where.start
        if set(activations) != set(spec.sites):
            raise ValueError(f"expected sites {sorted(spec.sites)}, got {sorted(activations)}")
        if (pictures is None) != (spec.picture is None):
            raise ValueError(f"expected pictures of {spec.picture}, got {type(pictures).__name__}")
        if pictures is not None and spec.picture is not None:
            _expect_shape("pictures", pictures, (count, *spec.picture, 3))
        sums: dict[str, np.ndarray] = {}
        bits: dict[str, np.ndarray] = {}
        for site, (tokens, d) in spec.sites.items():
            _expect_shape(site, activations[site], (count, spec.steps, tokens, d))
            bits[site] = to_bits(activations[site])
            sums[site] = _summarize(bits[site])
        if not all(np.isfinite(part).all() for part in sums.values()):
            self._refuse(bits, where.start)
        for site in spec.sites:
            self._array(f"sites/{site}")[where] = bits[site]
            self._array(f"statistics/{site}")[shard] = sums[site]
        if pictures is not None:
            self._array("images/picture")[where] = pictures
        self._array("shards/stamp")[shard] = np.uint64(stamp(self.fingerprint))
        self._array("images/done")[where] = np.uint8(1)

    def sweep(self) -> None:
        """Remove what a kill left half written; only for a store of which nothing is pending."""
        if not self.pending():
            for leftover in self.path.rglob("*.partial"):
                leftover.unlink(missing_ok=True)

    def _array(self, name: str) -> Any:
        return self._group[name]

    def _refuse(self, bits: Mapping[str, np.ndarray], start: int) -> None:
        """Raise a ValueError that names where the first value that is not finite came up."""
        places = []
        for order, (site, values) in enumerate(bits.items()):
            broken = ((values & 0x7F80) == 0x7F80).any((2, 3))
            places += [(int(i), int(step), order, site) for i, step in np.argwhere(broken)]
        number, step, _, site = min(places)
        raise ValueError(
            f"expected finite activations, got NaN or infinity at site {site}, step {step}, image "
            f"{start + number}, prompt {self.spec.prompts[start + number]!r}; use --dtype bfloat16 "
            "or float32, or leave that prompt out"
        )


def _summarize(bits: np.ndarray) -> np.ndarray:
    """Sum, sum of squares, min and max over the rows, [4, d] float64, a block of rows at a time."""
    rows = bits.reshape(-1, bits.shape[-1])
    d = rows.shape[1]
    total, square = np.zeros(d), np.zeros(d)
    low, high = np.full(d, np.inf), np.full(d, -np.inf)
    block = max(1, _BLOCK // d)
    with np.errstate(invalid="ignore"):
        for first in range(0, len(rows), block):
            values = from_bits(rows[first : first + block])
            total += values.sum(0, dtype=np.float64)
            square += np.einsum("nd,nd->d", values, values, dtype=np.float64)
            np.minimum(low, values.min(0), out=low)
            np.maximum(high, values.max(0), out=high)
    return np.stack([total, square, low, high])


def _expect_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")


def _refuse_other(path: Path, spec: StoreSpec) -> None:
    """Raise unless the store at `path` is the one that `spec` describes."""
    from harvest.store import open_store

    store = open_store(path)
    content = spec.content()
    if store.fingerprint == fingerprint(content):
        return
    found = first_difference(store.content(), content)
    name, old, new = found or ("fingerprint", store.fingerprint, fingerprint(content))
    raise ValueError(
        f"{path} holds a store with {name} = {_short(old)}, but {_short(new)} was asked for; "
        "use the same settings to go on with it, or another --out"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."


def _make(path: Path, spec: StoreSpec) -> None:
    """Make the whole store, without any activation."""
    content = spec.content()
    arrays = ("prompts", "seeds", "split", "labels", "sigmas", "timesteps", "words")
    group = zarr.create_group(path)
    n, per_shard = spec.images, spec.images_per_shard
    checked = {"filters": None, "compressors": (Crc32cCodec(),)}
    packed = {"compressors": (ZstdCodec(), Crc32cCodec())}

    def add(name: str, shape: tuple, dims: tuple, chunks: tuple, dtype: str, **more: Any) -> Any:
        return group.create_array(
            name, shape=shape, chunks=chunks, dtype=dtype, dimension_names=dims, **more
        )

    per_image = (("image",), (per_shard,))
    add("images/prompt", (n,), *per_image, "string", **packed)[:] = _text(content["prompts"])
    tags = [json.dumps(tags, ensure_ascii=False) for tags in content["labels"]]
    more = {"attributes": {"encoding": "json"}, **packed}
    add("images/labels", (n,), *per_image, "string", **more)[:] = _text(tags)
    seeds = np.asarray(content["seeds"], np.int64)
    add("images/seed", (n,), *per_image, "int64", **checked)[:] = seeds
    more = {"attributes": {"values": ["train", "validation"]}, **checked}
    add("images/split", (n,), *per_image, "uint8", **more)[:] = np.asarray(spec.split, np.uint8)
    add("images/done", (n,), *per_image, "uint8", **checked)
    if spec.words is not None:
        tokens = len(spec.words[0])
        words = add(
            "images/word", (n, tokens), ("image", "token"), (per_shard, tokens), "string", **packed
        )
        words[:] = _text(content["words"])
    if spec.picture is not None:
        shard = (per_shard, *spec.picture, 3)
        inner = (*chunk_shape((per_shard, int(np.prod(shard[1:]))), 1)[:1], *shard[1:])
        dims = ("image", "y", "x", "channel")
        add("images/picture", (n, *shard[1:]), dims, inner, "uint8", shards=shard, **packed)

    for name, values in (("sigma", spec.sigmas), ("timestep", spec.timesteps)):
        array = add(f"steps/{name}", (spec.steps,), ("step",), (spec.steps,), "float64", **checked)
        array[:] = np.asarray(values, np.float64)
    places = np.stack(np.divmod(np.arange(np.prod(spec.grid)), spec.grid[1]), 1).astype(np.int32)
    array = add("tokens/img", places.shape, ("token", "yx"), places.shape, "int32", **checked)
    array[:] = places

    add("shards/stamp", (spec.shards,), ("shard",), (1,), "uint64", **checked)
    for site, (tokens, d) in spec.sites.items():
        shard = (per_shard, spec.steps, tokens, d)
        shape, dims = (n, *shard[1:]), ("image", "step", "token", "d")
        more = {"shards": shard, "attributes": {"dtype": "bfloat16"}, **checked}
        add(f"sites/{site}", shape, dims, chunk_shape(shard), "uint16", **more)
        width = len(STATISTICS)
        add(
            f"statistics/{site}",
            (spec.shards, width, d),
            ("shard", "statistic", "d"),
            (1, width, d),
            "float64",
            **{"attributes": {"statistics": list(STATISTICS)}, **checked},
        )

    kept = {key: value for key, value in content.items() if key not in arrays}
    kept["words"] = None if spec.words is None else len(spec.words[0])
    group.attrs.update(
        {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint(content), **kept}
    )


def _text(values: list) -> np.ndarray:
    return np.array(values, dtype=np.dtypes.StringDType())
