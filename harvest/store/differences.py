"""How far the activations of two stores of the same images are apart, such as before and after quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from harvest.store.read import Store

_BLOCK = 2**17
"""Values that are worked on at a time in float64: few enough to stay in a core's cache."""


class Difference(NamedTuple):
    """Sums over the rows of a site, by captured step, in float64.

    Attributes:
        rows: rows, int64 [steps].
        difference: `sum ||a - b||^2`.
        first: `sum ||a||^2`.
        cosines: sum of the rows' cosines, which is 1 where both rows are zero and 0 where one is.
    """

    rows: np.ndarray
    difference: np.ndarray
    first: np.ndarray
    cosines: np.ndarray

    def error(self, step: int | None = None) -> float | None:
        """`sqrt(sum ||a - b||^2 / sum ||a||^2)`; None where all of a is zero and b is not.

        Args:
            step: a captured step, or None for all.
        """
        chosen = slice(None) if step is None else step
        apart, size = float(self.difference[chosen].sum()), float(self.first[chosen].sum())
        if size > 0:
            return float(np.sqrt(apart / size))
        return 0.0 if apart == 0 else None

    def cosine(self, step: int | None = None) -> float:
        """Mean over the rows of `a . b / (||a|| ||b||)`.

        Args:
            step: a captured step, or None for all.
        """
        chosen = slice(None) if step is None else step
        return float(self.cosines[chosen].sum() / max(int(self.rows[chosen].sum()), 1))


def compare_site(
    first: Store,
    second: Store,
    site: str,
    images: np.ndarray,
    *,
    at_once: int = 64 * 2**20,
    on_read: Callable[[int], Any] = lambda count: None,
) -> Difference:
    """Compare the rows of a site, a few images at a time.

    Args:
        first: a store.
        second: another one, for which `check_alike` holds.
        site: name of the site.
        images: numbers of images that are finished in both, ascending.
        at_once: about how many bytes of one store are read at a time; at least one step of one image.
        on_read: called after each block with the bytes that were read of both.

    Returns:
        the sums.

    Raises:
        ValueError: the data of one of them is damaged.
    """
    _, steps, tokens, d = first.shape(site)
    image_bytes = steps * tokens * d * 2
    arrays: list[Any] = [store.group[f"sites/{site}"] for store in (first, second)]
    chunk = max(array.chunks[0] for array in arrays)
    together = max(1, at_once // image_bytes // chunk) * chunk
    sums = np.zeros((3, steps))
    for group in np.split(images, np.flatnonzero(np.diff(images // together)) + 1):
        # An image that fills a block by itself is read step by step.
        parts = [slice(None)] if image_bytes <= at_once else [slice(s, s + 1) for s in range(steps)]
        for part in parts:
            a, b = (store.read(site, group, np.arange(steps)[part]) for store in (first, second))
            for offset, step in enumerate(np.arange(steps)[part]):
                rows = (values[:, offset].reshape(-1, d) for values in (a, b))
                sums[:, step] += _sums(*rows)
            on_read(a.size * 4)
    return Difference(np.full(steps, len(images) * tokens, np.int64), *sums)


def check_alike(first: Store, second: Store, sites: Sequence[str], others: Sequence[str]) -> None:
    """Raise unless row i of one store and row i of the other are the same place in the same image.

    Args:
        first: a store.
        second: another one.
        sites: sites of the first that are to be compared.
        others: sites of the second that are to be compared.

    Raises:
        ValueError: they are not; what differs is named, with both values.
    """

    def alike(what: str, one: Any, two: Any, more: str = "") -> None:
        if one != two:
            raise ValueError(
                f"expected two stores of the same images, sites and steps, but {what} is {one!r} "
                f"in {first.path} and {two!r} in {second.path}{more}"
            )

    extra = sorted(set(sites) ^ set(others))
    if extra:
        has, lacks = (first, second) if extra[0] in sites else (second, first)
        raise ValueError(
            f"expected two stores of the same sites, but {extra[0]} is in {has.path} and not in "
            f"{lacks.path} (they hold {', '.join(sites)} and {', '.join(others)}); "
            "choose what both have by --sites"
        )
    alike("the number of images", first.images, second.images)
    alike("the number of captured steps", first.steps, second.steps)
    alike("the steps captured", first.step_numbers.tolist(), second.step_numbers.tolist())
    alike("the sigma of the steps", first.sigmas.tolist(), second.sigmas.tolist())
    for site in sites:
        alike(f"the shape of {site}", first.shape(site)[1:], second.shape(site)[1:])
    for image, (one, two) in enumerate(zip(first.prompts, second.prompts, strict=True)):
        alike(f"the prompt of image {image}", one, two)
    for image in np.flatnonzero(first.seeds != second.seeds)[:1]:
        alike(f"the seed of image {image}", int(first.seeds[image]), int(second.seeds[image]))
    for site in sites if first.sampled or second.sampled else ():
        one, two = first.positions(site), second.positions(site)
        for image in np.flatnonzero((one != two).any(1))[:1]:
            what = f"the list of tokens that {site} keeps of image {image}"
            alike(what, one[image].tolist(), two[image].tolist())


def _sums(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`sum ||a - b||^2`, `sum ||a||^2` and the sum of cosines, over rows [n, d]."""
    sums = np.zeros(3)
    block = max(1, _BLOCK // a.shape[1])
    for start in range(0, len(a), block):
        one = a[start : start + block].astype(np.float64)
        two = b[start : start + block].astype(np.float64)
        apart = one - two
        dot, ones, twos = (
            np.einsum("nd,nd->n", x, y) for x, y in ((one, two), (one, one), (two, two))
        )
        sizes = np.sqrt(ones) * np.sqrt(twos)
        cosines = np.where(sizes > 0, dot / np.where(sizes > 0, sizes, 1.0), ones == twos)
        sums += np.vdot(apart, apart), ones.sum(), cosines.sum()
    return sums
