"""Settings of `steer` and `steer-eval`: one frozen dataclass a verb, checked when it is made.

Imports neither torch nor NumPy, so that `--help` is quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from harvest.flags import Place, expand_home, expect, pictures_in_memory

Op = Literal["add", "set", "scale", "ablate"]
Units = Literal["typical", "raw"]
Steps = tuple[int, int]
"""First denoising step and the one after the last, from 0."""
Rectangle = tuple[int, int, int, int]
"""(y0, x0, y1, x1) in tokens, y1 and x1 not included."""

LAST = 2**31
"""End of a range of steps that has none, such as "2:"."""
ATTRIBUTES = ("background", "shape", "colour", "texture", "size", "position")
"""What can be read back from a picture of the embedded model."""


def parse_steps(text: str) -> Steps | None:
    """Read steps written as "all", "3", "0:5", ":5" or "2:"; None for all.

    Raises:
        ValueError: the text is anything else.
    """
    if text == "all":
        return None
    parts = [part.strip() for part in text.split(":")]
    digits = all(part.isdecimal() or (not part and len(parts) == 2) for part in parts)
    if digits and len(parts) <= 2:
        start = int(parts[0] or 0)
        stop = start + 1 if len(parts) == 1 else int(parts[1] or LAST)
        if start < stop:
            return start, stop
    raise ValueError(
        "--steps: expected all, one step such as 3, or a range start:stop such as 0:5, "
        f"got {text!r}"
    )


def check_steps_come(text: str, count: int) -> None:
    """Check that some of the steps in `text` are among the `count` denoising steps of a picture.

    Raises:
        ValueError: none of them is.
    """
    span = parse_steps(text)
    expect(
        span is None or span[0] < count,
        "steps",
        f"some of the steps 0 to {count - 1} of a picture",
        text,
        "give earlier steps, or a larger --num-steps",
    )


def parse_region(text: str) -> Rectangle | Literal["all", "object"]:
    """Read a region written as "all", "object" or "y0,x0,y1,x1" in tokens.

    Raises:
        ValueError: the text is anything else.
    """
    if text == "all" or text == "object":
        return text
    parts = [part.strip() for part in text.split(",")]
    if len(parts) == 4 and all(part.isdecimal() for part in parts):
        y0, x0, y1, x1 = (int(part) for part in parts)
        if y0 < y1 and x0 < x1:
            return y0, x0, y1, x1
    raise ValueError(
        "--region: expected all, object, or y0,x0,y1,x1 in tokens with y0 < y1 and x0 < x1, "
        f"got {text!r}"
    )


def parse_tag(text: str, flag: str) -> tuple[str, str]:
    """Read an attribute and its value, written as "colour=blue".

    Raises:
        ValueError: the text is anything else.
    """
    attribute, _, value = (part.strip() for part in text.partition("="))
    if attribute in ATTRIBUTES and value:
        return attribute, value
    raise ValueError(
        f"{flag}: expected attribute=value such as colour=blue, with an attribute out of "
        f"{', '.join(ATTRIBUTES)}, got {text!r}"
    )


@dataclass(frozen=True, kw_only=True)
class PictureConfig:
    """How pictures are made, and what is steered where: shared by both verbs."""

    dictionary: Path
    """Dictionary whose features are steered (a folder written by `jaxdict export`)."""
    verify: bool = True
    """Whether the dictionary has to have the hashes written with it; --no-verify reads it as it is."""
    model: Place | None = None
    """Model: shapes (embedded), a local folder, or a hub id; by default the dictionary's."""
    site: str | None = None
    """Site to steer at; by default the one in the dictionary's card."""
    stream: Literal["img", "txt"] | None = None
    """Stream to steer; by default the site's."""
    op: Op = "add"
    """What happens to the feature: add to it, set it, scale it, or ablate it (set it to 0)."""
    units: Units = "typical"
    """Unit of the value of add and set: the feature's mean where it is active, or raw."""
    ablate: tuple[int, ...] = ()
    """Further features set to 0 at the same places, such as that of the colour to be replaced."""
    steps: str = "all"
    """Denoising steps to steer, counted from 0: all, 3, or a range such as 0:5 (without the 5)."""
    region: str = "all"
    """Image tokens to steer: all, y0,x0,y1,x1 (ends not included), or object (embedded model)."""
    coverage: float = 0.25
    """For region object: share of a token's pixels from which on it belongs to the object."""
    num_steps: int = 0
    """Denoising steps of a picture. 0 means the model's own number (8 for shapes)."""
    height: int = 0
    """Height of a picture in pixels. 0 means the model's own."""
    width: int = 0
    """Width of a picture in pixels. 0 means the model's own."""
    guidance: float | None = None
    """Guidance scale. None means the model's own (0 for shapes and schnell, 3.5 for dev)."""
    max_sequence_length: int = 0
    """Length of the text in T5 tokens. 0 means the model's own (32 for shapes, 256 for schnell)."""
    quantize: Literal["none", "nf4", "int8"] = "none"
    """Quantize the transformer and T5 by bitsandbytes while loading (int8 needs a GPU)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Precision of the model; auto is bfloat16 on a GPU and float32 on a CPU."""
    device: str = "auto"
    """Torch device, such as cpu or cuda:0; auto is a GPU where there is one."""

    def __post_init__(self) -> None:
        """Check every field that needs no file."""
        expand_home(self)
        parse_steps(self.steps)
        parse_region(self.region)
        if self.num_steps > 0:
            check_steps_come(self.steps, self.num_steps)
        expect(0 < self.coverage <= 1, "coverage", "a share above 0 and at most 1", self.coverage)
        for name in ("num_steps", "height", "width"):
            value = getattr(self, name)
            expect(value >= 0, name, "0 or more", value)
        length = self.max_sequence_length
        expect(0 <= length <= 512, "max_sequence_length", "0 to 512 tokens", length)
        pictures_in_memory(self, steps="num_steps")
        expect(min(self.ablate, default=0) >= 0, "ablate", "features of 0 or more", self.ablate)


@dataclass(frozen=True, kw_only=True)
class SteerConfig(PictureConfig):
    """Steer one picture by a feature: before, after, their difference, and a sheet of all three."""

    EXAMPLE: ClassVar[str] = (
        "jaxdict steer --dictionary runs/sae/dictionary --feature 17 --op add --value 4 "
        '--steps 0:5 --region 2,2,6,6 --prompt "a large red solid circle in the centre, '
        'white background" --seed 3 --out runs/steered'
    )

    feature: int
    """Feature to steer, from 0 to m - 1."""
    prompt: str
    """Prompt of the picture."""
    out: Path
    """Folder for the pictures, the sheet and the config; files of an earlier run are replaced."""
    value: float = 1.0
    """How much to add, what to set, or the factor to scale by; may be negative."""
    seed: int = 0
    """Seed of the picture's noise."""

    def __post_init__(self) -> None:
        """Check every field that needs no file."""
        super().__post_init__()
        expect(self.feature >= 0, "feature", "0 or more", self.feature)
        expect(math.isfinite(self.value), "value", "a finite number", self.value)
        expect(bool(self.prompt.strip()), "prompt", "some text", self.prompt)
        whole = not any("\ud800" <= one <= "\udfff" for one in self.prompt)
        expect(whole, "prompt", "text in UTF-8", self.prompt)


@dataclass(frozen=True, kw_only=True)
class SteerEvalConfig(PictureConfig):
    """Measure by pixels how often steering works, beside a random direction of the same norm.

    Only for models whose pictures can be read back (the embedded one). With several values or
    features, the best pair is chosen on pictures of other prompts than those the result is reported
    on.
    """

    EXAMPLE: ClassVar[str] = (
        "jaxdict steer-eval --dictionary runs/sae/dictionary --feature 17 --value 2 4 8 "
        "--prompts held_out.jsonl --wanted colour=blue --source colour=red --out runs/success"
    )

    feature: tuple[int, ...]
    """Feature to steer; of several the best is chosen on the selection pictures."""
    prompts: Place
    """Held-out prompts, from any source that harvest reads; an object of a .jsonl or .json file may have a seed of its own."""
    wanted: str
    """What the object should become, such as colour=blue; pictures that have it are left out."""
    out: Path
    """Folder for summary.json, verdicts.jsonl, the sheet and the config."""
    value: tuple[float, ...] = (1.0,)
    """Value to steer by; of several the best is chosen on the selection pictures."""
    region: str = "object"
    """Image tokens to steer: object (read from the unsteered picture), all, or y0,x0,y1,x1."""
    source: str | None = None
    """Only pictures whose unsteered object has this count, such as colour=red; by default all."""
    images: int = 32
    """Pictures that the result is reported on."""
    selection: int = 16
    """Pictures that candidates are compared on, when there are several."""
    batch: int = 16
    """Pictures made at once."""
    seed: int = 0
    """Seed of the random directions, and, plus its number, of a record that has none."""
    shown: int = 16
    """Pictures on the sheet."""

    def __post_init__(self) -> None:
        """Check every field that needs no file."""
        super().__post_init__()
        parse_tag(self.wanted, "--wanted")
        if self.source is not None:
            parse_tag(self.source, "--source")
        expect(len(self.feature) >= 1, "feature", "at least one feature", self.feature)
        expect(min(self.feature, default=0) >= 0, "feature", "0 or more", self.feature)
        expect(len(self.value) >= 1, "value", "at least one value", self.value)
        expect(all(map(math.isfinite, self.value)), "value", "finite numbers", self.value)
        for name in ("images", "selection", "batch", "shown"):
            expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
