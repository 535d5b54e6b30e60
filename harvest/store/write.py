"""Writing an activation store: shard by shard, each complete or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from harvest.store.bfloat16 import finite, to_bits
from harvest.store.location import Location, first_line
from harvest.store.read import open_store
from harvest.store.schema import (
    FORMAT,
    VERSION,
    StoreSpec,
    chunk_shape,
    fingerprint,
    first_difference,
    stamp,
)
from harvest.store.statistics import NORM_EDGES, STATISTICS, summarize
from harvest.units import size

_SHORT = 120
"""Characters of a value that are shown in an error."""
_GROUP = "zarr.json"
"""The file of the group's attributes."""


def create_store(path: str | Path, spec: StoreSpec) -> StoreWriter:
    """Create a store, or continue an identical one.

    On a disk the empty store is made in a folder beside `path` and then moved there; elsewhere its attributes are
    written last. So a kill leaves no store or a whole one.

    Args:
        path: folder or URL of the store.
        spec: what it holds.

    Returns:
        a writer; `pending()` lists what is still missing.

    Raises:
        ValueError: `path` holds a different store (naming the field and both values) or
            something else.
    """
    place = Location(path)
    try:
        if place.path is None:
            _create_remote(place, spec)
        else:
            _create_local(place.path, spec)
    except place.errors as error:
        if place.path is not None:
            shutil.rmtree(_draft(place.path), ignore_errors=True)
        raise OSError(f"the store {place} cannot be made: {first_line(error)}") from error
    return StoreWriter(place, spec)


def _create_local(path: Path, spec: StoreSpec) -> None:
    if path.is_dir() and any(path.iterdir()):
        return _refuse_other(path, spec)
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected --out to be a folder for the store, got the file {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(f"{error.filename} is, or lies in, a file and not a folder") from error
    draft = _draft(path)  # always the same name, so that the next run removes what a kill left
    shutil.rmtree(draft, ignore_errors=True)
    Location(draft).put(_files(spec))
    os.replace(draft, path)


def _draft(path: Path) -> Path:
    return path.parent / f".{path.name}.new"


def _create_remote(place: Location, spec: StoreSpec) -> None:
    if place.exists():
        try:
            attrs = zarr.open_group(place.zarr(read_only=True), mode="r").attrs
        except FileNotFoundError as error:
            raise ValueError(f"expected --out to be an empty place, got {place}") from error
        if "draft" not in attrs:  # a draft is what a kill left while the store was made
            return _refuse_other(place, spec)
    draft: dict[str, Any] = {}
    zarr.create_group(MemoryStore(draft), attributes={"format": FORMAT, "draft": True})
    place.put({_GROUP: draft[_GROUP].to_bytes()})
    place.remove(key for key in place.files() if key != _GROUP)
    files = _files(spec)
    attributes = files.pop(_GROUP)
    place.put(files)
    place.put({_GROUP: attributes})


class StoreWriter:
    """Writes shards. A shard's done flag is written last, so it is either finished or pending."""

    def __init__(self, place: Location, spec: StoreSpec) -> None:
        """Open the store that `create_store` made or found."""
        self.place = place
        self.spec = spec
        self._group = zarr.open_group(place.zarr(), mode="r+")
        self.fingerprint = str(self._group.attrs["fingerprint"])

    def pending(self) -> list[int]:
        """Numbers of the shards that are not done.

        Raises:
            ValueError: the flags that say so cannot be read.
        """
        try:
            done = np.asarray(self._array("images/done")[:], bool)
        except (ValueError, RuntimeError, *self.place.errors) as error:
            raise ValueError(
                f"images/done of {self.place} cannot be read ({first_line(error)}); if it is "
                f"damaged, see `jaxdict inspect {self.place} --verify`"
            ) from error
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
            shard: its number.
            activations: site -> [images of the shard, step, token, d]; floats are rounded to
                bfloat16 (nearest, ties to even), uint16 are bfloat16 bits.
            pictures: uint8 [images of the shard, H, W, 3], or None if the store keeps none.

        Raises:
            ValueError: a site is missing or too many, a shape is wrong, or a value is not finite
                (naming site, step and prompt). Nothing is marked done then.
            OSError: it cannot be written, for instance because the disk is full. Shards written
                before stay as they are.
        """
        spec, where = self.spec, self.images_of(shard)
        count = where.stop - where.start
        if set(activations) != set(spec.sites):
            raise ValueError(f"expected sites {sorted(spec.sites)}, got {sorted(activations)}")
        if (pictures is None) != (spec.picture is None):
            raise ValueError(f"expected pictures of {spec.picture}, got {type(pictures).__name__}")
        if pictures is not None and spec.picture is not None:
            _expect_shape("pictures", pictures, (count, *spec.picture, 3))
        sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        bits: dict[str, np.ndarray] = {}
        for site, (tokens, d) in spec.sites.items():
            _expect_shape(site, activations[site], (count, spec.steps, tokens, d))
            bits[site] = to_bits(activations[site])
            sums[site] = summarize(bits[site])
        if not all(np.isfinite(part).all() for part, _ in sums.values()):
            self._refuse(bits, where.start)
        try:
            for site in spec.sites:
                self._array(f"sites/{site}")[where] = bits[site]
                self._array(f"statistics/{site}")[shard], self._array(f"norms/{site}")[shard] = (
                    sums[site]
                )
            if pictures is not None:
                self._array("images/picture")[where] = pictures
            self._array("shards/stamp")[shard] = np.uint64(stamp(self.fingerprint))
            self._array("images/done")[where] = np.uint8(1)
        except self.place.errors as error:
            free = self.place.free()
            left = "" if free is None else f", {size(free)} are left on the disk"
            raise OSError(
                f"images {where.start} to {where.stop - 1} could not be written to {self.place}: "
                f"{first_line(error)}{left}; make room, or see that the place can be reached and "
                "written, and run the same command again: what was finished is kept"
            ) from error

    def sweep(self) -> None:
        """Remove what a kill left half written, unless a shard is still pending."""
        if self.place.path is not None and not self.pending():
            for leftover in self.place.path.rglob("*.partial"):
                leftover.unlink(missing_ok=True)

    def _array(self, name: str) -> Any:
        # Zeros are written too, so that a missing file always means a loss.
        with zarr.config.set({"array.write_empty_chunks": True}):
            return self._group[name]

    def _refuse(self, bits: Mapping[str, np.ndarray], start: int) -> None:
        """Raise a ValueError that says where the first value is that is not finite."""
        places = []
        for order, (site, values) in enumerate(bits.items()):
            broken = ~finite(values).all((2, 3))
            places += [(int(i), int(step), order, site) for i, step in np.argwhere(broken)]
        number, step, _, site = min(places)
        raise ValueError(
            f"expected finite activations, got NaN or infinity at site {site}, step {self.spec.numbers[step]}, image "
            f"{start + number}, prompt {self.spec.prompts[start + number]!r}; use --dtype bfloat16 "
            "or float32, or leave that prompt out"
        )


def _expect_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")


def _refuse_other(path: Path | Location, spec: StoreSpec) -> None:
    """Raise unless the store at `path` is the one that `spec` describes."""
    place = Location(path) if isinstance(path, Path) else path
    if place.path is not None and not place.holds(_GROUP):
        raise ValueError(
            f"expected --out to be a new folder, an empty one or a store, but {path} holds other files"
        )
    store = open_store(str(path))
    content = spec.content()
    if store.fingerprint == fingerprint(content):
        return
    found = first_difference(store.content(), content)
    sites = list(store.sites), list(spec.sites)
    if sites[0] != sites[1] and max(map(len, map(json.dumps, sites))) <= _SHORT:
        found = ("sites", *sites)
    name, old, new = found or ("fingerprint", store.fingerprint, fingerprint(content))
    raise ValueError(
        f"{path} holds a store with {name} = {_short(old)}, but {_short(new)} was asked for; "
        "use the same settings to go on with it, or another --out"
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."


def _files(spec: StoreSpec) -> dict[str, bytes]:
    """The files of a store that holds no activations yet.

    They are made in memory, because zarr carries on with other requests after one has failed.
    """
    made: dict[str, Any] = {}
    content = spec.content()
    arrays = ("prompts", "seeds", "split", "labels", "sigmas", "timesteps", "words")
    group = zarr.create_group(MemoryStore(made))
    n, per_shard = spec.images, spec.images_per_shard
    checked = {"filters": None, "compressors": (Crc32cCodec(),)}
    rows = checked
    if spec.compress == "zstd":  # exponents repeat, mantissas do not: their bytes are kept apart
        shuffled = BloscCodec(typesize=2, cname="zstd", clevel=3, shuffle="shuffle")
        rows = {"filters": None, "compressors": (shuffled, Crc32cCodec())}
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

    for stream, where in spec.positions.items():
        tokens = np.shape(where)[1]
        dims, inner = ("image", "token"), (per_shard, tokens)
        add(f"images/picked_{stream}", (n, tokens), dims, inner, "int32", **packed)[:] = where

    columns = (("sigma", spec.sigmas), ("timestep", spec.timesteps), ("number", spec.numbers))
    for name, values in columns:
        kind = "int32" if name == "number" else "float64"
        array = add(f"steps/{name}", (spec.steps,), ("step",), (spec.steps,), kind, **checked)
        array[:] = np.asarray(values, kind)
    places = np.stack(np.divmod(np.arange(np.prod(spec.grid)), spec.grid[1]), 1).astype(np.int32)
    array = add("tokens/img", places.shape, ("token", "yx"), places.shape, "int32", **checked)
    array[:] = places

    add("shards/stamp", (spec.shards,), ("shard",), (1,), "uint64", **checked)
    for site, (tokens, d) in spec.sites.items():
        shard = (per_shard, spec.steps, tokens, d)
        shape, dims = (n, *shard[1:]), ("image", "step", "token", "d")
        more = {"shards": shard, "attributes": {"dtype": "bfloat16"}, **rows}
        inner = chunk_shape(shard, target=spec.chunk_bytes)
        add(f"sites/{site}", shape, dims, inner, "uint16", **more)
        width, bins = len(STATISTICS), len(NORM_EDGES) - 1
        dims, inner = ("shard", "step", "statistic", "d"), (1, spec.steps, width, d)
        more = {"attributes": {"statistics": list(STATISTICS)}, **checked}
        add(f"statistics/{site}", (spec.shards, *inner[1:]), dims, inner, "float64", **more)
        dims, inner = ("shard", "step", "bin"), (1, spec.steps, bins)
        more = {"attributes": {"edges": NORM_EDGES[1:-1].tolist()}, **packed}
        add(f"norms/{site}", (spec.shards, *inner[1:]), dims, inner, "int64", **more)

    kept = {key: value for key, value in content.items() if key not in arrays}
    kept["words"] = None if spec.words is None else len(spec.words[0])
    group.attrs.put(
        {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint(content), **kept}
    )
    return {key: value.to_bytes() for key, value in made.items()}


def _text(values: list) -> np.ndarray:
    return np.array(values, dtype=np.dtypes.StringDType())
