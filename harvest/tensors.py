"""Arrays in a safetensors file with their hashes: written from memory as they are, read one at a time and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from harvest.hashing import NAME, hash_bytes, hash_json, hasher

_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
_PIECE = 4 << 20
_ALIGNED = 64
"""Bytes to which an array is aligned, so that JAX on a CPU takes its memory and makes no copy."""


def write_tensors(
    path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> str:
    """Write arrays, and the hash of each into the file's metadata, under `xxh3_128`.

    Args:
        path: the file.
        tensors: by name.
        metadata: what else the file says of itself.

    Returns:
        The hash of all of it: of names, dtypes, shapes, metadata and contents.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    arrays = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    hashes = {name: hash_bytes(_bytes_of(array)) for name, array in arrays.items()}
    names = {dtype: name for name, dtype in _DTYPES.items()}
    shapes = {name: [names[array.dtype], list(array.shape)] for name, array in arrays.items()}
    whole = _whole_hash(shapes, dict(metadata or {}), hashes)
    text = json.dumps({"file": whole, **{f"tensor {name}": one for name, one in hashes.items()}})
    try:
        save_file(arrays, path, {**(metadata or {}), NAME: text})
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from None
    return whole


def tensor_header(
    shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    hashes: Mapping[str, str],
) -> bytes:
    """The bytes before the arrays of a safetensors file, for a writer that has them only piece by piece.

    They are as many whatever the hashes, so that a file can be written before its hashes are known.

    Args:
        shapes: dtype and shape of each array, by name, in the order in which they lie in the file.
        metadata: what else the file says of itself.
        hashes: of the arrays, by name.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    plain = {name: [names[dtype], list(shape)] for name, (dtype, shape) in shapes.items()}
    whole = _whole_hash(plain, metadata, hashes)
    text = json.dumps({"file": whole, **{f"tensor {name}": one for name, one in hashes.items()}})
    facts: dict[str, Any] = {"__metadata__": {**metadata, NAME: text}}
    at = 0
    for name, (dtype, shape) in shapes.items():
        end = at + int(np.prod(shape)) * dtype.itemsize
        facts[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(facts).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


class TensorFile:
    """A safetensors file whose arrays are read one at a time, each into memory of its own.

    Attributes:
        metadata: what the file says of itself, without hashes.
        hash: of all of it, as `write_tensors` returned it; None for a file without hashes.
        names: of its arrays.
    """

    def __init__(self, path: Path, *, verify: bool = True, remedy: str = "copy it again") -> None:
        """Read what is in the file, and none of its arrays.

        Args:
            path: the file.
            verify: whether hashes are checked.
            remedy: what to do about a damaged file, for messages.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, cut, or something else.
        """
        self.path, self._verify, self._remedy = path, verify, remedy
        try:
            with safe_open(path, framework="np"):  # checks the header against the file's length
                pass
            with path.open("rb") as file:
                self._start = 8 + int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(self._start - 8))
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self._entries = {
                name: (_DTYPES[facts["dtype"]], facts["shape"], facts["data_offsets"][0])
                for name, facts in header.items()
            }
            hashes = json.loads(self.metadata.pop(NAME, "{}"))
            self._hashed = bool(hashes)
            self.hash: str | None = hashes.pop("file", None)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected safetensors, found a damaged file ({error}); {remedy}"
            ) from None
        self._hashes = {name.removeprefix("tensor "): one for name, one in hashes.items()}
        shapes = {name: [facts["dtype"], facts["shape"]] for name, facts in header.items()}
        if self._hashed:
            self._check("a header", self.hash, _whole_hash(shapes, self.metadata, self._hashes))

    @property
    def names(self) -> list[str]:
        """Names of the arrays, in the order of the file."""
        return sorted(self._entries, key=lambda name: self._entries[name][2])

    def form(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of an array."""
        dtype, shape, _ = self._entries[name]
        return dtype, tuple(shape)

    def read(self, name: str) -> np.ndarray:
        """An array, in memory that nothing else uses.

        Raises:
            ValueError: its content is not what was written.
        """
        dtype, shape, offset = self._entries[name]
        array = aligned(tuple(shape), dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self._start + offset)
            found = _read_into(file, array, hashed=self._verify and self._hashed)
        if found is not None:
            self._check(name, self._hashes[name], found)
        return array

    def read_all(self) -> dict[str, np.ndarray]:
        """Every array, by name."""
        return {name: self.read(name) for name in self.names}

    def _check(self, what: str, expected: str | None, found: str) -> None:
        if self._verify and found != expected:
            raise ValueError(
                f"{self.path} is damaged: expected {what} with the hash {expected}, got {found}; {self._remedy}"
            )


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array of undefined content that JAX on a CPU can use where it lies."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.empty(size + _ALIGNED, np.uint8)
    start = -memory.ctypes.data % _ALIGNED
    return memory[start : start + size].view(dtype).reshape(shape)


def _read_into(file: BinaryIO, array: np.ndarray, *, hashed: bool) -> str | None:
    """Fill an array from a file, and hash each piece while it is in the processor's cache."""
    room, found = _bytes_of(array), hasher()
    for at in range(0, len(room), _PIECE):
        piece = room[at : at + _PIECE]
        done = 0
        while done < len(piece):
            count = file.readinto(piece[done:])  # pyright: ignore[reportAttributeAccessIssue]
            if not count:
                raise OSError(f"{file.name} became shorter while it was read; copy it again")
            done += count
        if hashed:
            found.update(piece)
    return found.hexdigest() if hashed else None


def _bytes_of(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _whole_hash(
    shapes: Mapping[str, Any], metadata: Mapping[str, str], hashes: Mapping[str, str]
) -> str:
    """The hash of a file: of what its header says, the hashes of its arrays among it."""
    return hash_json([shapes, metadata, hashes])
