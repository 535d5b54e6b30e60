"""Rows of one site of a store, in store order, alone or beside the rows of another site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from harvest.flags import expect, expect_captured
from harvest.store import from_bits, stream_of

if TYPE_CHECKING:
    from harvest.store import Store

_BLOCK_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Source:
    """Rows of one site of a store, as bfloat16 bits.

    Attributes:
        store: an open store.
        site: which site.
        images: int64 [images], sorted, the images to take.
        steps: captured indices of the steps to take.
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
    def denoising_steps(self) -> tuple[int, ...]:
        """The denoising step that each of `steps` is."""
        return tuple(int(self.store.step_numbers[index]) for index in self.steps)

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
        """The bits of some images: uint16 [image, step, token, d]."""
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
        steps: captured indices of the steps to take, empty for all.

    Returns:
        The source.

    Raises:
        ValueError: the store has no such site or step, or no finished image in the split.
    """
    known = f"a site of {store.path} ({', '.join(store.sites)})"
    expect(site in store.sites, "site", known, site, "pick one of them")
    expect_captured(steps, store.step_numbers.tolist())
    images = np.sort(np.asarray(store.indices(split), np.int64))  # pyright: ignore
    if not len(images):
        raise ValueError(
            f"expected finished {split} images in {store.path}, found none; harvest more prompts"
        )
    return Source(store, site, images, tuple(steps) or tuple(range(store.steps)))


def side_by_side(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], target: Source | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of rows with the target's rows of the same places behind them, for a transcoder.

    In one array, so that whatever cuts rows into batches keeps a row and its target together.

    Args:
        blocks: as `Source.blocks` gives them.
        target: as `Source.beside` gives it; None leaves the blocks as they are.

    Yields:
        Images, and bits uint16 [image, step, token, d + d_out].
    """
    for images, bits in blocks:
        if target is not None:
            bits = np.concatenate([bits, target.read(images)], axis=-1)
        yield images, bits


def floats(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32 rows: uint16 [..., d] to float32 [n, d]."""
    return from_bits(bits.reshape(-1, bits.shape[-1]))


def image_rows(blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Rows of an image at a time, float32 [n, d], from blocks as `Source.blocks` gives them."""
    return (floats(image) for _, bits in blocks for image in bits)
