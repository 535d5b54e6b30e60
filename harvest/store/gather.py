"""Reading many images of a sharded array, several requests at a time, without taking lost files for zeros."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from zarr.buffer.cpu import NDBuffer

from harvest.store.location import Location, first_line

_AT_ONCE = 4
"""Requests at a time."""
_REQUEST = 16 * 2**20
"""Bytes of a request to a disk, about."""


def gather(
    array: Any,
    wanted: np.ndarray,
    steps: np.ndarray | None = None,
    *,
    tokens: int | None = None,
    name: str,
    place: Location,
) -> np.ndarray:
    """Read images in any order.

    Args:
        array: a sharded zarr array [image, step, ...].
        wanted: numbers of the images.
        steps: places on the second axis, or None for all.
        tokens: how many of the third axis, the first ones, or None for all.
        name: the array's name in its store.
        place: where the store lies.

    Returns:
        [image, step, ...], in the order of `wanted` and `steps`.

    Raises:
        ValueError: part of their data is damaged, missing or unreachable.
    """
    chosen = np.arange(array.shape[1]) if steps is None else steps
    rest = array.shape[2:] if tokens is None else (tokens, *array.shape[3:])
    out = np.empty((len(wanted), len(chosen), *rest), array.dtype)
    if out.size == 0:
        return out
    order = np.argsort(wanted, kind="stable")
    ranked = wanted[order]
    chunk = ranked // array.chunks[0]
    cuts = np.diff(chunk) > 1  # a request for each run of neighbouring chunks
    if place.path is not None:  # zarr's own buffers then stay small, and are reused
        image_bytes = out.nbytes // len(out)
        together = max(1, _REQUEST // (image_bytes * array.chunks[0]))
        cuts |= np.diff(chunk // together) > 0

    def fetch(places: np.ndarray) -> None:
        group = wanted[places]
        try:
            _read(array, group, chosen, out, places)
            _refuse_lost(array, group[~out[places, 0, 0].any(-1)], name, place)
        except (ValueError, RuntimeError, *place.errors) as error:
            few = f"image {group[0]}" if len(group) == 1 else f"images {group[0]} to {group[-1]}"
            raise unreadable(f"{name}, {few},", place, error) from error

    requests = np.split(order, np.flatnonzero(cuts) + 1)
    with ThreadPoolExecutor(min(_AT_ONCE, len(requests))) as pool:
        for _ in pool.map(fetch, requests):
            pass
    return out


def place_numbers(which: Any, length: int, noun: str) -> np.ndarray:
    """Turn a slice, indices or a mask into int64 indices within `length`."""
    if isinstance(which, slice):
        return np.arange(length, dtype=np.int64)[which]
    array = np.atleast_1d(np.asarray(which))
    if array.dtype == bool:
        if array.shape != (length,):
            raise ValueError(f"expected a mask of {length} {noun}s, got shape {array.shape}")
        return np.flatnonzero(array)
    if array.size == 0:
        return np.zeros(0, np.int64)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"expected {noun}s as a slice, integers or a mask, got {which!r}")
    if array.min() < -length or array.max() >= length:
        raise ValueError(f"expected {noun}s from 0 to {length - 1}, got {which!r}")
    return np.where(array < 0, array + length, array).astype(np.int64)


def unreadable(what: str, place: Location, error: Exception) -> ValueError:
    """The error that says which part of a store cannot be read, and what to do."""
    return ValueError(
        f"{what} of {place} cannot be read ({first_line(error)}); if it is damaged, "
        f"`jaxdict inspect {place} --verify` tells what else is"
    )


def _read(
    array: Any, images: np.ndarray, steps: np.ndarray, out: np.ndarray, places: np.ndarray
) -> None:
    """Read ascending images through zarr, straight into `out` where their places are neighbours too."""
    first, last = int(steps.min()), int(steps.max()) + 1
    low, high = int(images[0]), int(images[-1]) + 1
    region = slice(low, high), slice(first, last), *map(slice, out.shape[2:])
    in_order = all((np.diff(n) == 1).all() for n in (images, steps, places))
    if in_order:
        target = NDBuffer.from_numpy_array(out[places[0] : places[-1] + 1])
        array.get_basic_selection(region, out=target)
    else:
        block = np.asarray(array[region])
        out[places] = block[(images - low)[:, None], steps - first]


def _refuse_lost(array: Any, zeros: np.ndarray, name: str, place: Location) -> None:
    """Raise ValueError if images that begin with zeros do so because their file is gone."""
    for shard in np.unique(zeros // array.shards[0]).tolist():
        key = array.metadata.encode_chunk_key((shard, *(0,) * (array.ndim - 1)))
        if not place.holds(f"{name}/{key}"):
            raise ValueError(f"{key} is missing")
