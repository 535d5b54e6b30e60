"""Which text tokens of an image are padding: the pieces after the last one of its prompt.

FLUX attends to them as to any other token, and they carry something of the picture. But most prompts are short, so
that padding is most of the rows of a text stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PIECE = "<pad>"
"""How T5 writes a token of padding."""
_AT_ONCE = 2**20
"""Pieces that are looked at together, about."""


def text_lengths(pieces: Any, images: int) -> np.ndarray:
    """Tokens of each image's text up to the last one that is no padding.

    Args:
        pieces: array of strings [image, token], read a few images at a time.
        images: how many of its images to look at.

    Returns:
        int64 [images].
    """
    tokens = pieces.shape[1]
    size = max(1, _AT_ONCE // tokens)
    found = np.zeros(images, np.int64)
    for start in range(0, images, size):
        part = slice(start, min(start + size, images))
        real = np.asarray(pieces[part]) != PIECE
        found[part] = np.where(real.any(1), tokens - np.argmax(real[:, ::-1], axis=1), 0)
    return found
