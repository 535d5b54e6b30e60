"""What a second reading of the codes adds, once maxima are known: the heat of examples, and histograms."""

from __future__ import annotations

import numpy as np

from interp.index.postings import flatten


def example_ranks(start: np.ndarray, *, top: int, quantiles: int) -> np.ndarray:
    """Choose the entries of the postings that become examples.

    They are the first `top` of each feature, then `quantiles` at even distances over the rest (or all of the rest, if
    those are fewer).

    Args:
        start: [m + 1], offsets of each feature's entries, strongest first.
        top: strongest images a feature.
        quantiles: weaker images a feature.

    Returns:
        Int64 [m, top + quantiles], places in the postings, -1 where there is no example.
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
    """Heat of chosen examples and histograms of all features, accumulated batch by batch.

    Args:
        feature: [x], feature of each example.
        image: [x], its place among the images read.
        step: [x], its place among the steps read.
        maximum: float32 [m], largest value of each feature.
        steps: steps of an image.
        bins: bins of a histogram.

    Attributes:
        histogram: int64 [m, bins], counts of positive values in equal bins from 0 to the maximum.
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
        """Sort the examples in the order in which they are read."""
        self.steps, self.maximum, self.bins = steps, maximum, bins
        self.histogram = np.zeros((len(maximum), bins), np.int64)
        key = self._key(feature, image, step)
        self._order = np.argsort(key, kind="stable")
        self._keys = key[self._order]
        self._images = 0
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Add the codes of the next images, in the order of the first reading."""
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
        """Heat of all examples: start [x + 1], token [h], value [h]; that of example i is at start[i] to start[i + 1]."""
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
