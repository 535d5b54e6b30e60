"""The verb `steer`: one picture unsteered and steered, their difference, a sheet of all three."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from harvest.atomic import write_json
from harvest.models import LoadedModel, load_model
from steer.coder import Coder
from steer.config import PictureConfig, Rectangle, SteerConfig, parse_region, parse_steps
from steer.edits import Edit
from steer.hooks import group_edits, steering
from steer.judge import token_mask
from steer.sheet import Cell, contact_sheet, difference, save_picture


def steer(config: SteerConfig) -> dict[str, Any]:
    """Make a picture twice, unsteered and steered, from the same noise.

    Args:
        config: see `SteerConfig`.

    Returns:
        A summary: the files written, the edits in words, the largest change of a pixel and the
        share that changed.

    Raises:
        FileNotFoundError: no dictionary there.
        ValueError: a feature, site, region or model that does not exist or does not fit.
    """
    coder = Coder.from_pretrained(config.dictionary)
    check_edits(config, coder, config.feature, config.value)
    model = open_model(config, coder)
    region = parse_region(config.region)
    coder = coder.to(model.pipe.transformer.device)
    tokens = model.grid(picture_size(model, config))
    if region == "object" and model.judge is None:
        raise ValueError(
            f"--region: expected all or y0,x0,y1,x1 for the model {model.name}, got object, "
            "which is read from the embedded model's pictures only"
        )
    before = paint(model, config, [config.prompt], [config.seed])[0]
    where: Rectangle | np.ndarray | None = region if isinstance(region, tuple) else None
    if region == "object" and model.judge is not None:
        things = model.judge(before).objects
        if not things:
            raise ValueError(
                "--region: expected an object in the unsteered picture, found none; "
                "take another seed"
            )
        where = token_mask(things[0].mask, tokens, config.coverage)
    edits = make_edits(config, config.feature, config.value, where)
    with steering(model.pipe, coder, edits, site=config.site):
        after = paint(model, config, [config.prompt], [config.seed])[0]

    change, largest = difference(before, after)
    config.out.mkdir(parents=True, exist_ok=True)
    paths = {
        name: save_picture(picture, config.out / f"{name}.png")
        for name, picture in (("before", before), ("after", after), ("difference", change))
    }
    words = describe(config, config.feature, config.value)
    framed = outline(change, where, tokens)
    cells = [
        Cell(before, "before"),
        Cell(after, "after"),
        Cell(framed, f"difference (darkest: {largest} of 255)"),
    ]
    side = 384 if max(before.shape) <= 384 else 512
    sheet = contact_sheet([("", cells)], title=config.prompt, subtitle=words, side=side, text=18)
    paths["sheet"] = save_picture(sheet, config.out / "sheet.png")
    summary = {
        "edit": words,
        "site": config.site or coder.dictionary.card.get("site"),
        "largest_change": largest,
        "changed_pixels": round(float((before != after).any(-1).mean()), 4),
        "files": {name: str(path) for name, path in paths.items()},
    }
    write_json(config.out / "config.json", dataclasses.asdict(config))
    print(f"steered: {words}")
    for name, path in paths.items():
        print(f"  {name:<10} {path}")
    return summary


def open_model(config: PictureConfig, coder: Coder) -> LoadedModel:
    """Load the model that is asked for, or else the one in the dictionary's card.

    Raises:
        ValueError: neither names one.
    """
    name: Any = config.model or coder.dictionary.card.get("model")
    if isinstance(name, dict):
        name = name.get("name") or name.get("id")
    if not isinstance(name, str) or not name:
        raise ValueError(
            "--model: expected one, as the dictionary's card names none; "
            "give shapes, a folder or a hub id"
        )
    return load_model(name, quantize=config.quantize, dtype=config.dtype, device=config.device)


def paint(
    model: LoadedModel, config: PictureConfig, prompts: Sequence[str], seeds: Sequence[int]
) -> np.ndarray:
    """Make pictures as a config says, uint8 [n, H, W, 3]; noise depends on the seeds only."""
    return model.generate(
        list(prompts),
        list(seeds),
        steps=config.num_steps or None,
        size=picture_size(model, config),
        guidance=config.guidance,
        max_sequence_length=config.max_sequence_length or None,
    )


def make_edits(
    config: PictureConfig,
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


def check_edits(config: PictureConfig, coder: Coder, feature: int, value: float) -> None:
    """Raise ValueError for edits that cannot be carried out, before a model is loaded."""
    region = None if config.region == "all" else (0, 0, 1, 1)
    group_edits(coder, make_edits(config, feature, value, region), config.site)


def describe(config: PictureConfig, feature: int, value: float) -> str:
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


def outline(
    picture: np.ndarray, region: Rectangle | np.ndarray | None, grid: tuple[int, int]
) -> np.ndarray:
    """A picture, enlarged if small, with a thin line around the steered tokens unless all are."""
    if region is None:
        return picture
    mask = np.zeros(grid, bool)
    if isinstance(region, tuple):
        y0, x0, y1, x1 = region
        mask[y0:y1, x0:x1] = True
    else:
        mask = region
    factor = max(1, 384 // max(picture.shape))
    enlarged = picture.repeat(factor, 0).repeat(factor, 1)
    image = Image.fromarray(enlarged)
    pen = ImageDraw.Draw(image)
    high, wide = enlarged.shape[0] / grid[0], enlarged.shape[1] / grid[1]
    padded = np.pad(mask, 1)
    for y, x in np.argwhere(padded[1:] != padded[:-1]):
        pen.line(((x - 1) * wide, y * high, x * wide, y * high), fill=(60, 90, 160), width=2)
    for y, x in np.argwhere(padded[:, 1:] != padded[:, :-1]):
        pen.line((x * wide, (y - 1) * high, x * wide, y * high), fill=(60, 90, 160), width=2)
    return np.asarray(image)
