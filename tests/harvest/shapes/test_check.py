"""The checker reads drawn pictures almost without error, and says when it can not."""

import numpy as np
import pytest

from harvest.shapes import check, draw, quality


@pytest.mark.parametrize("objects", [1, 2])
def test_drawn_pictures_are_read_back(objects):
    shares = quality.measure_checker(120, objects=objects, seed=5)
    assert min(shares.values()) >= 0.98, shares


def test_masks_and_centres_agree_with_the_drawing():
    rng = np.random.default_rng(2)
    for _ in range(15):
        scene = draw.sample_scene(rng, objects=2)
        picture, masks = draw.render(scene, rng)
        for found in check.read_picture(picture).objects:
            overlap = max((found.mask & mask).sum() / (found.mask | mask).sum() for mask in masks)
            assert overlap > 0.85


def test_a_wrong_picture_is_noticed():
    rng = np.random.default_rng(4)
    scene = draw.Scene("white", (draw.Thing("circle", "red", "solid", "large", "left"),))
    other = draw.Scene("black", (draw.Thing("square", "blue", "striped", "small", "right"),))
    reading = check.read_picture(draw.render(other, rng)[0])
    assert not any(check.matches(reading, scene).values())
    empty = np.full((64, 64, 3), 244, np.uint8)
    result = check.matches(check.read_picture(empty), scene)
    assert result["background"]
    assert not result["shape"]
    assert not result["all"]


def test_swapped_objects_are_wrong():
    first, second = draw.Thing("circle", "red", "solid"), draw.Thing("square", "blue", "solid")
    drawn = draw.Scene("white", (first, second), "left of")
    picture, _ = draw.render(drawn, np.random.default_rng(0))
    reading = check.read_picture(picture)
    assert check.matches(reading, drawn)["all"]
    assert check.matches(reading, draw.Scene("white", (second, first), "right of"))["all"]
    swapped = check.matches(reading, draw.Scene("white", (second, first), "left of"))
    assert not swapped["colour"]
    assert not swapped["shape"]


def test_other_pictures_are_refused():
    with pytest.raises(ValueError, match=r"64x64x3.*embedded"):
        check.read_picture(np.zeros((32, 32, 3), np.uint8))
