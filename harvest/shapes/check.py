"""Reads a scene back from pixels: the ground truth of what the embedded model drew.

Background from the border; objects as connected regions that differ from it; shape by overlap with rendered outlines
of the same area and centroid; colour and texture by which shades of which colour explain the object's inner pixels.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import ndimage

from harvest.shapes import draw

_FOREGROUND = 42.0
"""Distance in RGB from the background above which a pixel belongs to an object."""
_SMALLEST = 40
"""Area in pixels below which a region is no object."""
_SIZE_BORDER = 14.0
"""Radius in pixels between small and large."""
_CENTRE_REACH = 6.5
"""Offset in pixels from the middle up to which an object lies in the centre."""
_ANGLES = (-10.0, -5.0, 0.0, 5.0, 10.0)


@dataclasses.dataclass(frozen=True)
class Found:
    """One object as read from the pixels; `centre` (x, y) and `radius` in pixels, `mask` bool [64, 64]."""

    shape: str
    colour: str
    texture: str
    size: str
    position: str
    centre: tuple[float, float]
    radius: float
    mask: np.ndarray


@dataclasses.dataclass(frozen=True)
class Reading:
    """A picture's background and its objects, largest first."""

    background: str
    objects: list[Found]


def read_picture(picture: np.ndarray, *, most: int = 2) -> Reading:
    """Reads background and objects of a picture.

    Args:
        picture: uint8 [64, 64, 3].
        most: how many objects are read at most.

    Raises:
        ValueError: the picture has another shape or type.
    """
    if picture.shape != (draw.SIDE, draw.SIDE, 3) or picture.dtype != np.uint8:
        raise ValueError(
            f"expected a uint8 picture of {draw.SIDE}x{draw.SIDE}x3, got {picture.dtype} {picture.shape}; "
            "only pictures of the embedded model can be read back"
        )
    pixels = picture.astype(np.float32)
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3)])
    border = np.concatenate([border, pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)])
    ground = np.median(border, axis=0)
    background = _nearest(ground, draw.BACKGROUNDS)
    differs = np.linalg.norm(pixels - ground, axis=-1) > _FOREGROUND
    regions, count = _regions(differs, np.ones((3, 3)))
    areas = np.bincount(regions.ravel(), minlength=count + 1)[1:]
    order = [index for index in np.argsort(-areas, kind="stable") if areas[index] >= _SMALLEST]
    return Reading(
        background, [_read_object(pixels, _close_dots(regions == i + 1)) for i in order[:most]]
    )


def matches(reading: Reading, scene: draw.Scene) -> dict[str, bool]:
    """Which attributes of a scene a reading has right.

    For one object: background, colour, shape, size, position, texture, each by itself. For two, ordered along the
    relation: background, colour, shape, texture (right for both), and `all`.
    """
    result = {"background": reading.background == scene.background}
    found = reading.objects[: len(scene.things)]
    names = ["colour", "shape", "texture"]
    if len(scene.things) == 1:
        names += ["size", "position"]
    elif len(found) == 2:
        axis = 0 if draw.RELATIONS[scene.relation][0] else 1
        first_is_lower = draw.RELATIONS[scene.relation][axis] < 0
        found = sorted(found, key=lambda thing: thing.centre[axis], reverse=not first_is_lower)
    complete = len(found) == len(scene.things) and len(reading.objects) == len(scene.things)
    for name in names:
        pairs = zip(found, scene.things, strict=False)
        result[name] = complete and all(getattr(a, name) == getattr(b, name) for a, b in pairs)
    result["all"] = all(result.values())
    return result


def _read_object(pixels: np.ndarray, mask: np.ndarray) -> Found:
    rows, columns = np.nonzero(mask)
    centre = (float(columns.mean() + 0.5), float(rows.mean() + 0.5))
    area = float(mask.sum())
    best = ("", -1.0, 0.0)
    for shape in draw.SHAPES:
        radius = float(np.sqrt(area / _area(shape)))
        for angle in _ANGLES if shape not in ("circle", "ring") else (0.0,):
            template = draw.outline(shape, centre, min(radius, 28.0), angle, supersample=2) > 0.5
            overlap = (template & mask).sum() / max(1, (template | mask).sum())
            if overlap > best[1]:
                best = (shape, float(overlap), radius)
    inner = np.asarray(ndimage.binary_erosion(mask), bool)
    colour, texture = _read_paint(pixels[inner if inner.sum() >= 12 else mask])
    dx, dy = centre[0] - draw.SIDE / 2, centre[1] - draw.SIDE / 2
    if max(abs(dx), abs(dy)) < _CENTRE_REACH:
        position = "centre"
    elif abs(dx) > abs(dy):
        position = "left" if dx < 0 else "right"
    else:
        position = "top" if dy < 0 else "bottom"
    size = "small" if best[2] < _SIZE_BORDER else "large"
    return Found(best[0], colour, texture, size, position, centre, best[2], mask)


def _read_paint(pixels: np.ndarray) -> tuple[str, str]:
    """Colour and texture of inner pixels [n, 3]."""
    best = ("", "", np.inf)
    for name, value in draw.COLOURS.items():
        dark, light = draw.shades(value)
        base = np.asarray(value, np.float32)
        distances = np.stack(
            [np.linalg.norm(pixels - shade, axis=-1) for shade in (base, dark, light)], -1
        )
        nearest = distances.argmin(-1)
        share = np.bincount(nearest, minlength=3) / len(pixels)
        cost = distances.min(-1).mean() + 60 * max(0.0, 0.25 - share[0])
        if cost < best[2]:
            texture = (
                "striped"
                if share[1] > 0.2 and share[1] > share[2]
                else "dotted"
                if share[2] > 0.06
                else "solid"
            )
            best = (name, texture, float(cost))
    return best[0], best[1]


def _close_dots(mask: np.ndarray) -> np.ndarray:
    """Fills holes no larger than a light dot that looks like the background."""
    holes, count = _regions(~mask, None)
    for index in range(1, count + 1):
        hole = holes == index
        if hole.sum() <= 20:
            mask = mask | hole
    return mask


def _regions(mask: np.ndarray, structure: np.ndarray | None) -> tuple[np.ndarray, int]:
    """Connected regions of a mask, numbered from 1, and how many there are."""
    labelled: Any = ndimage.label(mask, structure=structure)
    return labelled[0], int(labelled[1])


@lru_cache
def _area(shape: str) -> float:
    """Area in pixels of a shape at radius 1."""
    return float(draw.outline(shape, (32.0, 32.0), 16.0, 0.0).sum()) / 256


def _nearest(colour: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(
        palette,
        key=lambda name: float(np.linalg.norm(colour - np.asarray(palette[name], np.float32))),
    )
