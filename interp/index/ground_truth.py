"""Ground truth: how well a feature tells an attribute of the picture, as the area under the ROC curve.

A feature is chosen on one half of the images and reported on the other: the best of many would look better than it is
on the images that chose it. No prompt is in both halves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

POOLINGS = ("max", "mean")
LEAST = 3
"""A tag is scored if each half has at least this many images with it and as many without it."""


class Tags(NamedTuple):
    """Ground-truth tags of the images that have them.

    Attributes:
        tags: (attribute, value) pairs, in order of first appearance by attribute.
        images: places of the images that have tags, among those read.
        has: bool [images, tags].
    """

    tags: list[tuple[str, str]]
    images: np.ndarray
    has: np.ndarray


class Scores(NamedTuple):
    """AUROC of every feature for every tag on both halves, and what the first half chose.

    Attributes:
        selected: float32 [m, t], AUROC on the half that chooses.
        reported: float32 [m, t], AUROC of the same feature and pooling on the other half.
        pooling: uint8 [m, t], index into `POOLINGS`, chosen on the first half.
        best_tag: int32 [m], each feature's tag with the largest `selected`; -1 without tags or if it never fires.
        tag_feature: int32 [t], each tag's feature with the largest `selected`; ties go to the wider gap between the
            means, in standard deviations.
        order: int32 [m], features by the `selected` of their best tag, ties by the gap; dead features last.
        counts: int64 [t, 2], images with the tag in each half.
    """

    selected: np.ndarray
    reported: np.ndarray
    pooling: np.ndarray
    best_tag: np.ndarray
    tag_feature: np.ndarray
    order: np.ndarray
    counts: np.ndarray


def auroc(values: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of every column for every tag.

        AUROC = (sum of the ranks of the images with the tag - p (p + 1) / 2) / (p q)

    This is the probability that a random image with the tag has a larger value than one without it, ties counting
    half (Mann-Whitney).

    Args:
        values: [n, c], one score for each image and column.
        has: bool [n, t], p images with the tag and q without.

    Returns:
        Float64 [c, t]; NaN where p or q is zero.
    """
    # Here, because it takes long to import and a store without labels never needs it.
    from scipy.stats import rankdata

    positive = has.sum(0).astype(np.float64)
    negative = has.shape[0] - positive
    total = rankdata(values, axis=0).T @ has.astype(np.float64)
    pairs = positive * negative
    wins = total - positive * (positive + 1) / 2
    return np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)


def collect_tags(labels: Sequence[dict[str, list[str]]]) -> Tags:
    """Collect the tags of the images with one object and known labels.

    An image has one object if `objects` among its labels is ["1"] or, where labels do not count objects, if every
    attribute has one value. `objects` itself is no tag.
    """
    images = [position for position, label in enumerate(labels) if _single(label)]
    groups: dict[str, dict[str, None]] = {}
    for position in images:
        for attribute, values in labels[position].items():
            if attribute != "objects":
                groups.setdefault(attribute, {}).update(dict.fromkeys(values))
    tags = [(attribute, value) for attribute, values in groups.items() for value in values]
    column = {tag: place for place, tag in enumerate(tags)}
    has = np.zeros((len(images), len(tags)), bool)
    for row, position in enumerate(images):
        for attribute, values in labels[position].items():
            for value in values if attribute != "objects" else ():
                has[row, column[attribute, value]] = True
    return Tags(tags, np.asarray(images, np.int64), has)


def halves(prompts: Sequence[str], *, seed: int = 0) -> np.ndarray:
    """Bool [n]: the images that report (the others choose), by a hash of seed and prompt."""
    return np.asarray(
        [hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()[0] & 1 for prompt in prompts], bool
    )


def score(
    blocks: Iterator[tuple[slice, np.ndarray, np.ndarray]],
    has: np.ndarray,
    reports: np.ndarray,
    *,
    m: int,
) -> Scores:
    """Score features for tags, block by block of features.

    Args:
        blocks: (features, largest [n, c], mean [n, c]): values of each image for a block of features.
        has: bool [n, t].
        reports: bool [n], the half that reports.
        m: number of features in all.

    Returns:
        The scores.
    """
    tags = has.shape[1]
    selected = np.full((m, tags), np.nan, np.float32)
    reported = np.full((m, tags), np.nan, np.float32)
    pooling = np.zeros((m, tags), np.uint8)
    gap = np.zeros((m, tags), np.float32)
    alive = np.zeros(m, bool)
    for features, largest, mean in blocks:
        alive[features] = largest.any(0)
        if not tags:
            continue
        chosen = np.stack([auroc(x[~reports], has[~reports]) for x in (largest, mean)])
        other = np.stack([auroc(x[reports], has[reports]) for x in (largest, mean)])
        gaps = np.stack([_gap(x[~reports], has[~reports]) for x in (largest, mean)])
        pick = (chosen[1] > chosen[0]).astype(np.uint8)
        index = pick[None].astype(np.intp)
        selected[features] = np.take_along_axis(chosen, index, 0)[0]
        reported[features] = np.take_along_axis(other, index, 0)[0]
        gap[features] = np.take_along_axis(gaps, index, 0)[0]
        pooling[features] = pick
    counts = np.stack([has[~reports].sum(0), has[reports].sum(0)], 1).astype(np.int64)
    if not tags or not m:
        nothing = np.full(m, -1, np.int32)
        order = np.argsort(~alive, kind="stable").astype(np.int32)
        none = np.zeros(0, np.int32)
        return Scores(selected, reported, pooling, nothing, none, order, counts)
    # Many features have an AUROC of exactly 1: the wider gap then tells which is clearer.
    by_tag = np.lexsort((gap, selected), axis=0)
    tag_feature = by_tag[-1].astype(np.int32)
    by_feature = np.lexsort((gap, selected), axis=1)
    best = by_feature[:, -1].astype(np.int32)
    every = np.arange(m)
    order = np.lexsort((every, -gap[every, best], -selected[every, best], ~alive))
    best[~alive] = -1
    return Scores(selected, reported, pooling, best, tag_feature, order.astype(np.int32), counts)


def enough(has: np.ndarray, reports: np.ndarray) -> np.ndarray:
    """Bool [t]: tags with at least `LEAST` images with them and `LEAST` without in each half."""
    result = np.ones(has.shape[1], bool)
    for half in (has[~reports], has[reports]):
        positive = half.sum(0)
        result &= (positive >= LEAST) & (half.shape[0] - positive >= LEAST)
    return result


def _single(label: dict[str, list[str]]) -> bool:
    if not label:
        return False
    if "objects" in label:
        return label["objects"] == ["1"]
    return all(len(values) == 1 for values in label.values())


def _gap(values: np.ndarray, has: np.ndarray) -> np.ndarray:
    """Mean with the tag minus mean without it, in standard deviations of all; [c, t]."""
    values = values.astype(np.float64)
    positive = has.sum(0).astype(np.float64)
    negative = has.shape[0] - positive
    total = values.T @ has.astype(np.float64)
    rest = values.sum(0)[:, None] - total
    difference = total / np.maximum(positive, 1) - rest / np.maximum(negative, 1)
    return difference / np.maximum(values.std(0), 1e-12)[:, None]
