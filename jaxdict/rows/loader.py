"""Rows of a store in a shuffled order that is a pure function of (seed, position).

An epoch permutes the training images and cuts them into pools of as many images, about `pool` rows; inside a
pool the rows of all its images, steps and tokens are permuted. Row number p of the endless stream is
thus known from (seed, p) alone, and the loader's state is one integer. Whether rows sit in memory
or are read block by block changes nothing about the order.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxdict.rows.norms import NormLimit, norms, without
from jaxdict.rows.source import Source


class Loader:
    """Batches of shuffled rows; batch number i is a function of (seed, i) and the source."""

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        seed: int,
        pool: int,
        memory: int = 2**32,
        limit: NormLimit | None = None,
    ) -> None:
        """Plan the order; nothing is read yet.

        Args:
            source: where the rows are.
            batch: rows in a batch.
            seed: of the order.
            pool: rows permuted together, about.
            memory: bytes; a source of at most this size is kept in memory.
            limit: rows of a larger norm are left out: others of their pool are given in their place.
        """
        self._limit = limit
        self._above: np.ndarray | None = None
        self.source, self.batch, self.seed = source, batch, seed
        pools = min(len(source.images), max(1, -(-source.rows // pool)))
        self._bounds = np.linspace(0, len(source.images), pools + 1).round().astype(np.int64)
        self.resident = source.bytes <= memory
        self._starts = np.cumsum(source.rows_of) - source.rows_of
        self._cache: np.ndarray | None = None

    @property
    def pools(self) -> int:
        """Pools in an epoch."""
        return len(self._bounds) - 1

    def order(self, epoch: int, pool: int) -> tuple[np.ndarray, np.ndarray]:
        """A pool: sorted positions of its images in the source, a permutation of their rows."""
        images = np.sort(self._shuffled(epoch)[self._bounds[pool] : self._bounds[pool + 1]])
        rng = np.random.default_rng([self.seed, 1, epoch, pool])
        return images, rng.permutation(int(self.source.rows_of[images].sum()))

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Positions of all images, in the order of an epoch."""
        return np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.source.images))

    def _load(self, epoch: int, pool: int) -> tuple[np.ndarray, np.ndarray]:
        """A pool as (table of rows [*, d], which of them in which order)."""
        images, rows = self.order(epoch, pool)
        if not self.resident:
            table = self.source.read(self.source.images[images])
            return table, self.without_large(table, rows, epoch, pool)
        if self._cache is None:
            self._cache = self._read_all()
        counts = self.source.rows_of[images]
        # How far the rows of each image lie behind in the pool: in the table those of other images are between.
        behind = self._starts[images] - (np.cumsum(counts) - counts)
        rows = (np.repeat(behind, counts) + np.arange(len(rows)))[rows]
        return self._cache, self.without_large(self._cache, rows, epoch, pool)

    def without_large(
        self, table: np.ndarray, rows: np.ndarray, epoch: int, pool: int
    ) -> np.ndarray:
        """The order of a pool with others in the places of rows above the limit, if there is one."""
        if self._limit is None:
            return rows
        above = self._above if self._above is not None else norms(table) > self._limit.limit
        if table is self._cache:
            self._above = above
        return without(rows, above, [self.seed, 2, epoch, pool])

    def _read_all(self) -> np.ndarray:
        table = np.empty((self.source.rows, self.source.d), np.uint16)
        at = 0
        for block in self.source.blocks():
            table[at : at + len(block.bits)] = block.bits
            at += len(block.bits)
        return table

    def _pools_from(self, row: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, pool, rows to skip in it) from a row of the endless stream on."""
        epoch, offset = divmod(row, self.source.rows)
        upto = np.cumsum(self.source.rows_of[self._shuffled(epoch)])
        ends = upto[self._bounds[1:] - 1]
        pool = int(np.searchsorted(ends, offset, side="right"))
        skip = offset - (int(ends[pool - 1]) if pool else 0)
        while True:
            yield epoch, pool, skip
            pool, skip = pool + 1, 0
            if pool == self.pools:
                epoch, pool = epoch + 1, 0

    def batches(
        self, start: int = 0, *, own: tuple[int, int] | None = None
    ) -> Generator[np.ndarray, None, None]:
        """Endless batches from number `start` on: uint16 bits [batch, d].

        The next pool is read while this one is used.

        Args:
            start: number of the first batch.
            own: first and last + 1 of the rows of each batch to give; None for all.
        """
        low, high = own or (0, self.batch)
        plan = self._pools_from(start * self.batch)
        with ThreadPoolExecutor(1, thread_name_prefix="pool") as executor:
            epoch, pool, skip = next(plan)
            ahead = executor.submit(self._load, epoch, pool)
            out = np.empty((high - low, self.source.d), np.uint16)
            filled = 0
            while True:
                table, rows = ahead.result()
                rows = rows[skip:]
                epoch, pool, skip = next(plan)
                ahead = executor.submit(self._load, epoch, pool)
                at = 0
                while at < len(rows):
                    take = min(self.batch - filled, len(rows) - at)
                    first, last = max(low, filled), min(high, filled + take)
                    if first < last:
                        wanted = rows[at + first - filled : at + last - filled]
                        np.take(table, wanted, axis=0, out=out[first - low : last - low])
                    filled, at = filled + take, at + take
                    if filled == self.batch:
                        yield out
                        out, filled = np.empty_like(out), 0
