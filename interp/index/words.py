"""Words that go with a feature: frequent in the prompts of the images where it fires strongly, rare elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEAST_IMAGES = 2
"""Prompts that must have a word for it to count."""
LEAST_Z = 2.5
"""Standard errors above chance from which on a word is listed."""

_WORD = re.compile(r"[^\W_]+(?:['\u2019\-][^\W_]+)*")
_BLOCK = 256


class Words(NamedTuple):
    """The words of every feature, most telling first.

    Attributes:
        vocabulary: the words.
        word: int32 [m, w], indices into the vocabulary, -1 where there is none.
        inside: int64 [m, w], strong images whose prompt has the word.
        outside: int64 [m, w], other images whose prompt has it.
        log_odds: float32 [m, w].
        z: float32 [m, w], log-odds over its standard error.
    """

    vocabulary: list[str]
    word: np.ndarray
    inside: np.ndarray
    outside: np.ndarray
    log_odds: np.ndarray
    z: np.ndarray


def split_words(prompt: str) -> list[str]:
    """The words of a prompt in lower case, each once, in order of appearance."""
    return list(dict.fromkeys(word.lower() for word in _WORD.findall(prompt)))


def telling_words(
    prompts: Sequence[str], feature: np.ndarray, image: np.ndarray, *, m: int, keep: int
) -> Words:
    """Rank words by the smoothed log-odds ratio of strong images against all others.

        log-odds = log (a + 1/2) / (A - a + 1/2) - log (b + 1/2) / (B - b + 1/2)

    where a of A strong images and b of B others have the word (Haldane-Anscombe smoothing), in the order of
    z = log-odds / sqrt(1/(a + 1/2) + 1/(A - a + 1/2) + 1/(b + 1/2) + 1/(B - b + 1/2)).

    Args:
        prompts: one for each image.
        feature: [p], feature of each strong (feature, image) pair; no pair occurs twice.
        image: [p], image of each pair, a place in `prompts`.
        m: number of features.
        keep: most words that are kept of a feature.

    Returns:
        The words that at least `LEAST_IMAGES` prompts have, with a z of at least `LEAST_Z`.
    """
    rows = [split_words(prompt) for prompt in prompts]
    total: dict[str, int] = {}
    for row in rows:
        for word in row:
            total[word] = total.get(word, 0) + 1
    vocabulary = sorted(word for word, count in total.items() if count >= LEAST_IMAGES)
    place = {word: column for column, word in enumerate(vocabulary)}
    known = [[place[word] for word in row if word in place] for row in rows]
    length = np.asarray([len(row) for row in known], np.int64)
    start = np.concatenate([[0], np.cumsum(length)])
    flat = np.asarray([column for row in known for column in row], np.int64)
    everywhere = np.asarray([total[word] for word in vocabulary], np.int64)

    word = np.full((m, keep), -1, np.int32)
    inside, outside = np.zeros((m, keep), np.int64), np.zeros((m, keep), np.int64)
    log_odds, scores = np.zeros((m, keep), np.float32), np.zeros((m, keep), np.float32)
    result = Words(vocabulary, word, inside, outside, log_odds, scores)
    size, top = len(vocabulary), min(keep, len(vocabulary))
    if not top:
        return result
    by_feature = np.argsort(feature, kind="stable")
    feature, image = feature[by_feature], image[by_feature]
    for low in range(0, m, _BLOCK):
        high = min(low + _BLOCK, m)
        part = slice(*np.searchsorted(feature, [low, high]))
        local, images = feature[part] - low, image[part]
        # Every (strong image, word of its prompt) pair in one flat array: word j of pair i.
        repeat = length[images]
        within = np.arange(repeat.sum()) - np.repeat(np.cumsum(repeat) - repeat, repeat)
        column = flat[np.repeat(start[images], repeat) + within]
        a = np.bincount(np.repeat(local, repeat) * size + column, minlength=(high - low) * size)
        a = a.reshape(high - low, size)
        strong = np.bincount(local, minlength=high - low)[:, None]
        b, others = everywhere - a, len(rows) - strong
        terms = (a + 0.5, strong - a + 0.5, b + 0.5, others - b + 0.5)
        odds = np.log(terms[0] / terms[1]) - np.log(terms[2] / terms[3])
        z = odds / np.sqrt(sum(1 / term for term in terms))
        best = np.argsort(-z, axis=1, kind="stable")[:, :top]
        every = np.arange(high - low)[:, None]
        listed = z[every, best] >= LEAST_Z
        block = slice(low, high), slice(0, top)
        word[block] = np.where(listed, best, -1)
        inside[block] = np.where(listed, a[every, best], 0)
        outside[block] = np.where(listed, b[every, best], 0)
        log_odds[block] = np.where(listed, odds[every, best], 0)
        scores[block] = np.where(listed, z[every, best], 0)
    return result
