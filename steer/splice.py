"""What a dictionary loses, seen in the picture: its reconstruction in the activation's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from steer.coder import Coder
from steer.edits import check_steps
from steer.hooks import Moment, changing, check_width, editing_site


@contextmanager
def splicing(
    pipe: Any,
    coder: Coder,
    *,
    site: str | None = None,
    steps: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Replace x by decode(encode(x)) at a site while the context lasts.

    Args:
        pipe: a FLUX pipeline.
        coder: the dictionary.
        site: where; None for the site in the dictionary's card.
        steps: (start, stop) denoising steps; None for all.

    Raises:
        ValueError: a site the model does not have, activations of another width than the
            dictionary's, or a transcoder, which rebuilds another site than it reads.
    """
    where = editing_site(coder, site)
    span = None if steps is None else check_steps(steps)

    def change(rows: Tensor, moment: Moment) -> Tensor | None:
        nonlocal coder
        if span is not None and not span[0] <= moment.step < span[1]:
            return None
        check_width(coder, rows)
        coder = coder.to(rows.device)
        return coder.decode(coder.encode(rows)).float() - rows.float()

    with changing(pipe, {where: change}):
        yield


def psnr(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio of each picture against another, float64 [n] in dB; infinite where
    they are equal.

        10 log10(255^2 / mean squared difference)

    Args:
        pictures: uint8 [n, H, W, 3].
        others: the same shape.

    Raises:
        ValueError: shapes differ.
    """
    if pictures.shape != others.shape or pictures.ndim != 4:
        raise ValueError(
            f"expected two arrays [n, H, W, 3] of one shape, got {list(pictures.shape)} "
            f"and {list(others.shape)}"
        )
    error = ((pictures.astype(np.float64) - others) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return 10 * np.log10(255.0**2 / error)
