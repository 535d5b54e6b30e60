"""Verdicts on pictures whose truth is known, because they were drawn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from harvest.shapes import check, draw
from steer.verdict import Verdict, choose_object, compare, summarize, wilson_interval

RED = draw.Thing("circle", "red", "solid", "large", "centre")
BLUE = ("colour", "blue")


def read(*things, background="white", relation=""):
    """The reading of a drawn scene, always with the same jitter."""
    scene = draw.Scene(background, things, relation)
    return check.read_picture(draw.render(scene, np.random.default_rng(0))[0])


def judge(after, before=None):
    before = before or read(RED)
    return compare(before, choose_object(before, BLUE), after, BLUE)


def changed(**fields):
    return dataclasses.replace(RED, **fields)


def test_only_what_was_wanted_changed():
    verdict = judge(read(changed(colour="blue")))
    assert verdict.changed and verdict.success and verdict.clean
    assert verdict.after["colour"] == "blue" and "colour" not in verdict.kept


@pytest.mark.parametrize(
    ("fields", "lost"),
    [({"shape": "square"}, "shape"), ({"texture": "striped"}, "texture")],
)
def test_something_else_of_the_object_changed(fields, lost):
    verdict = judge(read(changed(colour="blue", **fields)))
    assert verdict.success and not verdict.clean
    assert [name for name, kept in verdict.kept.items() if not kept] == [lost]


def test_the_background_changed_or_nothing_did_or_the_object_is_gone():
    verdict = judge(read(changed(colour="blue"), background="black"))
    assert verdict.changed and not verdict.kept["background"] and not verdict.success
    verdict = judge(read(RED))
    assert not verdict.changed and not verdict.success and all(verdict.kept.values())
    verdict = judge(check.Reading("white", []))
    assert not verdict.changed and verdict.kept["background"] and not verdict.kept["shape"]
    assert verdict.after["colour"] == ""


def test_of_two_objects_the_right_one_is_steered_and_the_other_watched():
    pair = (draw.Thing("circle", "red", "solid"), draw.Thing("square", "green", "solid"))
    before = read(*pair, relation="left of")
    target = choose_object(before, BLUE, ("colour", "green"))
    assert target is not None and target.shape == "square"
    turned = dataclasses.replace(pair[1], colour="blue")
    verdict = compare(before, target, read(pair[0], turned, relation="left of"), BLUE)
    assert verdict.clean and verdict.after["shape"] == "square"
    both = (dataclasses.replace(pair[0], colour="blue"), turned)
    verdict = compare(before, target, read(*both, relation="left of"), BLUE)
    assert verdict.changed and not verdict.kept["others"] and not verdict.success


def test_objects_that_need_no_change_or_lack_the_source_are_left_out():
    assert choose_object(read(changed(colour="blue")), BLUE) is None
    assert choose_object(read(RED), BLUE, ("colour", "green")) is None
    assert choose_object(read(RED), ("background", "white")) is None
    assert choose_object(check.Reading("white", []), BLUE) is None


def test_a_wanted_background():
    before, wanted = read(RED), ("background", "black")
    verdict = compare(before, before.objects[0], read(RED, background="black"), wanted)
    assert verdict.clean and "background" not in verdict.kept


def test_shares_and_intervals():
    kept = {"background": True, "others": True}
    good, bad = Verdict({}, True, kept), Verdict({}, True, {**kept, "background": False})
    figures = summarize([good, good, bad, Verdict({}, False, kept)])
    assert figures["images"] == 4 and figures["changed"] == 0.75 and figures["success"] == 0.5
    assert figures["kept"] == {"background": 0.75, "others": 1.0}
    low, high = figures["success_interval"]
    assert low < 0.5 < high
    # Wilson's interval of 8 in 10 as statsmodels gives it.
    np.testing.assert_allclose(wilson_interval(8, 10), (0.4902, 0.9433), atol=1e-4)
    assert wilson_interval(0, 32)[0] == 0.0 and wilson_interval(32, 32)[1] == 1.0
