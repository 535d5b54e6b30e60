"""Did steering do what was wanted, and nothing else? Two readings compared by attribute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from steer.config import ATTRIBUTES

_ALIKE = ("shape", "colour", "texture")
"""What makes a bystander the same object as before."""


class Thing(Protocol):
    """One object as read from the pixels (`harvest.shapes.check.Found`)."""

    shape: str
    colour: str
    texture: str
    size: str
    position: str
    mask: np.ndarray


class Reading(Protocol):
    """What a model's `judge` reads from a picture."""

    background: str
    objects: list[Any]


@dataclass(frozen=True)
class Verdict:
    """One steered picture against its unsteered one.

    Attributes:
        after: attribute -> value read from the steered picture, "" where the object is gone.
        changed: the wanted attribute has the wanted value.
        kept: each other attribute, and "others" (the objects that were not steered) -> stayed as it
            was.
    """

    after: dict[str, str]
    changed: bool
    kept: dict[str, bool] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        """Changed as wanted, with the background and the other objects as they were."""
        return self.changed and self.kept.get("background", True) and self.kept["others"]

    @property
    def clean(self) -> bool:
        """Changed as wanted, with everything else as it was."""
        return self.changed and all(self.kept.values())


def attributes(reading: Reading, thing: Thing | None) -> dict[str, str]:
    """Attribute -> value of a picture and one of its objects; "" for a missing object."""
    values = {name: getattr(thing, name, "") for name in ATTRIBUTES if name != "background"}
    return {"background": reading.background, **values}


def choose_object(
    reading: Reading, wanted: tuple[str, str], source: tuple[str, str] | None = None
) -> Thing | None:
    """The object to steer: the largest that has the source value and not yet the wanted one.

    Args:
        reading: of the unsteered picture, objects largest first.
        wanted: (attribute, value).
        source: (attribute, value) it must have, or None.

    Returns:
        The object, or None if the picture has none to steer.
    """
    for thing in reading.objects:
        values = attributes(reading, thing)
        if values[wanted[0]] != wanted[1] and (source is None or values[source[0]] == source[1]):
            return thing
    return None


def compare(before: Reading, target: Thing, after: Reading, wanted: tuple[str, str]) -> Verdict:
    """What became of the steered object and of all the rest.

    The object is found again as the one that overlaps its old place most (intersection over union).

    Args:
        before: reading of the unsteered picture.
        target: the object of `before` that was steered.
        after: reading of the steered picture.
        wanted: (attribute, value).
    """
    old = attributes(before, target)
    match = _overlapping(target, after.objects)
    new = attributes(after, match)
    kept = {name: new[name] == old[name] for name in ATTRIBUTES if name != wanted[0]}
    others = [thing for thing in before.objects if thing is not target]
    rest = [thing for thing in after.objects if thing is not match]
    kept["others"] = len(others) == len(rest) and all(
        any(all(getattr(a, name) == getattr(b, name) for name in _ALIKE) for b in rest)
        for a in others
    )
    return Verdict(new, new[wanted[0]] == wanted[1], kept)


def summarize(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Shares over pictures.

    Args:
        verdicts: at least one.

    Returns:
        images, changed, success, clean, the share kept of each attribute as `kept`, and the 95%
        Wilson intervals of changed and success.
    """
    n = len(verdicts)
    assert n > 0

    def share(hits: int) -> float:
        return round(hits / n, 4)

    changed = sum(verdict.changed for verdict in verdicts)
    success = sum(verdict.success for verdict in verdicts)
    return {
        "images": n,
        "changed": share(changed),
        "changed_interval": wilson(changed, n),
        "success": share(success),
        "success_interval": wilson(success, n),
        "clean": share(sum(verdict.clean for verdict in verdicts)),
        "kept": {
            name: share(sum(verdict.kept[name] for verdict in verdicts))
            for name in verdicts[0].kept
        },
    }


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share, 95% by default.

    Source: Wilson, Probable Inference (JASA 1927).
    """
    p = hits / n
    centre = p + z * z / (2 * n)
    spread = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (round((centre + sign * spread) / (1 + z * z / n), 4) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def token_mask(mask: np.ndarray, grid: tuple[int, int], coverage: float) -> np.ndarray:
    """Which tokens an object covers.

    Args:
        mask: bool [H, W] in pixels, H and W multiples of the grid.
        grid: (h, w) image tokens.
        coverage: the share of a token's pixels from which on it belongs to the object.

    Returns:
        bool [h, w]; never empty for an object that is not: at least its fullest tokens belong to
        it.

    Raises:
        ValueError: the mask does not divide into the grid.
    """
    (height, width), (h, w) = mask.shape, grid
    if height % h or width % w:
        raise ValueError(
            f"expected a mask that divides into {h} by {w} tokens, got {height} by {width} pixels"
        )
    share = mask.reshape(h, height // h, w, width // w).mean((1, 3))
    return share >= min(coverage, share.max()) if mask.any() else np.zeros(grid, bool)


def _overlapping(target: Thing, things: Sequence[Thing]) -> Thing | None:
    def overlap(thing: Thing) -> float:
        return (thing.mask & target.mask).sum() / max(1, (thing.mask | target.mask).sum())

    best = max(things, key=overlap, default=None)
    return best if best is not None and overlap(best) > 0 else None
