"""The world of `shapes`: its attributes, its captions, and the renderer that draws a scene with its object masks.

A scene is one object (shape, colour, texture, size, position) or two objects (shape, colour, texture each) in a
relation, on a background. Every choice is a word of the caption, so a picture's ground truth is its prompt. What the
caption does not say (exact place, radius, angle, hue, phase of the texture) is drawn at random: this is what seeds vary.
"""

from __future__ import annotations

import dataclasses
import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
"""Height and width of a picture in pixels."""
SHAPES = ("circle", "square", "triangle", "ring", "cross", "star")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (242, 140, 30),
    "yellow": (245, 215, 50),
    "green": (45, 160, 70),
    "cyan": (60, 200, 215),
    "blue": (45, 80, 215),
    "purple": (140, 60, 180),
}
TEXTURES = ("solid", "striped", "dotted")
SIZES = {"small": 11.0, "large": 17.0}
"""Radius in pixels of each size."""
POSITIONS = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "centre": (0, 0)}
BACKGROUNDS = {
    "white": (244, 243, 240),
    "gray": (132, 134, 138),
    "black": (22, 22, 26),
    "cream": (238, 216, 170),
    "pink": (245, 188, 205),
}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Where the first object lies, seen from the second, as the sign of (x, y)."""
HELD_OUT = (("star", "blue"), ("ring", "green"), ("cross", "orange"), ("triangle", "cyan"))
"""(shape, colour) pairs that never occur in training."""

_PLACES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
}
_SUPERSAMPLE = 4
_PAIR_RADIUS = 11.5
_PAIR_OFFSET = 16.0
_STRIPE_PERIOD = 8.0
_DOT_SPACING = 7.0
_DOT_RADIUS = 2.0


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object of a scene. `size` and `position` are empty in a scene of two, where the relation places them."""

    shape: str
    colour: str
    texture: str
    size: str = ""
    position: str = ""


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a caption says: a background, one or two objects, and for two the relation of the first to the second."""

    background: str
    things: tuple[Thing, ...]
    relation: str = ""


def sample_scene(
    rng: np.random.Generator,
    *,
    objects: int | None = None,
    held_out: str = "exclude",
    pair_share: float = 0.4,
) -> Scene:
    """Draws a scene uniformly over the attributes.

    Args:
        rng: source of randomness.
        objects: 1 or 2, or None for two objects with probability `pair_share`.
        held_out: "exclude" never draws a pair of `HELD_OUT`; "only" makes the (first) object such a pair; "include"
            draws from all.
        pair_share: share of scenes with two objects.

    Returns:
        the scene.

    Raises:
        ValueError: `objects` or `held_out` is none of the above.
    """
    if objects not in (None, 1, 2):
        raise ValueError(f"expected objects to be 1, 2 or None, got {objects!r}")
    if held_out not in ("exclude", "only", "include"):
        raise ValueError(f"expected held_out to be exclude, only or include, got {held_out!r}")
    count = objects or (2 if rng.random() < pair_share else 1)
    things = []
    for place in range(count):
        while True:
            shape, colour = _pick(rng, SHAPES), _pick(rng, tuple(COLOURS))
            if held_out == "only" and place == 0:
                shape, colour = HELD_OUT[rng.integers(len(HELD_OUT))]
            elif held_out != "include" and (shape, colour) in HELD_OUT:
                continue
            break
        size = _pick(rng, tuple(SIZES)) if count == 1 else ""
        position = _pick(rng, tuple(POSITIONS)) if count == 1 else ""
        things.append(Thing(shape, colour, _pick(rng, TEXTURES), size, position))
    relation = _pick(rng, tuple(RELATIONS)) if count == 2 else ""
    return Scene(_pick(rng, tuple(BACKGROUNDS)), tuple(things), relation)


def caption(scene: Scene, rng: np.random.Generator | None = None, *, drop: float = 0.0) -> str:
    """Writes the caption of a scene, for instance "a large red striped circle on the left, white background".

    Args:
        scene: what to describe.
        rng: needed when `drop` is positive.
        drop: probability with which each word group but the shape is left out, so that short prompts work too.
    """

    def keep(text: str) -> str:
        return "" if not text or (drop and rng is not None and rng.random() < drop) else text

    phrases = []
    for thing in scene.things:
        words = ("a", keep(thing.size), keep(thing.colour), keep(thing.texture), thing.shape)
        place = keep(_PLACES[thing.position]) if thing.position else ""
        phrases.append(" ".join(word for word in (*words, place) if word))
    text = f" {scene.relation} ".join(phrases)
    background = keep(f"{scene.background} background")
    return f"{text}, {background}" if background else text


def labels(scene: Scene) -> dict[str, list[str]]:
    """The ground truth of a scene as tags: attribute -> values, one value an object where both have one."""
    tags = {
        "objects": [str(len(scene.things))],
        "background": [scene.background],
        "shape": [thing.shape for thing in scene.things],
        "colour": [thing.colour for thing in scene.things],
        "texture": [thing.texture for thing in scene.things],
    }
    if len(scene.things) == 1:
        tags["size"] = [scene.things[0].size]
        tags["position"] = [scene.things[0].position]
    else:
        tags["relation"] = [scene.relation]
    return tags


def render(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene.

    Args:
        scene: what to draw.
        rng: draws everything the caption leaves open.

    Returns:
        the picture, uint8 [64, 64, 3], and the object masks, bool [objects, 64, 64].
    """
    picture = np.empty((SIDE, SIDE, 3), np.float32)
    picture[:] = _jitter(BACKGROUNDS[scene.background], rng, 6)
    masks = []
    for index, thing in enumerate(scene.things):
        radius, centre = _place(scene, index, rng)
        alpha = outline(thing.shape, centre, radius, rng.uniform(-10, 10))
        colour = _jitter(COLOURS[thing.colour], rng, 9)
        paint = _paint(thing.texture, colour, rng)
        picture += alpha[..., None] * (paint - picture)
        masks.append(alpha > 0.5)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8), np.stack(masks)


def shades(colour: tuple[int, int, int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The dark shade (stripes) and the light shade (dots) of a colour, float32 [3] each."""
    base = np.asarray(colour, np.float32)
    return 0.5 * base, base + 0.7 * (255 - base)


def outline(
    shape: str,
    centre: tuple[float, float],
    radius: float,
    angle: float,
    *,
    supersample: int = _SUPERSAMPLE,
) -> np.ndarray:
    """The anti-aliased coverage of a shape, float32 [64, 64] in [0, 1].

    Args:
        shape: one of `SHAPES`; its centroid is put at `centre`.
        centre: (x, y) in pixels.
        radius: nominal radius in pixels; shapes have areas alike at the same radius.
        angle: rotation in degrees.
        supersample: sub-pixels a side.
    """
    side = SIDE * supersample
    mask = Image.new("L", (side, side), 0)
    canvas = ImageDraw.Draw(mask)
    x, y = centre[0] * supersample, centre[1] * supersample
    if shape in ("circle", "ring"):
        outer = radius * (1.0 if shape == "circle" else 1.1) * supersample
        canvas.ellipse((x - outer, y - outer, x + outer, y + outer), fill=255)
        if shape == "ring":
            inner = 0.5 * radius * supersample
            canvas.ellipse((x - inner, y - inner, x + inner, y + inner), fill=0)
    else:
        turn = math.radians(angle)
        cos, sin = math.cos(turn), math.sin(turn)
        scale = radius * supersample
        corners = [
            (x + scale * (u * cos - v * sin), y + scale * (u * sin + v * cos))
            for u, v in _polygon(shape)
        ]
        canvas.polygon(corners, fill=255)
    small = mask.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32) / 255


@lru_cache
def _polygon(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners at radius 1, centroid at the origin."""
    if shape == "square":
        return ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9))
    if shape == "triangle":
        return tuple(
            (1.25 * math.sin(a), -1.25 * math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)
        )
    if shape == "cross":
        a, b = 0.36, 1.1
        return (
            (-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a),
        )  # fmt: skip
    if shape == "star":
        radii = (1.3, 0.6)
        return tuple(
            (radii[i % 2] * math.sin(i * math.pi / 5), -radii[i % 2] * math.cos(i * math.pi / 5))
            for i in range(10)
        )
    raise ValueError(f"expected a shape out of {', '.join(SHAPES)}, got {shape!r}")


def _place(scene: Scene, index: int, rng: np.random.Generator) -> tuple[float, tuple[float, float]]:
    middle = SIDE / 2
    if len(scene.things) == 1:
        thing = scene.things[0]
        radius = SIZES[thing.size] + rng.uniform(-1, 1)
        offset, jitter = (15.0, 3.0) if thing.size == "small" else (12.0, 2.0)
        dx, dy = POSITIONS[thing.position]
        return radius, (
            middle + offset * dx + rng.uniform(-jitter, jitter),
            middle + offset * dy + rng.uniform(-jitter, jitter),
        )
    sign = 1 if index == 0 else -1
    dx, dy = RELATIONS[scene.relation]
    along, across = rng.uniform(-1.5, 1.5), rng.uniform(-5, 5)
    x = middle + sign * dx * _PAIR_OFFSET + (along if dx else across)
    y = middle + sign * dy * _PAIR_OFFSET + (along if dy else across)
    return _PAIR_RADIUS + rng.uniform(-1, 1), (x, y)


def _paint(texture: str, colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The textured colour over the whole canvas, float32 [64, 64, 3] or [3]."""
    if texture == "solid":
        return colour
    dark, light = shades(colour)
    x, y = _fine_grid()
    if texture == "striped":
        phase = ((x + y) / math.sqrt(2) / _STRIPE_PERIOD + rng.random()) % 1.0
        cover, other = phase < 0.5, dark
    else:
        row = np.floor(y / _DOT_SPACING + (shift := rng.random()))
        u = (x / _DOT_SPACING + rng.random() + 0.5 * (row % 2)) % 1.0 - 0.5
        v = (y / _DOT_SPACING + shift) % 1.0 - 0.5
        cover, other = np.hypot(u, v) * _DOT_SPACING < _DOT_RADIUS, light
    share = cover.reshape(SIDE, 2, SIDE, 2).mean((1, 3), dtype=np.float32)[..., None]
    return colour + share * (other - colour)


@lru_cache
def _fine_grid() -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(SIDE * 2, dtype=np.float32) + 0.5) / 2
    x, y = np.meshgrid(axis, axis)
    return x, y


def _jitter(colour: tuple[int, int, int], rng: np.random.Generator, spread: float) -> np.ndarray:
    return np.asarray(colour, np.float32) + rng.uniform(-spread, spread, 3).astype(np.float32)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[rng.integers(len(options))]
