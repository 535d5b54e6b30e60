"""Rows of one site of a store, in store order, alone or beside the rows of another site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from harvest.flags import expect, expect_captured
from harvest.store import from_bits, padding_line, stream_of

if TYPE_CHECKING:
    from harvest.store import Store

_BLOCK_BYTES = 256 * 2**20


class Block(NamedTuple):
    """Rows of some images, in store order: by image, then by step, then by token.

    Attributes:
        images: int64 [image].
        bits: uint16 [n, d], bfloat16 bits.
        steps: steps of each image.
        tokens: int64 [image], tokens of each step of each image.
    """

    images: np.ndarray
    bits: np.ndarray
    steps: int
    tokens: np.ndarray

    def at_step(self, place: int) -> np.ndarray:
        """The rows of one step: uint16 [n, d].

        Args:
            place: of the step, among those that are read.
        """
        d = self.bits.shape[-1]
        if (self.tokens == self.tokens[0]).all():
            whole = self.bits.reshape(len(self.images), self.steps, -1, d)
            return whole[:, place].reshape(-1, d)
        ends = np.cumsum(np.repeat(self.tokens, self.steps)).reshape(-1, self.steps)[:, place]
        return np.concatenate(
            [self.bits[end - n : end] for n, end in zip(self.tokens, ends, strict=True)]
        )


@dataclass(frozen=True)
class Source:
    """Rows of one site of a store, as bfloat16 bits.

    Attributes:
        store: an open store.
        site: which site.
        images: int64 [images], sorted, the images to take.
        steps: captured indices of the steps to take.
        tokens: int64 [images], how many tokens to take of each image, its first ones; None for all.
    """

    store: Store
    site: str
    images: np.ndarray
    steps: tuple[int, ...]
    tokens: np.ndarray | None = None

    @property
    def d(self) -> int:
        """Width of a row."""
        return int(self.store.shape(self.site)[3])

    @property
    def denoising_steps(self) -> tuple[int, ...]:
        """Which denoising step each of `steps` is."""
        return tuple(self.store.step_numbers[list(self.steps)].tolist())

    @cached_property
    def rows_of(self) -> np.ndarray:
        """Rows of each image, int64 [images]: steps times tokens."""
        tokens = self.store.shape(self.site)[2] if self.tokens is None else self.tokens
        return np.broadcast_to(len(self.steps) * np.asarray(tokens, np.int64), self.images.shape)

    @cached_property
    def rows(self) -> int:
        """Rows in all."""
        return int(self.rows_of.sum())

    @property
    def bytes(self) -> int:
        """Size of all rows in bfloat16."""
        return self.rows * self.d * 2

    @property
    def left_out(self) -> int:
        """Rows of its images and steps that are not taken, as they are padding."""
        return len(self.images) * len(self.steps) * self.store.shape(self.site)[2] - self.rows

    def read(self, images: np.ndarray) -> np.ndarray:
        """The bits of some of its images, in store order: uint16 [n, d]."""
        every = len(self.steps) == self.store.steps
        steps = None if every else np.asarray(self.steps)
        if self.tokens is None:
            bits = self.store.read_bits(self.site, images=images, steps=steps)
            return np.asarray(bits).reshape(-1, self.d)
        tokens = self.tokens[np.searchsorted(self.images, images)]
        longest = int(tokens.max(initial=0))
        size = max(1, _BLOCK_BYTES // max(1, len(self.steps) * longest * self.d * 2))
        out = np.empty((len(self.steps) * int(tokens.sum()), self.d), np.uint16)
        at = 0
        for start in range(0, len(images), size):
            some = slice(start, start + size)
            taken = np.arange(longest) < tokens[some, None, None]
            bits = self.store.read_bits(self.site, images[some], steps, tokens=longest)
            rows = bits[np.broadcast_to(taken, bits.shape[:3])]
            out[at : at + len(rows)] = rows
            at += len(rows)
        return out

    def places(self, images: np.ndarray) -> np.ndarray:
        """Where the rows of some of its images come from, in store order: int32 [n, 3], (image, step, token)."""
        tokens = int(self.store.shape(self.site)[2])
        grid = np.meshgrid(images, self.steps, np.arange(tokens), indexing="ij")
        found = np.stack(grid, axis=-1).astype(np.int32)
        if self.tokens is None:
            return found.reshape(-1, 3)
        return found[found[..., 2] < self.tokens[np.searchsorted(self.images, images), None, None]]

    def subset(self, places: np.ndarray) -> Source:
        """The same source on some of its images, by their places in it, ascending."""
        tokens = None if self.tokens is None else self.tokens[places]
        return Source(self.store, self.site, self.images[places], self.steps, tokens)

    def spread(self, rows: int) -> Source:
        """The same source on whole images, evenly spread, of about `rows` rows (0: all)."""
        wanted = max(1, round(rows / (self.rows / len(self.images))))
        if not rows or wanted >= len(self.images):
            return self
        picked = np.linspace(0, len(self.images) - 1, wanted).round().astype(np.int64)
        return self.subset(np.unique(picked))

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
        other = Source(self.store, site, self.images, self.steps, self.tokens)
        tokens, others = (self.store.shape(one)[2] for one in (self.site, site))
        if tokens != others or stream_of(site) != stream_of(self.site):
            raise ValueError(
                f"expected a target of the stream of {self.site} ({tokens} tokens), got {site} "
                f"({others}); name sites of one stream"
            )
        return other

    def blocks(self) -> Iterator[Block]:
        """All rows in store order, about 256 MB at a time."""
        per_image = max(1, int(self.rows_of.max()) * self.d * 2)
        size = max(1, _BLOCK_BYTES // per_image)
        for start in range(0, len(self.images), size):
            images = self.images[start : start + size]
            tokens = self.rows_of[start : start + size] // len(self.steps)
            yield Block(images, self.read(images), len(self.steps), tokens)


def source_of(
    store: Store,
    site: str,
    *,
    split: str = "train",
    steps: tuple[int, ...] = (),
    padding: str = "drop",
) -> Source:
    """Rows of a split at a site.

    Args:
        store: an open store.
        site: which site.
        split: train, validation or all.
        steps: captured indices, empty for all.
        padding: drop leaves out tokens of the text that are padding, where the store can tell; keep takes them.

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
    steps = tuple(steps) or tuple(range(store.steps))
    return without_padding(Source(store, site, images, steps), padding)


def without_padding(source: Source, padding: str) -> Source:
    """A source without its rows of padding, or as it is if they are kept or its store cannot tell.

    Args:
        source: rows of whole images.
        padding: drop or keep.

    Raises:
        ValueError: every row is padding.
    """
    unpadded = None if padding == "keep" else source.store.unpadded(source.site)
    if unpadded is None:
        return source
    tokens = unpadded[source.images]
    some = tokens > 0
    if not some.any():
        raise ValueError(
            f"expected rows of {source.site} that are not padding, found none; use --padding keep"
        )
    return Source(source.store, source.site, source.images[some], source.steps, tokens[some])


def print_padding(sources: Sequence[Source]) -> None:
    """Print in one line what became of the padding of text sites, if there are any."""
    texts = [source for source in sources if stream_of(source.site) == "txt"]
    if texts:
        where = texts[0].site if len(texts) == 1 else f"{len(texts)} text sites"
        rows, left_out = (sum(getattr(one, name) for one in texts) for name in ("rows", "left_out"))
        print(padding_line(where, texts[0].store, rows=rows, left_out=left_out))


def side_by_side(blocks: Iterable[Block], target: Source | None) -> Iterator[Block]:
    """Blocks of rows with the target's rows of the same places behind them, for a transcoder.

    In one array, so that whatever cuts rows into batches keeps a row and its target together.

    Args:
        blocks: as `Source.blocks` gives them.
        target: as `Source.beside` gives it; None leaves the blocks as they are.

    Yields:
        Blocks whose bits are uint16 [n, d + d_out].
    """
    for block in blocks:
        if target is not None:
            both = np.concatenate([block.bits, target.read(block.images)], axis=-1)
            block = block._replace(bits=both)
        yield block


def floats(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits to float32 rows: uint16 [..., d] to float32 [n, d]."""
    return from_bits(bits.reshape(-1, bits.shape[-1]))


def image_rows(blocks: Iterable[Block]) -> Iterator[np.ndarray]:
    """Rows of an image at a time, float32 [n, d], from blocks as `Source.blocks` gives them."""
    for block in blocks:
        ends = np.cumsum(block.steps * block.tokens)
        yield from map(floats, np.split(block.bits, ends[:-1]))
