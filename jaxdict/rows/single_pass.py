"""Training rows, each at most once and in random order, with the place each one came from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxdict.rows.loader import Loader
from jaxdict.rows.norms import NormLimit
from jaxdict.rows.source import Source


class LabelledRows(NamedTuple):
    """A batch of rows and the place each one came from.

    Attributes:
        bits: uint16 [batch, d], bfloat16 bits; the last batch is filled up with zero rows.
        places: int32 [batch, 3], (image, step, token) of each row.
        count: how many rows are real, not padding.
        target: uint16 [batch, d_out], the same rows at the target's site; None without one.
    """

    bits: np.ndarray
    places: np.ndarray
    count: int
    target: np.ndarray | None = None


class SinglePass:
    """One pass over a source in the order of the `Loader`; batch i is a function of (seed, i)."""

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        seed: int,
        pool: int,
        rows: int,
        target: Source | None = None,
        limit: NormLimit | None = None,
    ) -> None:
        """Plan the order; nothing is read yet.

        Args:
            source: where the rows are.
            batch: rows in a batch.
            seed: of the order.
            pool: rows permuted together, about; they come from images drawn at random.
            rows: rows in all, at most; 0 for every row of the source.
            target: rows of another site, of the same images, steps and tokens, to be read as well.
            limit: rows of a larger norm are left out: others of their pool are given in their place.
        """
        self.source, self.batch, self.target = source, batch, target
        self.rows = min(rows or source.rows, source.rows)
        self._plan = Loader(source, batch=batch, seed=seed, pool=pool, limit=limit)

    @property
    def batches(self) -> int:
        """Number of batches; the last one may not be full."""
        return -(-self.rows // self.batch)

    def read(self, start: int = 0) -> Iterator[LabelledRows]:
        """Batches from number `start` on; pools before it are not read."""
        wanted, end = start * self.batch, self.rows
        parts: list[tuple[np.ndarray, ...]] = []
        held, first = 0, 0
        for pool in range(self._plan.pools):
            images, order = self._plan.order(0, pool)
            skip, first = wanted - first, first + len(order)
            if first <= wanted:
                continue
            some = self.source.images[images]
            tables = [self.source.places(some), self.source.read(some)]
            order = self._plan.without_large(tables[1], order, 0, pool)
            order = order[max(skip, 0) : len(order) - max(first - end, 0)]
            if self.target is not None:
                tables.append(self.target.read(some))
            at = 0
            while at < len(order):
                take = min(self.batch - held, len(order) - at)
                parts.append(tuple(table[order[at : at + take]] for table in tables))
                held, at = held + take, at + take
                if held == self.batch:
                    yield self._pack(parts, held)
                    parts, held = [], 0
            if first >= end:
                break
        if held:
            yield self._pack(parts, held)

    def _pack(self, parts: list[tuple[np.ndarray, ...]], count: int) -> LabelledRows:
        spare = ((0, self.batch - count), (0, 0))
        places, bits, *target = (np.pad(np.concatenate(x), spare) for x in zip(*parts, strict=True))
        return LabelledRows(bits, places, count, target[0] if target else None)
