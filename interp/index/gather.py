"""What one pass over sparse codes leaves behind: counts, and the strongest row of every (feature, image) pair."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Postings(NamedTuple):
    """One entry for each (feature, image) pair that occurs, sorted by feature, then strongest image first.

    Ties keep the order of the images. About 24 bytes a pair: this, not the rows, bounds the memory of an index.

    Attributes:
        start: int64 [m + 1], offsets of each feature's entries.
        feature: int32 [p].
        image: int32 [p], position among the images read.
        value: float32 [p], largest value over the image's steps and tokens.
        total: float32 [p], sum of its values over them.
        row: int32 [p], step position * tokens + token of the largest value, the first of equal ones.
    """

    start: np.ndarray
    feature: np.ndarray
    image: np.ndarray
    value: np.ndarray
    total: np.ndarray
    row: np.ndarray


class Gatherer:
    """Takes codes batch by batch and keeps what the index needs of them.

    Args:
        m: number of features.
        steps: steps of an image.
        tokens: tokens of a step.
    """

    def __init__(self, m: int, steps: int, tokens: int) -> None:
        """Start with nothing seen."""
        self.m, self.steps, self.tokens = m, steps, tokens
        self.images = 0
        self.active = np.zeros((m, steps), np.int64)
        self.total = np.zeros((m, steps))
        self.maximum = np.zeros(m, np.float32)
        self._parts: list[tuple[np.ndarray, ...]] = []

    @property
    def rows(self) -> int:
        """Rows seen."""
        return self.images * self.steps * self.tokens

    def add(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Take the codes of the next images.

        Args:
            indices: int [b, steps, tokens, k].
            values: float32, the same shape; 0 means an empty slot.
        """
        image, step, token, feature, value = flatten(indices, values)
        cell = feature.astype(np.int64) * self.steps + step
        size = self.m * self.steps
        self.active += np.bincount(cell, minlength=size).reshape(self.m, -1)
        self.total += np.bincount(cell, weights=value, minlength=size).reshape(self.m, -1)
        np.maximum.at(self.maximum, feature, value)
        if len(value):
            batch = indices.shape[0]
            pair = feature.astype(np.int64) * batch + image
            order = np.lexsort((-value, pair))
            ordered = pair[order]
            first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
            strongest = order[first]
            self._parts.append(
                (
                    feature[strongest].astype(np.int32),
                    (image[strongest] + self.images).astype(np.int32),
                    value[strongest],
                    np.add.reduceat(value[order].astype(np.float64), first).astype(np.float32),
                    (step[strongest] * self.tokens + token[strongest]).astype(np.int32),
                )
            )
        self.images += indices.shape[0]

    def postings(self) -> Postings:
        """Every (feature, image) pair seen so far."""
        empty = tuple(np.zeros(0, kind) for kind in ("i4", "i4", "f4", "f4", "i4"))
        columns = [np.concatenate(column) for column in zip(empty, *self._parts, strict=True)]
        feature, image, value = columns[:3]
        order = np.lexsort((image, -value, feature))
        columns = [column[order] for column in columns]
        start = np.searchsorted(columns[0], np.arange(self.m + 1)).astype(np.int64)
        return Postings(start, *columns)


def flatten(indices: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The active slots of codes [b, steps, tokens, k] as (image, step, token, feature, value), each [entries]."""
    image, step, token, slot = np.nonzero(values > 0)
    return image, step, token, indices[image, step, token, slot], values[image, step, token, slot]


def example_ranks(start: np.ndarray, *, top: int, quantiles: int) -> np.ndarray:
    """Which entries of the postings become examples.

    The first `top` of each feature, then `quantiles` at even distances over the rest (all of the rest, where it is
    smaller).

    Args:
        start: [m + 1], offsets of each feature's entries, strongest first.
        top: strongest images a feature.
        quantiles: weaker images a feature.

    Returns:
        int64 [m, top + quantiles], positions in the postings, -1 where there is none.
    """
    length = np.diff(start)[:, None]
    first = np.broadcast_to(np.arange(top), (len(length), top))
    rest = np.maximum(length - top, 0)
    place = np.arange(quantiles)
    even = ((2 * place + 1) * rest) // (2 * max(quantiles, 1))
    weaker = np.where(rest < quantiles, np.where(place < rest, place, rest), even)
    weaker = np.where(weaker < rest, top + weaker, length)
    rank = np.concatenate([first, weaker], axis=1)
    return np.where(rank < length, start[:-1, None] + rank, -1)


class HeatMaps:
    """Collects, in a second reading of the codes, the heat of chosen examples and every feature's histogram.

    Args:
        feature: [x] of each example.
        image: [x], position among the images read.
        step: [x], position among the steps read.
        maximum: float32 [m], largest value of each feature.
        steps: steps of an image.
        bins: bins of a histogram.
    """

    def __init__(
        self,
        feature: np.ndarray,
        image: np.ndarray,
        step: np.ndarray,
        *,
        maximum: np.ndarray,
        steps: int,
        bins: int,
    ) -> None:
        """Sort the examples by where they are met."""
        self.steps, self.maximum, self.bins = steps, maximum, bins
        self.histogram = np.zeros((len(maximum), bins), np.int64)
        key = self._key(feature, image, step)
        self._order = np.argsort(key, kind="stable")
        self._keys = key[self._order]
        self._images = 0
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Take the codes of the next images, in the order of the first pass."""
        image, step, token, feature, value = flatten(indices, values)
        share = value / np.maximum(self.maximum[feature], np.float32(1e-30))
        place = np.minimum((share * self.bins).astype(np.int64), self.bins - 1)
        np.add.at(self.histogram, (feature, place), 1)
        key = self._key(feature, image + self._images, step)
        self._images += indices.shape[0]
        if not len(self._keys):
            return
        found = np.minimum(np.searchsorted(self._keys, key), len(self._keys) - 1)
        hit = self._keys[found] == key
        self._parts.append(
            (self._order[found[hit]], token[hit].astype(np.int32), value[hit].astype(np.float32))
        )

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(start [x + 1], token [h], value [h]): the heat of example i lies at start[i] to start[i + 1]."""
        empty = (np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
        example, token, value = (
            np.concatenate(column) for column in zip(empty, *self._parts, strict=True)
        )
        order = np.lexsort((token, example))
        start = np.searchsorted(example[order], np.arange(len(self._order) + 1))
        return start.astype(np.int64), token[order], value[order]

    def _key(self, feature: np.ndarray, image: np.ndarray, step: np.ndarray) -> np.ndarray:
        """One integer for each (image, step, feature)."""
        place = np.asarray(image, np.int64) * self.steps + step
        return place * len(self.maximum) + feature
