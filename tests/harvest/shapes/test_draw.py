"""The drawn world: captions say what is there, pictures and masks agree, held-out pairs stay out."""

import re

import numpy as np
import pytest

from harvest.shapes import draw


def scenes(count: int, **options) -> list[draw.Scene]:
    rng = np.random.default_rng(3)
    return [draw.sample_scene(rng, **options) for _ in range(count)]


def test_captions_name_every_attribute_and_nothing_else():
    for scene in scenes(200):
        words = set(re.findall(r"[a-z]+", draw.caption(scene)))
        said = {scene.background, *scene.relation.split()}
        for thing in scene.things:
            said |= {thing.shape, thing.colour, thing.texture, thing.size, thing.position}
        said.discard("")
        assert said <= words
        palette = {*draw.COLOURS, *draw.BACKGROUNDS, *draw.SHAPES, *draw.TEXTURES, *draw.SIZES}
        assert words & palette <= said


def test_captions_tell_scenes_apart():
    drawn = {scene: draw.caption(scene) for scene in scenes(500)}
    assert len(set(drawn.values())) == len(drawn)


def test_dropping_words_leaves_the_shape():
    rng = np.random.default_rng(0)
    for scene in scenes(50):
        text = draw.caption(scene, rng, drop=1.0)
        assert all(thing.shape in text for thing in scene.things)
        assert not set(re.findall(r"[a-z]+", text)) & {*draw.COLOURS, *draw.TEXTURES, "background"}


def test_held_out_pairs():
    pairs = {(t.shape, t.colour) for scene in scenes(800) for t in scene.things}
    assert not pairs & set(draw.HELD_OUT)
    assert len(pairs) == len(draw.SHAPES) * len(draw.COLOURS) - len(draw.HELD_OUT)
    only = {(s.things[0].shape, s.things[0].colour) for s in scenes(100, held_out="only")}
    assert only == set(draw.HELD_OUT)


def test_masks_cover_what_differs_from_the_background():
    rng = np.random.default_rng(1)
    for scene in scenes(60):
        picture, masks = draw.render(scene, rng)
        assert picture.shape == (64, 64, 3)
        assert picture.dtype == np.uint8
        assert masks.shape == (len(scene.things), 64, 64)
        assert not (masks.sum(0) > 1).any()
        ground = np.median(picture[~masks.any(0)], axis=0)
        differs = np.abs(picture.astype(float) - ground).max(-1) > 60
        assert (differs & ~masks.any(0)).mean() < 0.02
        assert np.abs(picture[masks.any(0)].astype(float) - ground).max(-1).mean() > 40


def test_relation_places_the_first_object():
    for scene in scenes(80, objects=2):
        _, masks = draw.render(scene, np.random.default_rng(0))
        (y0, x0), (y1, x1) = (np.argwhere(mask).mean(0) for mask in masks)
        dx, dy = draw.RELATIONS[scene.relation]
        assert (x1 - x0) * dx + (y1 - y0) * dy < -20


def test_seeds_differ_and_repeat():
    scene = scenes(1)[0]
    first, _ = draw.render(scene, np.random.default_rng(0))
    again, _ = draw.render(scene, np.random.default_rng(0))
    other, _ = draw.render(scene, np.random.default_rng(1))
    assert np.array_equal(first, again)
    assert (first != other).mean() > 0.05


def test_labels_agree_with_the_scene():
    for scene in scenes(30):
        tags = draw.labels(scene)
        assert tags["objects"] == [str(len(scene.things))]
        assert tags["colour"] == [thing.colour for thing in scene.things]
        assert ("relation" in tags) == (len(scene.things) == 2)
        assert ("position" in tags) == (len(scene.things) == 1)


@pytest.mark.parametrize("options", [{"objects": 3}, {"held_out": "maybe"}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="expected"):
        draw.sample_scene(np.random.default_rng(0), **options)
