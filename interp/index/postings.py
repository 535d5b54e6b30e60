"""What the first reading of the codes keeps: counts, and the strongest row of every (feature, image) pair."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Postings(NamedTuple):
    """One entry for each (feature, image) pair that occurs, sorted by feature, then strongest image first.

    Ties keep the order of the images. The memory of an index grows with these entries, about 24 bytes each, not
    with the rows.

    Attributes:
        start: int64 [m + 1], offsets of each feature's entries.
        feature: int32 [p].
        image: int32 [p], its place among the images read.
        value: float32 [p], largest value over the image's steps and tokens.
        total: float32 [p], sum of its values over them.
        row: int32 [p], place of the step * tokens + token of the largest value; the first of equal ones.
    """

    start: np.ndarray
    feature: np.ndarray
    image: np.ndarray
    value: np.ndarray
    total: np.ndarray
    row: np.ndarray


class CodeStatistics:
    """Counts, sums and maxima of codes, and their postings, accumulated batch by batch.

    Args:
        m: number of features.
        steps: steps of an image.
        tokens: tokens of a step.
        left_out: rows of all images that are padding, and have no codes.

    Attributes:
        images: images so far.
        active: int64 [m, steps], rows of a step where a feature is active.
        total: float64 [m, steps], sum of its values over them.
        maximum: float32 [m], its largest value; 0 if never active.
    """

    def __init__(self, m: int, steps: int, tokens: int, *, left_out: int = 0) -> None:
        """Start without any codes."""
        self.m, self.steps, self.tokens, self.left_out = m, steps, tokens, left_out
        self.images = 0
        self.active = np.zeros((m, steps), np.int64)
        self.total = np.zeros((m, steps))
        self.maximum = np.zeros(m, np.float32)
        self._parts: list[tuple[np.ndarray, ...]] = []

    @property
    def rows(self) -> int:
        """Rows so far, without padding."""
        return self.images * self.steps * self.tokens - self.left_out

    def add(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Add the codes of the next images.

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
        """Every (feature, image) pair so far."""
        empty = tuple(np.zeros(0, kind) for kind in ("i4", "i4", "f4", "f4", "i4"))
        columns = [np.concatenate(column) for column in zip(empty, *self._parts, strict=True)]
        feature, image, value = columns[:3]
        order = np.lexsort((image, -value, feature))
        columns = [column[order] for column in columns]
        start = np.searchsorted(columns[0], np.arange(self.m + 1)).astype(np.int64)
        return Postings(start, *columns)


def flatten(indices: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, ...]:
    """The active slots of codes [b, steps, tokens, k]: (image, step, token, feature, value), each [entries]."""
    image, step, token, slot = np.nonzero(values > 0)
    return image, step, token, indices[image, step, token, slot], values[image, step, token, slot]
