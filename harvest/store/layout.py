"""The files of a store that holds no activations yet: its attributes, its arrays and what they say of each image."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from harvest.store.schema import FORMAT, VERSION, StoreSpec, chunk_shape, fingerprint
from harvest.store.statistics import NORM_EDGES, STATISTICS

GROUP = "zarr.json"
"""The file of the group's attributes."""


def group_file(attributes: Mapping[str, Any]) -> bytes:
    """The file of a group with these attributes."""
    made: dict[str, Any] = {}
    zarr.create_group(MemoryStore(made), attributes=dict(attributes))
    return made[GROUP].to_bytes()


def attributes_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of a finished store of this content; what arrays hold is not repeated there."""
    arrays = ("prompts", "seeds", "split", "labels", "sigmas", "timesteps", "words")
    kept = {key: value for key, value in content.items() if key not in arrays}
    kept["words"] = None if content["words"] is None else len(content["words"][0])
    return {"format": FORMAT, "version": VERSION, "fingerprint": fingerprint(content), **kept}


def empty_files(spec: StoreSpec) -> dict[str, bytes]:
    """The files of a store that holds no activations yet, by name.

    They are made in memory, because zarr carries on with other requests after one has failed.
    """
    made: dict[str, Any] = {}
    content = spec.content()
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

    files = {key: value.to_bytes() for key, value in made.items()}
    return files | {GROUP: group_file(attributes_of(content))}


def _text(values: list) -> np.ndarray:
    return np.array(values, dtype=np.dtypes.StringDType())
