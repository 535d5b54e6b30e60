"""The verb `steer`: one picture unsteered and steered, their difference, a sheet of all three."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from harvest.atomic import write_json
from harvest.models import tell_cut_prompts
from steer.coder import Coder
from steer.config import Rectangle, SteerConfig, parse_region
from steer.hooks import steering
from steer.pictures import (
    check_edits,
    describe_edits,
    difference,
    generate_pictures,
    make_edits,
    open_model,
    outline_region,
    picture_size,
    save_picture,
    token_mask,
)
from steer.sheet import Cell, contact_sheet


def steer(config: SteerConfig) -> dict[str, Any]:
    """Make a picture twice, unsteered and steered, from the same noise.

    Args:
        config: see `SteerConfig`.

    Returns:
        A summary: the files written, the edits in words, the largest change of a pixel and the
        share that changed.

    Raises:
        FileNotFoundError: the dictionary's folder does not exist.
        ValueError: a feature, site, region or model does not exist or does not fit, no step that is
            steered comes, or a picture is not finite.
    """
    coder = Coder.from_pretrained(config.dictionary, verify=config.verify)
    check_edits(config, coder, feature=config.feature, value=config.value)
    model = open_model(config, coder)
    region = parse_region(config.region)
    coder = coder.to(model.pipe.transformer.device)
    grid = model.grid(picture_size(model, config))
    if region == "object" and model.judge is None:
        raise ValueError(
            f"--region: expected all or y0,x0,y1,x1 for the model {model.name}, got object, "
            "which is read from the embedded model's pictures only"
        )
    prompts, seeds = [config.prompt], [config.seed]
    tell_cut_prompts(model, prompts, config.max_sequence_length)
    before = generate_pictures(model, config, prompts=prompts, seeds=seeds)[0]
    where: Rectangle | np.ndarray | None = region if isinstance(region, tuple) else None
    if region == "object" and model.judge is not None:
        objects = model.judge(before).objects
        if not objects:
            raise ValueError(
                "--region: expected an object in the unsteered picture, found none; "
                "take another seed"
            )
        where = token_mask(objects[0].mask, grid, config.coverage)
    edits = make_edits(config, feature=config.feature, value=config.value, region=where)
    words = describe_edits(config, feature=config.feature, value=config.value)
    with steering(model.pipe, coder, edits, site=config.site):
        after = generate_pictures(model, config, prompts=prompts, seeds=seeds, edit=words)[0]

    change, largest = difference(before, after)
    config.out.mkdir(parents=True, exist_ok=True)
    paths = {
        name: save_picture(picture, config.out / f"{name}.png")
        for name, picture in (("before", before), ("after", after), ("difference", change))
    }
    cells = [
        Cell(before, "before"),
        Cell(after, "after"),
        Cell(
            outline_region(change, where, grid),
            f"difference (darkest: {largest} of 255)",
        ),
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
