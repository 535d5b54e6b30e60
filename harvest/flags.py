"""Checks of settings: each names the flag, what was expected, what came and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from harvest import units

_PIXEL = 12
"""Bytes of a pixel in float32."""
_STEP = 200
"""Bytes that the noise level of a step takes at least, in the lists of it."""
_IMAGE = 200
"""Bytes that an image takes at least before it is made."""
_PLACE = "place"
Place = Annotated[str, _PLACE]
"""Type of a setting that may be a path, but also a URL or another name."""


def expand_home(config: Any) -> None:
    """Put the home folder in place of a leading `~` in every setting that is a path or a `Place`.

    Args:
        config: A dataclass, frozen or not, whose groups of settings are dataclasses too.
    """
    hints = get_type_hints(type(config), include_extras=True)
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        if is_dataclass(value):
            expand_home(value)
        elif _is_place(hints[name]):
            object.__setattr__(config, name, _expanded(value))


def _is_place(hint: Any) -> bool:
    marked = _PLACE in getattr(hint, "__metadata__", ())
    return marked or hint is Path or any(map(_is_place, get_args(hint)))


def _expanded(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_expanded, value))
    return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value


def expect(condition: bool, name: str, expected: str, got: object, do: str = "") -> None:
    """Raise a ValueError that names the flag, unless `condition` holds.

    Args:
        condition: Whether the setting is good.
        name: The config's field.
        expected: What is accepted.
        got: What came.
        do: What to do about it; "change" the flag by default.
    """
    if not condition:
        flag = "--" + name.replace("_", "-")
        raise ValueError(f"{flag}: expected {expected}, got {got!r}; {do or f'change {flag}'}")


def one_of(config: Any, name: str, options: Collection[str]) -> None:
    """Check that a field holds one of a few words."""
    value = getattr(config, name)
    expect(value in options, name, f"one of {tuple(options)}", value, "pick one of them")


def at_least(config: Any, least: float, names: Collection[str], expected: str) -> None:
    """Check that each of these fields holds `least` or more."""
    for name in names:
        value = getattr(config, name)
        expect(value >= least, name, expected, value, "raise it")


def at_most(config: Any, most: float, names: Collection[str], expected: str) -> None:
    """Check that each of these fields holds `most` or less."""
    for name in names:
        value = getattr(config, name)
        expect(value <= most, name, expected, value, "lower it")


def in_memory(flags: Collection[str], got: object, needed: float, what: str) -> None:
    """Check, before anything is made, that what settings ask for fits into this machine's memory.

    Args:
        flags: The fields that it grows with, the one to lower first.
        got: What came for the first of them.
        needed: Bytes that it takes at least.
        what: What takes them, for instance "the weights and their moments".

    Raises:
        ValueError: It takes more than all memory of the machine.
    """
    room = machine_memory()
    names = ["--" + name.replace("_", "-") for name in flags]
    expect(
        needed <= room,
        next(iter(flags)),
        f"what fits into this machine's {units.size(room)} of memory ({what} would take {units.size(needed)})",
        got,
        f"lower {' or '.join(names)}",
    )


def pictures_in_memory(config: Any, *, steps: str) -> None:
    """Check that pictures of the size asked for, a batch and their steps fit into memory, as far as settings tell.

    Args:
        config: Has `height` and `width`, 0 for the model's own, and perhaps `images`, `selection` and `batch`.
        steps: The field that holds the number of denoising steps.
    """
    pixels = max(config.height, 1) * max(config.width, 1)
    sides = sorted(("height", "width"), key=lambda name: -getattr(config, name))
    in_memory(sides, getattr(config, sides[0]), _PIXEL * pixels, "one picture")
    batch = getattr(config, "batch", 1)
    in_memory(("batch", *sides), batch, _PIXEL * pixels * batch, "a batch of pictures")
    in_memory([steps], getattr(config, steps), _STEP * getattr(config, steps), "their noise levels")
    for name in ("images", "selection"):
        images = getattr(config, name, 1)
        in_memory([name], images, _IMAGE * images, "their prompts and seeds")


def machine_memory() -> int:
    """Bytes of memory of this machine, or 2**62 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**62


def captured_steps(config: Any) -> None:
    """Check that the field `steps` could be indices into the captured steps of a store."""
    steps = config.steps
    expect(
        all(step >= 0 for step in steps) and len(set(steps)) == len(steps),
        "steps",
        "different indices of at least 0",
        steps,
        "see `jaxdict inspect STORE` for the captured steps",
    )


def expect_captured(chosen: Sequence[int], numbers: Sequence[int]) -> None:
    """Check that a store has the captured steps chosen by --steps.

    Args:
        chosen: Captured indices; empty means all.
        numbers: The denoising step that each captured one is.
    """
    wrong = [index for index in chosen if index >= len(numbers)]
    steps = ", ".join(map(str, numbers))
    below = f"captured indices below {len(numbers)} (of the denoising steps {steps})"
    expect(not wrong, "steps", below, wrong, "see `jaxdict inspect STORE`")


def print_captured(chosen: Sequence[int], numbers: Sequence[int]) -> None:
    """Print which denoising steps those chosen by --steps are, as `expect_captured` takes them."""
    if chosen:
        steps = ", ".join(str(numbers[index]) for index in chosen)
        print(
            f"--steps: captured {', '.join(map(str, chosen))}, which are the denoising steps {steps}"
        )


def above_median(config: Any) -> None:
    """Check the field `max_norm`, a multiple of the median norm."""
    times = config.max_norm
    expect(times == 0 or times > 1, "max_norm", "0 or a number above 1", times, "10 is usual")
