"""A finished activation store of one site, with rows that a benchmark makes up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from harvest.store import StoreSpec, create_store

SHARD = 8
"""Images in a shard."""


def write_store(
    path: Path,
    site: str,
    shape: tuple[int, int, int, int],
    rows: Callable[[int], np.ndarray],
    *,
    split: Sequence[int] | None = None,
    compress: str = "none",
) -> Path:
    """Write the store.

    Args:
        path: its folder, which must not be there yet.
        site: its only site.
        shape: images, steps, tokens and d.
        rows: gives [n, step, token, d] of n images, values or bfloat16 bits, for one shard after another.
        split: 0 (train) or 1 (validation) of each image; None for training images only.
        compress: none or zstd.

    Returns:
        The folder.
    """
    images, steps, tokens, d = shape
    spec = StoreSpec(
        sites={site: (tokens, d)},
        images=images,
        steps=steps,
        prompts=[""] * images,
        seeds=[0] * images,
        split=[0] * images if split is None else split,
        sigmas=[1.0] * steps,
        timesteps=[1.0] * steps,
        grid=(1, tokens),
        images_per_shard=SHARD,
        compress=compress,
    )
    writer = create_store(path, spec)
    for shard in writer.pending():
        part = writer.images_of(shard)
        writer.write(shard, {site: rows(part.stop - part.start)})
    return path
