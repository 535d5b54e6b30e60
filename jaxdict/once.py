"""Training rows, each at most once and in random order, with the place each one came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxdict.data import Loader, Source


class Batch(NamedTuple):
    """Rows and their labels.

    Attributes:
        bits: uint16 [batch, d], bfloat16 bits; zero rows fill the last batch up.
        places: int32 [batch, 3], (image, step, token) of each row.
        count: rows that are real.
    """

    bits: np.ndarray
    places: np.ndarray
    count: int


class Once:
    """One pass over a source in the order of the `Loader`; batch i is a function of (seed, i)."""

    def __init__(self, source: Source, *, batch: int, seed: int, pool: int, rows: int) -> None:
        """Plan the order; nothing is read yet.

        Args:
            source: where the rows are.
            batch: rows in a batch.
            seed: of the order.
            pool: rows permuted together, about; they come from images drawn at random.
            rows: rows in all, at most; 0 for every row of the source.
        """
        self.source, self.batch = source, batch
        self.rows = min(rows or source.rows, source.rows)
        self._plan = Loader(source, batch=batch, seed=seed, pool=pool)

    @property
    def batches(self) -> int:
        """Number of batches, the last one perhaps not full."""
        return -(-self.rows // self.batch)

    def read(self, start: int = 0) -> Iterator[Batch]:
        """Batches from number `start` on; pools before it are not read."""
        wanted, end = start * self.batch, self.rows
        bits: list[np.ndarray] = []
        places: list[np.ndarray] = []
        held, first = 0, 0
        for pool in range(self._plan.pools):
            images, order = self._plan.order(0, pool)
            skip, first = wanted - first, first + len(order)
            if first <= wanted:
                continue
            order = order[max(skip, 0) : len(order) - max(first - end, 0)]
            table = self.source.read(self.source.images[images])
            labels = self._places(images)[order]
            rows = table.reshape(-1, table.shape[-1])[order]
            at = 0
            while at < len(rows):
                take = min(self.batch - held, len(rows) - at)
                bits.append(rows[at : at + take])
                places.append(labels[at : at + take])
                held, at = held + take, at + take
                if held == self.batch:
                    yield self._pack(bits, places, held)
                    bits, places, held = [], [], 0
            if first >= end:
                break
        if held:
            yield self._pack(bits, places, held)

    def _places(self, images: np.ndarray) -> np.ndarray:
        """(image, step, token) of the rows of some images, in store order."""
        tokens = int(self.source.store.shape(self.source.site)[2])
        grid = np.meshgrid(
            self.source.images[images], self.source.steps, np.arange(tokens), indexing="ij"
        )
        return np.stack([axis.ravel() for axis in grid], axis=1).astype(np.int32)

    def _pack(self, bits: list[np.ndarray], places: list[np.ndarray], count: int) -> Batch:
        spare = ((0, self.batch - count), (0, 0))
        return Batch(
            np.pad(np.concatenate(bits), spare), np.pad(np.concatenate(places), spare), count
        )
