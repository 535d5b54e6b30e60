"""Uncompressed shards of a folder, read and written without zarr: each byte is moved once.

Zarr moves it four times (file, chunk, shard, selection), and memory that is touched for the first time
costs more than a file that is cached. What is compressed, or behind a URL, is left to zarr.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
_CHECKSUM = {"name": "crc32c"}
_WIDTH = 4
"""Bytes of a checksum, which follows what it is of."""
_NOWHERE = 2**64 - 1
"""Offset of a chunk that was never written."""


def is_plain(array: Any) -> bool:
    """Whether an array's files are shards of plain chunks with checksums, each with all of an image."""
    if not hasattr(os, "preadv") or array.shards is None or array.shards[1:] != array.shape[1:]:
        return False
    (codec,) = array.metadata.to_dict()["codecs"]
    plain = [_BYTES, _CHECKSUM]
    wanted = {"codecs": plain, "index_codecs": plain, "index_location": "end"}
    found = {name: codec["configuration"].get(name) for name in wanted}
    return {name: v if isinstance(v, str) else list(v) for name, v in found.items()} == wanted


def write_shard(array: Any, folder: Path, shard: int, values: np.ndarray) -> None:
    """Write a shard of an array for which `is_plain` holds: all of it, or nothing.

    Args:
        array: The zarr array.
        folder: Its folder.
        shard: Number of the shard along the first axis.
        values: Its images, of the array's dtype; as many as a shard has, or as are left at the end.

    Raises:
        OSError: If it cannot be written.
    """
    size = array.chunks
    grid = tuple(n // c for n, c in zip(array.shards, size, strict=True))
    index = np.full((*grid, 2), _NOWHERE, "<u8")
    path = _file(array, folder, shard)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with draft.open("wb") as file:
            for place in np.ndindex(-(-len(values) // size[0]), *grid[1:]):
                region = tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, size, strict=True))
                chunk = np.ascontiguousarray(values[region])
                if chunk.shape != size:  # the last images do not fill it
                    chunk = np.concatenate(
                        [chunk, np.zeros_like(chunk, shape=(size[0] - len(chunk), *size[1:]))]
                    )
                index[place] = file.tell(), chunk.nbytes + _WIDTH
                file.write(chunk.data)
                file.write(_checksum(chunk))
            file.write(index.data)
            file.write(_checksum(index))
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


class Shards:
    """Some steps of an array for which `is_plain` holds.

    Args:
        array: The zarr array, [image, step, ...].
        folder: Its folder.
        steps: Places on the second axis, in any order.
    """

    def __init__(self, array: Any, folder: Path, steps: np.ndarray) -> None:
        """Take down the layout; nothing is read."""
        self._array, self._folder = array, folder
        self._dtype, self._chunk, self._shard = array.dtype, array.chunks, array.shards
        self._bytes = self._dtype.itemsize * math.prod(self._chunk)
        self._grid = tuple(n // c for n, c in zip(self._shard, self._chunk, strict=True))
        owner, inside = np.divmod(steps, self._chunk[1])
        self._parts = [
            (int(own), (at := np.flatnonzero(owner == own)), inside[at], _run(at))
            for own in np.unique(owner)
        ]

    def read(self, images: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """Read images of one shard.

        Args:
            images: Their numbers, ascending, all of one shard.
            out: Takes them: [*, step, ...], of the array's dtype.
            places: Where in `out` each image belongs.

        Raises:
            OSError: If the file is missing or cannot be read.
            ValueError: If it is cut short, or a checksum is not right.
        """
        shard, inner = int(images[0]) // self._shard[0], images % self._shard[0]
        with _file(self._array, self._folder, shard).open("rb", buffering=0) as file:
            index = self._index(file.fileno())
            cuts = np.flatnonzero(np.diff(inner // self._chunk[0])) + 1
            for first, last in pairwise((0, *cuts, len(images))):
                part = inner[first:last], places[first:last]
                self._read_group(file.fileno(), index, *part, out)

    def _index(self, file: int) -> np.ndarray:
        """Offset and length of each chunk, uint64 [..., 2]."""
        index = np.empty((*self._grid, 2), "<u8")
        _fill(file, os.fstat(file).st_size - index.nbytes - _WIDTH, index)
        return index

    def _read_group(
        self,
        file: int,
        index: np.ndarray,
        images: np.ndarray,
        places: np.ndarray,
        out: np.ndarray,
    ) -> None:
        """Read images, numbered within their shard, that share their chunks."""
        size, rows = self._chunk, _run(places)
        row, inner = int(images[0]) // size[0], images % size[0]
        all_rows = rows is not None and len(inner) == size[0] and _run(inner) is not None
        for own, at, inside, columns in self._parts:
            # A chunk that is wanted as it is goes to its place at once.
            whole = all_rows and len(inside) == size[1] and _run(inside) and columns
            for rest in np.ndindex(*self._grid[2:]):
                offset, length = index[(row, own, *rest)].tolist()
                if offset != _NOWHERE and length != self._bytes + _WIDTH:
                    raise ValueError(f"a chunk has {length} bytes, not {self._bytes + _WIDTH}")
                tail = tuple(slice(i * c, (i + 1) * c) for i, c in zip(rest, size[2:], strict=True))
                target = out[(rows, columns, *tail)] if whole else None
                if target is not None and target.flags.c_contiguous:
                    _fill(file, offset, target)
                else:
                    chunk = np.empty(size, self._dtype)
                    _fill(file, offset, chunk)
                    out[(places[:, None], at, *tail)] = chunk[inner[:, None], inside]


def _run(numbers: np.ndarray) -> slice | None:
    """The slice that ascending neighbours are, or None for others."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first != len(numbers) - 1 or (np.diff(numbers) != 1).any():
        return None
    return slice(first, last + 1)


def _fill(file: int, offset: int, out: np.ndarray) -> None:
    """Fill an array (zeros, if it was never written), and check it against the checksum that follows."""
    flat = out.reshape(-1).view(np.uint8)
    if offset == _NOWHERE:
        flat[:] = 0
        return
    checksum = np.empty(_WIDTH, np.uint8)
    parts: list[Any] = [flat, checksum]
    done = 0
    while done < flat.nbytes + _WIDTH:  # a read may give less than was asked for
        read = os.preadv(file, parts, offset + done) if offset >= 0 else 0
        if not read:
            raise ValueError("the file ends too early")
        done += read
        parts = [flat[done:], checksum[max(0, done - flat.nbytes) :]]
    found = _checksum(flat)
    if found != checksum.tobytes():
        raise ValueError(
            f"Stored and computed checksum do not match: {checksum.tobytes().hex()}, {found.hex()}"
        )


def _checksum(values: np.ndarray) -> bytes:
    flat: Any = values.reshape(-1).view(np.uint8)
    return google_crc32c.value(flat).to_bytes(_WIDTH, "little")


def _file(array: Any, folder: Path, shard: int) -> Path:
    return folder / array.metadata.encode_chunk_key((shard, *(0,) * (len(array.shape) - 1)))
