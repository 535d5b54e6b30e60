"""What to change in the codes while a picture is made: one `Edit` a feature, checked when made.

An edit is data and needs no torch; `steer.hooks` carries it out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from steer.config import Op, Rectangle, Steps, Units

OPS: tuple[str, ...] = get_args(Op)
UNITS: tuple[str, ...] = get_args(Units)


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of one feature in the codes; the part of x that the dictionary misses is kept.

        x' = x + decode(edited codes) - decode(codes) = x + (new - old) raw_atom(feature)

    where `op` gives `new`: add `old + value`, set `value`, scale `old * value`, ablate 0.

    Args:
        feature: which feature, from 0 to m - 1.
        op: "add" is plain activation addition and needs no encoding; "set", "scale" and "ablate"
            read the old value.
        value: for add and set in `units`, for scale a factor; ablate ignores it. May be negative.
        steps: (start, stop) denoising steps, counted from 0, stop not included; None for all.
        region: which image tokens: (y0, x0, y1, x1) in tokens, y1 and x1 not included; or a bool
            mask [h, w] or [batch, h, w]; None for all.
        stream: "img" or "txt"; None for the stream of the dictionary's site. Text tokens have no
            region.
        units: unit of `value`: "typical" is the feature's mean activation where it is active, "raw"
            is 1.

    Raises:
        ValueError: a field has a value that makes no sense; the message says what was expected.
        TypeError: a field has the wrong type.

    Source: arXiv 2505.24360, section on steering (a rectangle, the first 5 of 7 steps). Deviation:
    the paper only adds.
    """

    feature: int
    op: Op = "add"
    value: float = 1.0
    steps: Steps | None = None
    region: Rectangle | np.ndarray | None = None
    stream: Literal["img", "txt"] | None = None
    units: Units = "typical"

    def __post_init__(self) -> None:
        """Check every field; a region given as nested lists becomes a bool array."""
        _set = object.__setattr__
        _set(self, "feature", _whole(self.feature, "feature"))
        if self.feature < 0:
            raise ValueError(f"feature: expected 0 or more, got {self.feature}")
        if self.op not in OPS:
            raise ValueError(f"op: expected one of {', '.join(OPS)}, got {self.op!r}")
        if self.units not in UNITS:
            raise ValueError(f"units: expected one of {', '.join(UNITS)}, got {self.units!r}")
        if self.stream not in ("img", "txt", None):
            raise ValueError(f"stream: expected img, txt or None, got {self.stream!r}")
        if isinstance(self.value, bool) or not math.isfinite(self.value):
            raise ValueError(f"value: expected a finite number, got {self.value!r}")
        if self.steps is not None:
            _set(self, "steps", check_steps(self.steps))
        if self.region is not None:
            _set(self, "region", _check_region(self.region))
        if self.stream == "txt" and self.region is not None:
            raise ValueError(
                "region: expected none for the txt stream, whose tokens have no place in the "
                "picture; leave it out, or steer the img stream"
            )

    @property
    def reads(self) -> bool:
        """Whether the old value is needed, so that the activation has to be encoded."""
        return self.op != "add"

    def acts_at(self, step: int | None) -> bool:
        """Whether the edit acts at a denoising step."""
        return self.steps is None or (step is not None and self.steps[0] <= step < self.steps[1])

    def unit(self, typical: float) -> float:
        """The activation that a value of 1 stands for.

        Args:
            typical: the feature's mean activation where it is active.

        Raises:
            ValueError: units are "typical" and the feature was never active.
        """
        if self.op not in ("add", "set") or self.units == "raw":
            return 1.0
        if typical == 0:
            raise ValueError(
                f"feature {self.feature} was never active when the dictionary was made, so it has "
                "no typical activation; give the value with units raw, or take another feature"
            )
        return typical

    def new(self, old: Any, unit: float) -> Any:
        """The feature's value after the edit.

        Args:
            old: its activation before, a float or a tensor.
            unit: what `unit()` returned.
        """
        if self.op == "add":
            return old + self.value * unit
        if self.op == "set":
            return old * 0 + self.value * unit
        return old * (self.value if self.op == "scale" else 0.0)


def check_steps(steps: Any) -> Steps:
    """Check that steps are two whole numbers with 0 <= start < stop, and return them.

    Raises:
        ValueError: the numbers are others.
        TypeError: it is no pair of whole numbers.
    """
    if not isinstance(steps, tuple | list) or len(steps) != 2:
        raise TypeError(f"steps: expected (start, stop) or None, got {steps!r}")
    start, stop = (_whole(step, "steps") for step in steps)
    if not 0 <= start < stop:
        raise ValueError(f"steps: expected 0 <= start < stop, got ({start}, {stop})")
    return start, stop


def _check_region(region: Any) -> Rectangle | np.ndarray:
    """Check a rectangle of four whole numbers, or a bool mask [h, w] or [batch, h, w]."""
    if isinstance(region, tuple | list) and len(region) == 4 and not np.ndim(region[0]):
        y0, x0, y1, x1 = (_whole(edge, "region") for edge in region)
        if not (0 <= y0 < y1 and 0 <= x0 < x1):
            raise ValueError(
                "region: expected (y0, x0, y1, x1) in tokens with 0 <= y0 < y1 and 0 <= x0 < x1, "
                f"got ({y0}, {x0}, {y1}, {x1})"
            )
        return y0, x0, y1, x1
    mask = np.asarray(region)
    if mask.dtype != np.bool_ or mask.ndim not in (2, 3):
        raise ValueError(
            "region: expected (y0, x0, y1, x1) in tokens or a bool mask [h, w] or [batch, h, w], "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return mask


def _whole(value: Any, name: str) -> int:
    if isinstance(value, bool | float) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected a whole number, got {value!r}")
    return int(value)
