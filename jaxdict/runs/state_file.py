"""The arrays of a checkpoint as one safetensors file: written in pieces, partly in the background, never copied whole.

A state takes most of a machine's memory, and the next step writes over it. So two threads write pieces straight from
the arrays while a third copies others, at most `COPIED` of all bytes; those are written after the arrays have been
given back.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from harvest.hashing import hasher
from harvest.tensors import tensor_header
from jaxdict.devices import whole

COPIED = 0.4
"""Share of the bytes that is copied at most."""
_PIECE, _READ, _WRITERS = 64 << 20, 4 << 20, 2


class _Piece(NamedTuple):
    """Bytes, and where in the file they go."""

    data: np.ndarray
    offset: int


class StateFile:
    """A file while it is written.

    Attributes:
        path: where it lies.
    """

    def __init__(self, path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
        """Write the arrays, and return as soon as they may be written over.

        Args:
            path: the file to make.
            arrays: by name, of NumPy or JAX; those of several processes are gathered, so all of them have to come here.
            metadata: what else the file says of itself.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        self.path, self._metadata = path, metadata
        self._shapes = {
            name: (np.dtype(array.dtype), tuple(array.shape)) for name, array in arrays.items()
        }
        self._copied: deque[_Piece] = deque()
        self._left = COPIED * sum(_size(*form) for form in self._shapes.values())
        self._file = path.open("w+b", buffering=0)
        try:
            at = self._write_header(dict.fromkeys(arrays, hasher().hexdigest()))
            with ThreadPoolExecutor(1 + _WRITERS) as threads:
                for name, array in arrays.items():
                    self._take(array, at, threads)
                    at += _size(*self._shapes[name])
        except BaseException:
            self._discard()
            raise

    def finish(self) -> None:
        """Write what was copied, wait for the disk, and put the hashes of what is there into the header."""
        try:
            while self._copied:
                self._write(self._copied.popleft())
            hashes = dict.fromkeys(self._shapes, hasher().hexdigest())
            self._file.seek(self._write_header(hashes))
            for name, form in self._shapes.items():
                hashes[name] = self._hash_next(_size(*form))
            self._write_header(hashes)
            os.fsync(self._file.fileno())
            self._file.close()
        except BaseException:
            self._discard()
            raise

    def _take(self, array: Any, start: int, threads: ThreadPoolExecutor) -> None:
        """Write an array's bytes or keep a copy of them."""
        host = np.ascontiguousarray(whole(array)).reshape(-1).view(np.uint8)
        if not _written_over(array) and host.nbytes <= self._left:
            self._left -= host.nbytes
            self._copied.append(_Piece(host, start))
            return
        pieces = deque(
            _Piece(host[at : at + _PIECE], start + at) for at in range(0, host.nbytes, _PIECE)
        )
        if len(pieces) <= 1:
            self._write_from(pieces)
            return
        tasks = [threads.submit(self._copy_from, pieces)]
        tasks += [threads.submit(self._write_from, pieces) for _ in range(_WRITERS)]
        for task in tasks:
            task.result()

    def _copy_from(self, pieces: deque[_Piece]) -> None:
        """Copy the last of the pieces, and the one before it, as long as copies are allowed."""
        while self._left >= _PIECE and (piece := _pop(pieces.pop)):
            self._left -= piece.data.nbytes
            self._copied.append(_Piece(piece.data.copy(), piece.offset))

    def _write_from(self, pieces: deque[_Piece]) -> None:
        """Write the first of the pieces, and the next."""
        while piece := _pop(pieces.popleft):
            self._write(piece)

    def _write_header(self, hashes: Mapping[str, str]) -> int:
        """Write the header; its length."""
        header = tensor_header(self._shapes, self._metadata, hashes)
        self._write(_Piece(np.frombuffer(header, np.uint8), 0))
        return len(header)

    def _write(self, piece: _Piece) -> None:
        data, offset = piece.data.data, piece.offset
        while data:
            count = os.pwrite(self._file.fileno(), data, offset)
            data, offset = data[count:], offset + count

    def _hash_next(self, count: int) -> str:
        """The hash of the next bytes of the file."""
        found = hasher()
        for at in range(0, count, _READ):
            found.update(self._file.read(min(_READ, count - at)))
        return found.hexdigest()

    def _discard(self) -> None:
        """Leave nothing of the file, and no copies."""
        self._copied.clear()
        self._file.close()
        self.path.unlink(missing_ok=True)


def _size(dtype: np.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of an array."""
    return int(np.prod(shape)) * dtype.itemsize


def _pop(take: Callable[[], _Piece]) -> _Piece | None:
    """A piece that no other thread has taken, None when all are taken."""
    try:
        return take()
    except IndexError:
        return None


def _written_over(array: Any) -> bool:
    """Whether the memory that NumPy sees of an array may be used again as soon as training goes on.

    What comes from an accelerator, or is gathered from several processes, is a copy already.
    """
    if not isinstance(array, jax.Array):
        return True
    return array.is_fully_addressable and all(d.platform == "cpu" for d in array.devices())
