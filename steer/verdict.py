"""Did steering change what was wanted, and nothing else? Pictures before and after, by attribute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from scipy.special import ndtr
from scipy.stats import binomtest

from steer.config import ATTRIBUTES

_ALIKE = ("shape", "colour", "texture")
"""What makes an object that was not steered the same as before."""
_CONFIDENCE = float(2 * ndtr(1.96) - 1)
"""95%, as the quantile rounded to 1.96 gives it."""


class DetectedObject(Protocol):
    """One object as read from the pixels (`harvest.shapes.check.Found`)."""

    shape: str
    colour: str
    texture: str
    size: str
    position: str
    mask: np.ndarray


class SceneReading(Protocol):
    """What a model's `judge` reads from a picture: objects, largest first, on a background."""

    background: str
    objects: list[Any]


@dataclass(frozen=True)
class Verdict:
    """One steered picture compared with the unsteered one.

    Attributes:
        after: attribute -> value read from the steered picture, "" where the object is gone.
        changed: whether the wanted attribute has the wanted value.
        kept: each other attribute, and "others" (the objects that were not steered) -> whether it
            is as before.
    """

    after: dict[str, str]
    changed: bool
    kept: dict[str, bool] = field(default_factory=dict)

    @property
    def success(self) -> bool:
        """Whether it changed as wanted, with the background and the other objects as before."""
        return self.changed and self.kept.get("background", True) and self.kept["others"]

    @property
    def clean(self) -> bool:
        """Whether it changed as wanted, with everything else as before."""
        return self.changed and all(self.kept.values())


def attributes(reading: SceneReading, target: DetectedObject | None) -> dict[str, str]:
    """Attribute -> value of a picture and one of its objects; "" for a missing object."""
    values = {name: getattr(target, name, "") for name in ATTRIBUTES if name != "background"}
    return {"background": reading.background, **values}


def choose_object(
    reading: SceneReading, wanted: tuple[str, str], source: tuple[str, str] | None = None
) -> DetectedObject | None:
    """The object to steer: the largest that has the source value and not yet the wanted one.

    Args:
        reading: what was read from the unsteered picture.
        wanted: (attribute, value) that it should get.
        source: (attribute, value) that it must have, or None.

    Returns:
        The object, or None if the picture has none to steer.
    """
    for candidate in reading.objects:
        values = attributes(reading, candidate)
        if values[wanted[0]] != wanted[1] and (source is None or values[source[0]] == source[1]):
            return candidate
    return None


def compare(
    before: SceneReading, target: DetectedObject, after: SceneReading, wanted: tuple[str, str]
) -> Verdict:
    """What became of the steered object and of everything else.

    The object is found again as the one that overlaps its old place most (intersection over union).

    Args:
        before: what was read from the unsteered picture.
        target: the object of `before` that was steered.
        after: what was read from the steered picture.
        wanted: (attribute, value) that the object should have.
    """
    old = attributes(before, target)
    match = _overlapping(target, after.objects)
    new = attributes(after, match)
    kept = {name: new[name] == old[name] for name in ATTRIBUTES if name != wanted[0]}
    others = [other for other in before.objects if other is not target]
    rest = [other for other in after.objects if other is not match]
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
        The number of images; the shares changed, success and clean, and as `kept` that of each
        attribute; and 95% Wilson score intervals of changed and success.
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
        "changed_interval": wilson_interval(changed, n),
        "success": share(success),
        "success_interval": wilson_interval(success, n),
        "clean": share(sum(verdict.clean for verdict in verdicts)),
        "kept": {
            name: share(sum(verdict.kept[name] for verdict in verdicts))
            for name in verdicts[0].kept
        },
    }


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share of n > 0, to four digits.

    Source: Wilson, Probable Inference (JASA 1927).
    """
    interval = binomtest(hits, n).proportion_ci(_CONFIDENCE, method="wilson")
    return round(float(interval.low), 4), round(float(interval.high), 4)


def _overlapping(
    target: DetectedObject, objects: Sequence[DetectedObject]
) -> DetectedObject | None:
    """The object that overlaps the target most; None if none does."""

    def overlap(other: DetectedObject) -> float:
        return (other.mask & target.mask).sum() / max(1, (other.mask | target.mask).sum())

    best = max(objects, key=overlap, default=None)
    return best if best is not None and overlap(best) > 0 else None
