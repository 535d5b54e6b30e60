"""The one reading of the store: which rows, their codes, and how well these rebuild them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from harvest.flags import expect, expect_captured, print_captured
from harvest.store import Store, from_bits
from interp.config import IndexConfig
from interp.index.postings import CodeStatistics
from steer.coder import Coder, Codes


class Selection(NamedTuple):
    """The rows that an index is made of.

    Attributes:
        store: an open store.
        site: one of its sites.
        images: int64, images to read, rising.
        steps: int64, captured indices of the steps to read.
        tokens: tokens of an image.
        taken: int64 [images], how many of them are encoded, the first ones: the others are padding.
    """

    store: Store
    site: str
    images: np.ndarray
    steps: np.ndarray
    tokens: int
    taken: np.ndarray

    @property
    def left_out(self) -> int:
        """Rows of padding that are not encoded."""
        return len(self.steps) * int((self.tokens - self.taken).sum())

    @property
    def rows(self) -> int:
        """Rows that are encoded."""
        return len(self.steps) * int(self.taken.sum())

    def known(self, part: slice) -> np.ndarray:
        """Which tokens of some of the images are encoded: bool [b, steps, t], up to the longest text."""
        taken = self.taken[part]
        known = np.arange(taken.max()) < taken[:, None, None]
        return np.broadcast_to(known, (len(taken), len(self.steps), known.shape[2]))

    def read(self, site: str, part: slice) -> np.ndarray:
        """The rows of some of the images that are encoded, at one site: float32 [n, d]."""
        known = self.known(part)
        bits = self.store.read_bits(site, self.images[part], self.steps, tokens=known.shape[2])
        return from_bits(bits.reshape(-1, bits.shape[-1]) if known.all() else bits[known])


def select(config: IndexConfig, coder: Coder, store: Store) -> Selection:
    """Choose the rows to read.

    Raises:
        ValueError: the store has no such site, width or step, no finished image in the split, or only
            a sample of each image's tokens.
    """
    if store.sampled:
        raise ValueError(
            f"expected a store that keeps every token of an image, but {store.path} keeps a sample: "
            "heat maps need them all; harvest without --tokens-per-image"
        )
    site = _choose_site(config, coder, store)
    images = _choose_images(config, store)
    _, total_steps, tokens, _ = store.shape(site)
    expect_captured(config.steps, store.step_numbers.tolist())
    print_captured(config.steps, store.step_numbers.tolist())
    steps = np.asarray(config.steps or range(total_steps), np.int64)
    padding = coder.dictionary.padding if config.padding == "same" else config.padding
    unpadded = None if padding == "keep" else store.unpadded(site)
    taken = np.full(len(images), tokens) if unpadded is None else unpadded[images]
    return Selection(store, site, images, steps, tokens, taken)


def _choose_site(config: IndexConfig, coder: Coder, store: Store) -> str:
    """The site to read, checked against the store and the dictionary's width."""
    site = config.site or str(coder.dictionary.card.get("site") or "")
    known = f"a site of the store ({', '.join(store.sites)})"
    expect(site in store.sites, "site", known, site, "harvest that site or name another")
    width = store.shape(site)[-1]
    if width != coder.d:
        raise ValueError(
            f"--dictionary: expected d = {width}, the width of {site} in {config.store}, got d = {coder.d}; "
            "give the store the dictionary was trained on"
        )
    return site


def _choose_images(config: IndexConfig, store: Store) -> np.ndarray:
    """The images to read, rising; a seeded sample if the split has more than asked for."""
    images = store.indices(config.split)
    if not len(images):
        raise ValueError(
            f"--split: expected finished images in the {config.split} split of {config.store}, found none; "
            "harvest more images or give --split all"
        )
    if config.images and len(images) > config.images:
        rng = np.random.default_rng(config.seed)
        images = np.sort(rng.choice(images, config.images, replace=False))
    return np.asarray(images, np.int64)


def encode(
    config: IndexConfig, coder: Coder, selection: Selection, fit: Fit
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode the images in order, a batch at a time: indices and values [b, steps, tokens, k], 0 for padding."""
    _, site, images, steps, tokens, _ = selection
    size = max(1, config.batch // (len(steps) * tokens))
    rebuilt = _rebuilt_site(coder, selection)
    with tqdm(total=len(images), desc="encode", unit="image") as bar:
        for low in range(0, len(images), size):
            part = slice(low, low + size)
            known = selection.known(part)
            x = torch.from_numpy(selection.read(site, part)).to(coder.device)
            with torch.inference_mode():
                codes = coder.encode(x)
                if rebuilt == site:
                    fit.add(coder, x, codes)
                elif rebuilt is not None:
                    y = torch.from_numpy(selection.read(rebuilt, part))
                    fit.add(coder, y.to(coder.device), codes)
            yield (
                _in_place(codes.indices.cpu().numpy().astype(np.int32), known, tokens),
                _in_place(codes.values.float().cpu().numpy(), known, tokens),
            )
            bar.update(len(known))


def _in_place(rows: np.ndarray, known: np.ndarray, tokens: int) -> np.ndarray:
    """Rows [n, k] at the tokens where `known` [b, steps, t] holds, of [b, steps, tokens, k]; 0 elsewhere."""
    if known.all() and known.shape[2] == tokens:
        return rows.reshape(*known.shape, -1)
    out = np.zeros((*known.shape[:2], tokens, rows.shape[1]), rows.dtype)
    out[:, :, : known.shape[2]][known] = rows
    return out


def _rebuilt_site(coder: Coder, selection: Selection) -> str | None:
    """The site whose rows the codes rebuild; None for a transcoder's target that the store lacks."""
    if not coder.dictionary.transcoder:
        return selection.site
    store, target = selection.store, coder.dictionary.card["target"]
    fits = target in store.sites and store.shape(target)[2:] == (selection.tokens, coder.d_out)
    return target if fits else None


class Fit:
    """How well the dictionary rebuilds its rows, or a transcoder its target's: raw FVU, from sums in float64.

    FVU = sum ||x - x_hat||^2 / sum ||x - mean||^2

    Args:
        d: width of the rows that are rebuilt.
    """

    def __init__(self, d: int) -> None:
        """Start without any rows."""
        self.count = 0
        self.first = torch.zeros(d, dtype=torch.float64)
        self.second = torch.zeros(d, dtype=torch.float64)
        self.error = 0.0

    def add(self, coder: Coder, x: torch.Tensor, codes: Codes) -> None:
        """Add rows x [n, d_out] to rebuild and the codes that rebuild them."""
        for rows, indices, values in zip(
            x.split(4096), codes.indices.split(4096), codes.values.split(4096), strict=True
        ):
            exact = rows.double()
            self.count += len(rows)
            self.first += exact.sum(0).cpu()
            self.second += exact.square().sum(0).cpu()
            residual = exact - coder.decode(Codes(indices, values)).double()
            self.error += float(residual.square().sum())

    @property
    def fvu(self) -> float | None:
        """The FVU; None if there were no rows, or they do not vary."""
        spread = float((self.second - self.first.square() / max(self.count, 1)).sum())
        return self.error / spread if spread > 1e-12 * float(self.second.sum()) else None


def spill(
    file: IO[bytes], statistics: CodeStatistics, indices: np.ndarray, values: np.ndarray
) -> tuple[int, ...]:
    """Add a batch of codes to the statistics, write it to a file, and return its shape."""
    statistics.add(indices, values)
    file.write(np.ascontiguousarray(indices).data)
    file.write(np.ascontiguousarray(values).data)
    return indices.shape


def unspill(file: IO[bytes], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Read the next batch of codes from the file, given its shape."""
    count = 4 * int(np.prod(shape))
    indices = np.frombuffer(file.read(count), np.int32).reshape(shape)
    values = np.frombuffer(file.read(count), np.float32).reshape(shape)
    return indices, values
