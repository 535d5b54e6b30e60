"""Scanning an activation store: every chunk is read, which tests its checksum, and the statistics are recomputed."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from tqdm import tqdm

from harvest.store.bfloat16 import finite
from harvest.store.read import Store
from harvest.store.schema import PASS, fingerprint, stamp
from harvest.store.statistics import STATISTICS, summarize

_TOLERANCE = 1e-9
"""Sums may differ by this share: another machine adds in another order."""
_LARGE = ("sites", "statistics", "norms")
_BY_SHARD = ("statistics", "norms", "shards")
"""Groups whose arrays have a shard's number as their first axis."""


def verify_store(store: Store, *, progress: bool = True) -> list[str]:
    """Read everything in a store and check that it is sound.

    Checked are the checksum of every chunk; that each finished shard has its stamp and all its
    files; that activations are finite; that the statistics are those of the activations (counts of
    norms, smallest and largest values exactly, sums up to 1e-9); that the fingerprint is that of the
    attributes, prompts and seeds. Shards that are not finished are left alone: a harvest makes them
    again, and so are the rows of one that an unfinished pass was adding images to. At most one shard of one site is in memory.

    A damaged shard is made again by the same harvest command once its file `images/done/c/<shard>`
    is deleted.

    Args:
        store: the store.
        progress: show a progress bar, in bytes before compression.

    Returns:
        the problems, one line each; none if the store is sound.
    """
    scan = _Scan(store)
    problems = scan.small_arrays()
    shards = scan.finished()
    problems += scan.marks()
    total = sum(scan.bytes_of(shard) for shard in shards)
    bar = tqdm(
        total=total, unit="B", unit_scale=True, desc="verify", disable=not progress, smoothing=0.1
    )
    with bar:
        for shard in shards:
            for site in store.sites:
                problems += scan.site(site, shard)
                bar.update(scan.nbytes(f"sites/{site}", shard))
            if "images/picture" in scan.arrays:
                problems += scan.read("images/picture", shard)[1]
                bar.update(scan.nbytes("images/picture", shard))
    return problems


class _Scan:
    """One scan: the store's arrays, their files, and the marks that could be read."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.per_shard: int = store.attrs["images_per_shard"]
        self.shards = -(-store.images // self.per_shard)
        self.arrays: dict[str, Any] = {
            name: array
            for name, array in store.group.members(max_depth=None)
            if hasattr(array, "shape")
        }
        self.files = {name: set(store.place.files(name)) for name in self.arrays}
        self.values: dict[str, np.ndarray] = {}
        stages = store.attrs.get(PASS, {}).get("stages", {})
        self.stages = {stamp(name): stage["images"] for name, stage in stages.items()}

    def small_arrays(self) -> list[str]:
        """Read the arrays that are small, block by block; keeps the marks that could be read."""
        problems = []
        for name, array in self.arrays.items():
            if name.partition("/")[0] in _LARGE or name == "images/picture":
                continue
            marks = name in ("images/done", "shards/stamp")
            values = np.zeros(array.shape, array.dtype) if marks else None
            for place, region in _blocks(array):
                try:
                    block = np.asarray(array[region])
                except Exception as error:  # whatever a codec raises is a finding
                    problems.append(self.damaged(name, place, error))
                else:
                    if values is not None:
                        values[region] = block
            if values is not None:
                self.values[name] = values
        return problems or self._origin()

    def marks(self) -> list[str]:
        """Compare done flags with stamps; a stamp without flags is where a harvest was interrupted."""
        problems = []
        own = {stamp(self.store.fingerprint), *self.stages}
        for shard in range(self.shards):
            flags = self._done()[self.images(shard)] != 0
            mark = self._stamps()[shard]
            if flags.any() and not flags.all():
                missing = self.images(shard).start + int(np.argmin(flags))
                problems.append(f"{self.name(shard)} is done in part: image {missing} is not")
            if flags.any() and mark == 0 and not self.stages:
                problems.append(f"{self.name(shard)} is marked done, but has no stamp")
            elif int(mark) not in (0, *own):
                problems.append(f"{self.name(shard)} was written for another store")
        return problems

    def finished(self) -> list[int]:
        """Shards of which any image is marked done."""
        done = self._done()
        cut = [bool(self.stages) and mark == 0 for mark in self._stamps()]
        return [n for n in range(self.shards) if done[self.images(n)].any() and not cut[n]]

    def site(self, site: str, shard: int) -> list[str]:
        """Activations and statistics of one shard, each read and both compared."""
        bits, problems = self.read(f"sites/{site}", shard)
        sums, more = self.read(f"statistics/{site}", shard)
        counts, others = self.read(f"norms/{site}", shard)
        problems += more + others
        if bits is None:
            return problems
        right, norms = summarize(bits)
        if not np.isfinite(right).all():
            return [*problems, self._infinite(site, shard, bits)]
        if sums is not None:
            problems += self._compare(site, shard, sums[0], right, bits.shape[0] * bits.shape[2])
        if counts is not None and not np.array_equal(counts[0], norms):
            step, place = np.argwhere(counts[0] != norms)[0]
            problems.append(
                f"norms/{site}, {self.name(shard)}, disagrees with the rows: at captured step "
                f"{step}, bin {place} counts {counts[0][step, place]}, but there are "
                f"{norms[step, place]}"
            )
        return problems

    def read(self, name: str, shard: int) -> tuple[np.ndarray | None, list[str]]:
        """What an array holds of one shard, or None and why it could not be read."""
        array = self.arrays.get(name)
        if array is None:
            return None, [f"{name} is missing"] if shard == 0 else []
        place = (shard, *(0,) * (array.ndim - 1))
        try:
            values = np.asarray(array[self.region(name, shard)])
        except Exception as error:
            return None, self._narrow(name, place, error)
        # Where all values are zero, zarr may leave out the file.
        if array.metadata.encode_chunk_key(place) not in self.files[name] and self._needed(
            name, shard
        ):
            return None, [f"{self._where(name, place)} is missing: {self.key(name, place)}"]
        return values, []

    def region(self, name: str, shard: int) -> slice:
        """Where a shard lies along the first axis of an array."""
        by_shard = name.partition("/")[0] in _BY_SHARD
        return slice(shard, shard + 1) if by_shard else self.images(shard)

    def nbytes(self, name: str, shard: int) -> int:
        """Bytes of a shard of an array, before compression."""
        array = self.arrays.get(name)
        if array is None:
            return 0
        where = self.region(name, shard)
        return (where.stop - where.start) * math.prod(array.shape[1:]) * array.dtype.itemsize

    def bytes_of(self, shard: int) -> int:
        """Bytes of the activations and pictures of a shard, before compression."""
        names = [f"sites/{site}" for site in self.store.sites]
        return sum(self.nbytes(name, shard) for name in [*names, "images/picture"])

    def images(self, shard: int) -> slice:
        """The images of a shard, those that an unfinished pass has added included."""
        start = shard * self.per_shard
        images = self.stages.get(int(self._stamps()[shard]), self.store.images)
        return slice(start, min(start + self.per_shard, max(images, self.store.images)))

    def name(self, shard: int) -> str:
        """A shard and its images, in words."""
        where = self.images(shard)
        return f"shard {shard} ({_range(where.start, where.stop)})"

    def key(self, name: str, place: tuple[int, ...]) -> str:
        """File of a chunk (of a shard, if the array is sharded) within the store."""
        return f"{name}/{self.arrays[name].metadata.encode_chunk_key(place)}"

    def damaged(self, name: str, place: tuple[int, ...], error: Exception, images: str = "") -> str:
        """One line about a chunk that cannot be read."""
        where = f"{name}, {images}" if images else self._where(name, place)
        return f"{where} cannot be read: {self.key(name, place)} is damaged ({_line(error)})"

    def _where(self, name: str, place: tuple[int, ...]) -> str:
        group = name.partition("/")[0]
        if group in _BY_SHARD:
            return f"{name}, {self.name(place[0])}"
        if group in ("sites", "images"):
            size = (self.arrays[name].shards or self.arrays[name].chunks)[0]
            start = place[0] * size
            return f"{name}, {_range(start, min(start + size, self.store.images))}"
        return name

    def _narrow(self, name: str, place: tuple[int, ...], error: Exception) -> list[str]:
        """Which images of a shard are damaged: its inner chunks are read one at a time."""
        array = self.arrays[name]
        if array.shards is None:
            return [self.damaged(name, place, error)]
        where = self.images(place[0])
        size = array.chunks[0]
        lines: list[str] = []
        spans: list[list[int]] = []
        for start in range(where.start, where.stop, size):
            stop = min(start + size, where.stop)
            try:
                for inner in _inner(array.shape[1:], array.chunks[1:]):
                    array[(slice(start, stop), *inner)]
            except Exception as inner_error:
                error = inner_error
                if spans and spans[-1][1] == start:
                    spans[-1][1] = stop
                else:
                    spans.append([start, stop])
        for start, stop in spans or [[where.start, where.stop]]:
            lines.append(self.damaged(name, place, error, _range(start, stop)))
        return lines

    def _needed(self, name: str, shard: int) -> bool:
        """Whether an array must have a file for a finished shard: not where all of it is zero."""
        group, _, site = name.partition("/")
        if group not in ("sites", "statistics"):
            return True
        try:
            counts = np.asarray(self.arrays[f"norms/{site}"][shard])
        except Exception:  # reported when the norms are read
            return True
        return bool(counts[:, 1:].any())

    def _compare(
        self, site: str, shard: int, found: np.ndarray, right: np.ndarray, count: int
    ) -> list[str]:
        """Stored statistics [step, statistic, d] against those of `count` rows a step."""
        scale = np.sqrt(right[:, 1])
        allowed = np.stack(
            [
                _TOLERANCE * np.sqrt(count) * scale,
                _TOLERANCE * right[:, 1],
                np.zeros_like(scale),
                np.zeros_like(scale),
            ],
            axis=1,
        )
        wrong = ~(np.abs(found - right) <= allowed)  # NaN is wrong too
        if not wrong.any():
            return []
        step, statistic, d = np.argwhere(wrong)[0]
        return [
            f"statistics/{site}, {self.name(shard)}, disagrees with the rows: at captured step "
            f"{step}, dimension {d}, the {STATISTICS[statistic]} is "
            f"{found[step, statistic, d]:.10g}, but the rows have {right[step, statistic, d]:.10g}"
        ]

    def _infinite(self, site: str, shard: int, bits: np.ndarray) -> str:
        broken = ~finite(bits).all(-1)
        image, step, token = np.argwhere(broken)[0]
        return (
            f"sites/{site}, {self.name(shard)}, holds NaN or infinity in {int(broken.sum())} rows: "
            f"the first at image {self.images(shard).start + image}, captured step {step}, "
            f"token {token}"
        )

    def _origin(self) -> list[str]:
        """Check that attributes, prompts, seeds and so on are those that the store was made with."""
        store = self.store
        try:
            found = fingerprint(store.content())
            numbers = store.step_numbers.tolist()
            positions = {
                stream: np.asarray(
                    self.arrays[f"images/picked_{stream}"][: store.images], "<i4"
                ).tobytes()
                for stream in store.attrs["positions"]
            }
            places = np.asarray(self.arrays["tokens/img"][:])
        except Exception as error:
            return [f"the attributes cannot be read ({_line(error)})"]
        problems = []
        if found != store.fingerprint:
            problems.append(
                f"the fingerprint of the attributes, prompts and seeds is {found[:16]}, but the "
                f"store says {store.fingerprint[:16]}: one of them was changed"
            )
        if numbers != store.attrs["step_numbers"]:
            problems.append(
                f"steps/number is {numbers}, but the attributes say {store.attrs['step_numbers']}"
            )
        height, width = store.grid
        if not np.array_equal(places, np.argwhere(np.ones((height, width)))):
            problems.append(f"tokens/img is not the grid of {height} x {width} image tokens")
        problems += [
            f"images/picked_{stream} is not what the store was made with"
            for stream, digest in store.attrs["positions"].items()
            if hashlib.sha256(positions[stream]).hexdigest() != digest
        ]
        return problems

    def _done(self) -> np.ndarray:
        return self.values.get("images/done", np.zeros(self.store.images, np.uint8))

    def _stamps(self) -> np.ndarray:
        return self.values.get("shards/stamp", np.zeros(self.shards, np.uint64))


def _blocks(array: Any) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """Chunks of an array, or its shards if it is sharded: place in the grid, and region."""
    size = array.shards or array.chunks
    grid = [range(-(-n // c)) for n, c in zip(array.shape, size, strict=True)]
    for place in itertools.product(*grid):
        yield place, tuple(slice(i * c, (i + 1) * c) for i, c in zip(place, size, strict=True))


def _inner(shape: tuple[int, ...], size: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    starts = [range(0, n, c) for n, c in zip(shape, size, strict=True)]
    for place in itertools.product(*starts):
        yield tuple(slice(i, i + c) for i, c in zip(place, size, strict=True))


def _range(start: int, stop: int) -> str:
    return f"image {start}" if stop - start == 1 else f"images {start} to {stop - 1}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
