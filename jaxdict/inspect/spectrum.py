"""How the variance of a site is spread over its principal components."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from harvest.store import Store, from_bits

_CELLS = 64
_BLOCK = 4096


class Spectrum(NamedTuple):
    """Variances along the principal components of a site's rows.

    Attributes:
        rows: rows they were taken from.
        variances: eigenvalues of the covariance, largest first, float64.
    """

    rows: int
    variances: Float[np.ndarray, " c"]

    @property
    def cumulated(self) -> Float[np.ndarray, " c"]:
        """Share of the variance of the first 1, 2, 3, ... components; 0 if nothing varies."""
        total = self.variances.sum()
        return np.cumsum(self.variances) / (total if total > 0 else 1.0)

    @property
    def powers(self) -> list[int]:
        """1, 2, 4, 8, ... up to the number of components."""
        return [2**i for i in range(len(self.variances).bit_length())]

    def share(self, count: int) -> float:
        """Share of the variance of the first `count` components, at least one."""
        return float(self.cumulated[min(count, len(self.variances)) - 1])

    def components(self, share: float) -> int:
        """The fewest components that hold at least this share of the variance."""
        place = int(np.searchsorted(self.cumulated, share - 1e-12))
        return min(place, len(self.variances) - 1) + 1


def spectrum(store: Store, site: str, *, rows: int, padding: str = "drop") -> Spectrum:
    """Take the spectrum of a site, in float64, from some of its rows.

    Args:
        store: where they are.
        site: its name.
        rows: how many, about; they are spread evenly over finished images, steps and tokens.
        padding: drop or keep rows that are padding of the text.

    Returns:
        as many variances as the width, or as there are rows where there are fewer.

    Raises:
        ValueError: the site is unknown, nothing is finished, or the data is damaged.
    """
    values = sample_rows(store, site, rows=rows, padding=padding)
    n, d = values.shape
    mean = values.mean(0, dtype=np.float64)
    if n <= d:
        centred = values - mean
        scatter = centred @ centred.T
    else:
        scatter = np.zeros((d, d))
        for start in range(0, n, _BLOCK):
            centred = values[start : start + _BLOCK] - mean
            scatter += centred.T @ centred
    variances = np.linalg.eigvalsh(scatter)[::-1] / n
    return Spectrum(n, np.maximum(variances, 0.0))


def sample_rows(
    store: Store, site: str, *, rows: int, padding: str = "drop"
) -> Float[np.ndarray, "n d"]:
    """Read some rows of a site: as few chunks as will do, yet from many images, steps and tokens.

    Args:
        store: where they are.
        site: its name.
        rows: how many, about: without padding at least so many, where there are so many.
        padding: as `spectrum`.

    Returns:
        float32 rows. The same ones each time.

    Raises:
        ValueError: as `spectrum`.
    """
    shape = store.shape(site)
    array: Any = store.group[f"sites/{site}"]
    chunk = array.chunks
    groups = np.unique(store.indices() // chunk[0])  # a chunk is finished as a whole
    if not len(groups):
        raise ValueError(f"{store.path} holds no finished image yet; run its harvest again")
    unpadded = None if padding == "keep" else store.unpadded(site)
    tokens, share = shape[2], 1.0
    if unpadded is not None:
        tokens = int(unpadded.max())
        share = float(unpadded.mean()) / min(shape[2], -(-tokens // chunk[2]) * chunk[2])
    grid = -(-shape[1] // chunk[1]), -(-tokens // chunk[2])
    inner = grid[0] * grid[1]
    cells = math.ceil(rows / (share * math.prod(chunk[:3])))
    cells = min(max(_CELLS, cells), len(groups) * inner)
    each = -(-rows // cells)
    # Evenly spread over images; which steps and tokens of each is left to chance, as any stride
    # through them could fall in step with the grid.
    rng = np.random.default_rng(0)
    places = np.arange(cells) * len(groups) * inner // cells
    shift = rng.integers(inner, size=len(groups))
    parts = []
    for group, cell in zip(*np.divmod(places, inner), strict=True):
        cell = int(cell + shift[group]) % inner
        first = (int(groups[group]), *divmod(cell, grid[1]))
        region = tuple(slice(i * c, (i + 1) * c) for i, c in zip(first, chunk[:3], strict=True))
        try:
            block = np.asarray(array[region])
        except (ValueError, RuntimeError, *store.place.errors) as error:
            raise ValueError(
                f"sites/{site} of {store.path} cannot be read from image {region[0].start} on "
                f"({error}); see `jaxdict inspect {store.path} --verify`"
            ) from error
        if unpadded is None:
            block = block.reshape(-1, shape[3])
        else:
            token = np.arange(region[2].start, region[2].start + block.shape[2])
            some = token < unpadded[region[0], None, None]
            block = block[np.broadcast_to(some, block.shape[:3])]
        chosen = np.sort(rng.permutation(len(block))[:each])
        parts.append(from_bits(np.ascontiguousarray(block[chosen])))
    return np.concatenate(parts)
