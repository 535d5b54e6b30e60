"""What an edit means, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest

from steer.edits import Edit


@pytest.mark.parametrize(
    ("edit", "typical", "expected"),
    [
        (Edit(0, "add", 2.0), 3.0, 11.0),
        (Edit(0, "add", 2.0, units="raw"), 3.0, 7.0),
        (Edit(0, "set", 2.0), 3.0, 6.0),
        (Edit(0, "set", 2.0, units="raw"), 3.0, 2.0),
        (Edit(0, "scale", -1.5), 3.0, -7.5),
        (Edit(0, "scale", 0.0), 3.0, 0.0),
        (Edit(0, "ablate", 9.0), 3.0, 0.0),
    ],
)
def test_new_value_of_a_feature_at_five(edit, typical, expected):
    assert edit.new(5.0, edit.unit(typical)) == expected


def test_only_add_needs_no_reading():
    assert [Edit(0, op).reads for op in ("add", "set", "scale", "ablate")] == [
        False,
        True,
        True,
        True,
    ]


def test_steps_are_half_open():
    edit = Edit(0, steps=(1, 3))
    assert [edit.acts_at(step) for step in range(5)] == [False, True, True, False, False]
    assert Edit(0).acts_at(None)


def test_a_dead_feature_has_no_typical_unit():
    with pytest.raises(ValueError, match=r"feature 7 was never active.*units raw"):
        Edit(7).unit(0.0)
    assert Edit(7, units="raw").unit(0.0) == 1.0
    assert Edit(7, "scale").unit(0.0) == 1.0


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"feature": -1}, ValueError, "feature: expected 0 or more, got -1"),
        ({"feature": 1.0}, TypeError, "feature: expected a whole number"),
        ({"feature": True}, TypeError, "feature: expected a whole number"),
        (
            {"op": "multiply"},
            ValueError,
            "op: expected one of add, set, scale, ablate, got 'multiply'",
        ),
        ({"units": "percent"}, ValueError, "units: expected one of typical, raw"),
        ({"stream": "image"}, ValueError, "stream: expected img, txt or None"),
        ({"value": float("nan")}, ValueError, "value: expected a finite number"),
        ({"steps": (3, 3)}, ValueError, "0 <= start < stop"),
        ({"steps": (-1, 3)}, ValueError, "0 <= start < stop"),
        ({"steps": 3}, TypeError, r"steps: expected \(start, stop\)"),
        ({"region": (0, 0, 0, 4)}, ValueError, "0 <= y0 < y1"),
        ({"region": (2, -1, 3, 4)}, ValueError, "0 <= x0 < x1"),
        ({"region": (0.0, 0.0, 1.0, 1.0)}, TypeError, "region: expected a whole number"),
        ({"region": np.ones((4, 4))}, ValueError, r"bool mask.*float64 \[4, 4\]"),
        ({"region": np.ones(4, bool)}, ValueError, r"bool mask.*\[4\]"),
        ({"region": (0, 0, 2, 2), "stream": "txt"}, ValueError, "no place in the picture"),
    ],
)
def test_bad_fields_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        Edit(**{"feature": 0, **fields})


def test_masks_may_be_nested_lists():
    region = Edit(0, region=[[True, False], [False, True]]).region
    assert isinstance(region, np.ndarray) and region.shape == (2, 2)
    four = Edit(0, region=[[True] * 2] * 4).region
    assert isinstance(four, np.ndarray) and four.shape == (4, 2)
