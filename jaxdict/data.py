"""Rows of a store in a shuffled order that is a pure function of (seed, position).

An epoch permutes the training images and cuts them into pools of about `pool` rows; inside a pool
the rows of all its images, steps and tokens are permuted. Row number p of the endless stream is
thus known from (seed, p) alone, and the loader's state is one integer. Whether rows sit in memory
or are read block by block changes nothing about the order.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from tqdm import tqdm

if TYPE_CHECKING:
    from harvest.store import Store

T = TypeVar("T")
_BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Source:
    """Rows of one site of a store, as bfloat16 bits.

    Attributes:
        store: an open store.
        site: which site.
        images: int64 [images], sorted, the images to take.
        steps: indices of the captured denoising steps to take.
    """

    store: Store
    site: str
    images: np.ndarray
    steps: tuple[int, ...]

    @property
    def d(self) -> int:
        """Width of a row."""
        return int(self.store.shape(self.site)[3])

    @property
    def rows_per_image(self) -> int:
        """Steps times tokens."""
        return len(self.steps) * int(self.store.shape(self.site)[2])

    @property
    def rows(self) -> int:
        """Rows in all."""
        return len(self.images) * self.rows_per_image

    @property
    def bytes(self) -> int:
        """Size of all rows in bfloat16."""
        return self.rows * self.d * 2

    def read(self, images: np.ndarray) -> np.ndarray:
        """Bits of some images: uint16 [image, step, token, d]."""
        every = len(self.steps) == self.store.steps
        steps = None if every else np.asarray(self.steps)
        return np.asarray(self.store.read_bits(self.site, images=images, steps=steps))

    def spread(self, rows: int) -> Source:
        """The same source on whole images, evenly spread, of about `rows` rows (0: all)."""
        wanted = max(1, round(rows / self.rows_per_image))
        if not rows or wanted >= len(self.images):
            return self
        picked = np.linspace(0, len(self.images) - 1, wanted).round().astype(np.int64)
        return Source(self.store, self.site, self.images[np.unique(picked)], self.steps)

    def beside(self, site: str) -> Source:
        """The rows of another site that belong to the same images, steps and tokens, in the same order.

        Raises:
            ValueError: the store has no such site, or it is of another stream.
        """
        if site not in self.store.sites:
            raise ValueError(
                f"--target: expected a site of {self.store.path} ({', '.join(self.store.sites)}), got "
                f"{site!r}; pick one of them"
            )
        other = Source(self.store, site, self.images, self.steps)
        if other.rows != self.rows or stream_of(site) != stream_of(self.site):
            tokens, others = (self.store.shape(one)[2] for one in (self.site, site))
            raise ValueError(
                f"expected a target of the stream of {self.site} ({tokens} tokens), got {site} "
                f"({others}); name sites of one stream"
            )
        return other

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows in store order: (images, bits [image, step, token, d]), about 256 MB each."""
        per_image = max(1, self.rows_per_image * self.d * 2)
        size = max(1, _BLOCK_BYTES // per_image)
        for start in range(0, len(self.images), size):
            images = self.images[start : start + size]
            yield images, self.read(images)


def source_of(
    store: Store, site: str, *, split: str = "train", steps: tuple[int, ...] = ()
) -> Source:
    """Rows of a split at a site.

    Args:
        store: an open store.
        site: which site.
        split: train, validation or all.
        steps: captured denoising steps, empty for all.

    Returns:
        The source.

    Raises:
        ValueError: the store has no such site or step, or no finished image in the split.
    """
    if site not in store.sites:
        raise ValueError(
            f"--site: expected a site of {store.path} ({', '.join(store.sites)}), got {site!r}; "
            "pick one of them"
        )
    wrong = [step for step in steps if step >= store.steps]
    if wrong:
        raise ValueError(
            f"--steps: expected indices below {store.steps} (captured steps), got {wrong}; "
            "see `jaxdict inspect STORE`"
        )
    images = np.sort(np.asarray(store.indices(split), np.int64))  # pyright: ignore
    if not len(images):
        raise ValueError(
            f"expected finished {split} images in {store.path}, found none; harvest more prompts"
        )
    return Source(store, site, images, tuple(steps) or tuple(range(store.steps)))


def match_sites(sites: Sequence[str], patterns: Iterable[str]) -> tuple[list[str], list[str]]:
    """Which sites names and globs ask for.

    As in `jaxdict harvest` a glob is matched part by part: double.2.* is both streams of the residual
    and none of its neurons, and double.* is no site.

    Args:
        sites: what there is.
        patterns: names or globs; one string may hold several, separated by commas.

    Returns:
        The sites that match, in the order of `sites`, and the patterns that match none.
    """
    texts = list(patterns)
    asked = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    found = {
        pattern: {
            site
            for site in sites
            if site.count(".") == pattern.count(".")
            and all(map(fnmatchcase, site.split("."), pattern.split(".")))
        }
        for pattern in asked or texts
    }
    chosen = set().union(*found.values())
    return [site for site in sites if site in chosen], [p for p in found if not found[p]]


def stream_of(site: str) -> str:
    """`img` or `txt`, from a site's name; empty where the name has none."""
    return next((part for part in site.split(".") if part in ("img", "txt")), "")


def floats(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32 rows: uint16 [..., d] to float32 [n, d]."""
    return (bits.reshape(-1, bits.shape[-1]).astype(np.uint32) << 16).view(np.float32)


def watched(source: Source, name: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of a source, with a progress bar called `name`."""
    with tqdm(total=source.rows, unit="row", unit_scale=True, desc=name) as bar:
        for images, bits in source.blocks():
            yield images, bits
            bar.update(len(images) * source.rows_per_image)


def image_rows(blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Rows of an image at a time, float32 [n, d], from blocks as `Source.blocks` gives them."""
    return (floats(image) for _, bits in blocks for image in bits)


class Loader:
    """Batches of shuffled rows; batch number i is a function of (seed, i) and the source."""

    def __init__(
        self, source: Source, *, batch: int, seed: int, pool: int, memory: int = 2**32
    ) -> None:
        """Plan the order; nothing is read yet.

        Args:
            source: where the rows are.
            batch: rows in a batch.
            seed: of the order.
            pool: rows permuted together, about.
            memory: bytes up to which all rows are kept in memory.
        """
        self.source, self.batch, self.seed = source, batch, seed
        pools = min(len(source.images), max(1, -(-source.rows // pool)))
        self._bounds = np.linspace(0, len(source.images), pools + 1).round().astype(np.int64)
        self.resident = source.bytes <= memory
        self._cache: np.ndarray | None = None

    @property
    def pools(self) -> int:
        """Pools in an epoch."""
        return len(self._bounds) - 1

    def order(self, epoch: int, pool: int) -> tuple[np.ndarray, np.ndarray]:
        """A pool: sorted positions of its images in the source, a permutation of their rows."""
        shuffle = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.source.images))
        images = np.sort(shuffle[self._bounds[pool] : self._bounds[pool + 1]])
        rng = np.random.default_rng([self.seed, 1, epoch, pool])
        return images, rng.permutation(len(images) * self.source.rows_per_image)

    def _load(self, epoch: int, pool: int) -> tuple[np.ndarray, np.ndarray]:
        """A pool as (table of rows [*, d], which of them in which order)."""
        images, rows = self.order(epoch, pool)
        d, per_image = self.source.d, self.source.rows_per_image
        if not self.resident:
            return self.source.read(self.source.images[images]).reshape(-1, d), rows
        if self._cache is None:
            self._cache = self._read_all()
        image, rest = np.divmod(rows, per_image)
        return self._cache, images[image] * per_image + rest

    def _read_all(self) -> np.ndarray:
        table = np.empty((self.source.rows, self.source.d), np.uint16)
        at = 0
        for _, bits in self.source.blocks():
            rows = bits.reshape(-1, self.source.d)
            table[at : at + len(rows)] = rows
            at += len(rows)
        return table

    def _pools_from(self, row: int) -> Iterator[tuple[int, int, int]]:
        """(epoch, pool, rows to skip in it) from a row of the endless stream on."""
        ends = self._bounds[1:] * self.source.rows_per_image
        epoch, offset = divmod(row, self.source.rows)
        pool = int(np.searchsorted(ends, offset, side="right"))
        skip = offset - int(self._bounds[pool]) * self.source.rows_per_image
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


@contextmanager
def ahead(items: Iterator[T], depth: int = 4) -> Iterator[Iterator[T]]:
    """Run an iterator in a background thread, `depth` items ahead; its errors are raised here.

    Args:
        items: an iterator, endless or not; it is closed at the end if it is a generator.
        depth: finished items that may wait.

    Returns:
        A context manager that gives an iterator over the same items.
    """
    done = object()
    waiting: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    break
            put((done, None))
        except BaseException as error:
            put((done, error))
        finally:
            if hasattr(items, "close"):
                items.close()  # pyright: ignore[reportAttributeAccessIssue]

    def take() -> Iterator[T]:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item

    thread = threading.Thread(target=work, name="rows", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        thread.join()
