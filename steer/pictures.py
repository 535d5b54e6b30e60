"""What `steer` and `steer-eval` share: a config's model and edits, and its pictures, made and drawn."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from harvest.atomic import whole_file
from harvest.models import LoadedModel, NotFiniteError, load_model
from steer.coder import Coder
from steer.config import LAST, PictureConfig, Rectangle, check_steps_come, parse_steps
from steer.edits import Edit
from steer.hooks import group_edits

_LINE = (60, 90, 160)
_ENLARGED = 384


def open_model(config: PictureConfig, coder: Coder) -> LoadedModel:
    """Load the model that the config names, or else the one in the dictionary's card.

    Raises:
        ValueError: neither names one, or its pictures have none of the steps that are steered.
    """
    name: Any = config.model or coder.dictionary.card.get("model")
    if isinstance(name, dict):
        name = name.get("name") or name.get("id")
    if not isinstance(name, str) or not name:
        raise ValueError(
            "--model: expected one, as the dictionary's card names none; "
            "give shapes, a folder or a hub id"
        )
    model = load_model(name, quantize=config.quantize, dtype=config.dtype, device=config.device)
    count = config.num_steps or model.steps
    check_steps_come(config.steps, count)
    span = parse_steps(config.steps)
    if span is not None and count < span[1] < LAST:
        text = f"--steps {config.steps} goes beyond the {count} steps of a picture"
        print(f"note: {text}; steps {span[0]} to {count - 1} are steered", file=sys.stderr)
    return model


def make_edits(
    config: PictureConfig,
    *,
    feature: int,
    value: float,
    region: Rectangle | np.ndarray | None,
) -> list[Edit]:
    """The edits of a config: first the ablations, then the feature that is steered."""
    rest: dict[str, Any] = {
        "steps": parse_steps(config.steps),
        "region": region,
        "stream": config.stream,
        "units": config.units,
    }
    edits = [Edit(other, "ablate", **rest) for other in config.ablate]
    edits.append(Edit(feature, config.op, value, **rest))
    return edits


def check_edits(config: PictureConfig, coder: Coder, *, feature: int, value: float) -> None:
    """Check, before a model is loaded, that the edits can be carried out.

    Raises:
        ValueError: see `group_edits`.
    """
    region = None if config.region == "all" else (0, 0, 1, 1)
    edits = make_edits(config, feature=feature, value=value, region=region)
    group_edits(coder, edits, site=config.site)


def describe_edits(config: PictureConfig, *, feature: int, value: float) -> str:
    """The edits in words, for instance "feature 17 + 4 typical, 40 ablated, steps 0:5"."""
    unit = " typical" if config.units == "typical" else ""
    words = {
        "add": f"feature {feature} {'+' if value >= 0 else '-'} {abs(value):g}{unit}",
        "set": f"feature {feature} set to {value:g}{unit}",
        "scale": f"feature {feature} times {value:g}",
        "ablate": f"feature {feature} ablated",
    }[config.op]
    if config.ablate:
        many = len(config.ablate) > 4
        which = f"{len(config.ablate)} others" if many else ", ".join(map(str, config.ablate))
        words += f", {which} ablated"
    steps = "all steps" if config.steps == "all" else f"steps {config.steps}"
    places = {"all": "everywhere", "object": "on the object"}
    where = places.get(config.region, f"tokens {config.region}")
    return f"{words}, {where}, {steps}"


def picture_size(model: LoadedModel, config: PictureConfig) -> tuple[int, int]:
    """Height and width of a picture in pixels, the model's own where the config says 0."""
    return config.height or model.size[0], config.width or model.size[1]


def generate_pictures(
    model: LoadedModel,
    config: PictureConfig,
    *,
    prompts: Sequence[str],
    seeds: Sequence[int],
    edit: str = "",
) -> np.ndarray:
    """Make pictures as a config says, uint8 [n, H, W, 3]; noise depends on the seeds only.

    Raises:
        ValueError: a picture is not finite; the message names the `edit`, if there is one.
    """
    try:
        return model.generate(
            list(prompts),
            list(seeds),
            steps=config.num_steps or None,
            size=picture_size(model, config),
            guidance=config.guidance,
            max_sequence_length=config.max_sequence_length or None,
        )
    except NotFiniteError as error:
        if not edit:
            raise
        raise ValueError(f"{error}, or steer by less than {edit}") from error


def token_mask(mask: np.ndarray, grid: tuple[int, int], coverage: float) -> np.ndarray:
    """Which tokens an object covers.

    Args:
        mask: bool [H, W] in pixels, H and W multiples of the grid.
        grid: (h, w) image tokens.
        coverage: share of a token's pixels from which on it belongs to the object.

    Returns:
        Bool [h, w]. An object that covers no token by that much gets its fullest tokens, so that
        only an empty mask gives an empty one.

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


def difference(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, int]:
    """Where two pictures differ: white where equal, through orange to dark where they differ most.

    Args:
        before: uint8 [H, W, 3].
        after: the same shape.

    Returns:
        Uint8 [H, W, 3], and the largest change of a channel (0 to 255), which the darkest tone
        stands for.
    """
    change = np.abs(before.astype(np.int16) - after).max(-1)
    largest = int(change.max())
    tones = np.array([[255, 255, 255], [253, 190, 110], [220, 70, 40], [70, 10, 50]], np.float32)
    place = change / max(1, largest) * (len(tones) - 1)
    picture = np.stack(
        [np.interp(place, range(len(tones)), tones[:, channel]) for channel in range(3)], axis=-1
    )
    return np.rint(picture).astype(np.uint8), largest


def outline_region(
    picture: np.ndarray, region: Rectangle | np.ndarray | None, grid: tuple[int, int]
) -> np.ndarray:
    """A picture, enlarged if small, with a thin line around the steered tokens.

    Args:
        picture: uint8 [H, W, 3].
        region: as in an `Edit`; None, all tokens, gives the picture back unchanged.
        grid: (h, w) image tokens.
    """
    if region is None:
        return picture
    mask = np.zeros(grid, bool)
    if isinstance(region, tuple):
        y0, x0, y1, x1 = region
        mask[y0:y1, x0:x1] = True
    else:
        mask = region
    factor = max(1, _ENLARGED // max(picture.shape))
    enlarged = picture.repeat(factor, 0).repeat(factor, 1)
    image = Image.fromarray(enlarged)
    pen = ImageDraw.Draw(image)
    high, wide = enlarged.shape[0] / grid[0], enlarged.shape[1] / grid[1]
    padded = np.pad(mask, 1)
    for y, x in np.argwhere(padded[1:] != padded[:-1]):
        pen.line(((x - 1) * wide, y * high, x * wide, y * high), fill=_LINE, width=2)
    for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        pen.line((x * wide, (y - 1) * high, x * wide, y * high), fill=_LINE, width=2)
    return np.asarray(image)


def save_picture(picture: np.ndarray | Image.Image, path: Path) -> Path:
    """Write a PNG, whole or not at all; the path."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    with whole_file(path) as draft:
        image.save(draft, format="PNG")
    return path
