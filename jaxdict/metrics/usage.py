"""Activation statistics of a dictionary's features over rows of a store."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxdict.dictionary import Dictionary, coder
from jaxdict.rows import Source, floats, watched


class Usage(NamedTuple):
    """How often each feature is active over some rows, and how much it adds to what is rebuilt.

    Attributes:
        fired: int64 [m], rows on which each feature is active.
        energy: float64 [m], sum of value^2 ||atom||^2 over rows, in the space of the atoms.
        rows: number of rows.
    """

    fired: np.ndarray
    energy: np.ndarray
    rows: int


def feature_usage(
    dictionary: Dictionary, rows: Source, *, batch: int = 4096, memory_mb: int = 512
) -> Usage:
    """Encode rows and count how often and how strongly each feature is active.

    Args:
        dictionary: on raw rows, of any kind.
        rows: at the site that is read.
        batch: rows at a time.
        memory_mb: memory, in MB, that arrays with one entry an atom may take.
    """
    fired, squares = np.zeros(dictionary.m, np.int64), np.zeros(dictionary.m)
    for indices, values in encode_rows(dictionary, rows, "usage", batch=batch, memory_mb=memory_mb):
        squares += np.bincount(indices, values**2, dictionary.m)
        fired += np.bincount(indices[values != 0], minlength=dictionary.m)
    parts = [dictionary.atoms[i : i + 1024] for i in range(0, dictionary.m, 1024)]
    norms = np.concatenate([np.square(atoms.astype(np.float64)).sum(1) for atoms in parts])
    return Usage(fired, squares * norms, rows.rows)


def typical_activations(
    dictionary: Dictionary, rows: Source, *, batch: int = 4096, memory_mb: int = 512
) -> np.ndarray:
    """Mean value of each feature over the rows on which it is active: float32 [m], 0 if none.

    Args:
        dictionary: on raw rows, of any kind.
        rows: of the training split, at the site that is read.
        batch: rows at a time.
        memory_mb: memory, in MB, that arrays with one entry an atom may take.
    """
    total, times = np.zeros(dictionary.m), np.zeros(dictionary.m, np.int64)
    for indices, values in encode_rows(
        dictionary, rows, "typical", batch=batch, memory_mb=memory_mb
    ):
        total += np.bincount(indices, values, dictionary.m)
        times += np.bincount(indices[values != 0], minlength=dictionary.m)
    return np.where(times > 0, total / np.maximum(times, 1), 0).astype(np.float32)


def encode_rows(
    dictionary: Dictionary,
    rows: Source,
    name: str,
    *,
    batch: int = 4096,
    memory_mb: int = 512,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode rows batch by batch, with a progress bar.

    Args:
        dictionary: on raw rows, of any kind.
        rows: at the site that is read.
        name: of the progress bar.
        batch: rows at a time; the last batch is padded, and the padding left out.
        memory_mb: memory, in MB, that arrays with one entry an atom may take.

    Yields:
        Indices int [rows k] and values float64 [rows k]; a slot of value 0 is empty.
    """
    for block in watched(rows, name):
        for start in range(0, len(block.bits), batch):
            part = floats(block.bits[start : start + batch])
            padded = np.concatenate([part, np.repeat(part[:1], batch - len(part), axis=0)])
            codes = coder.encode(dictionary, jnp.asarray(padded), memory_mb=memory_mb)
            indices = np.asarray(codes.indices)[: len(part)].ravel()
            yield indices, np.asarray(codes.values, np.float64)[: len(part)].ravel()
