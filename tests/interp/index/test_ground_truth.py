from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from interp.index.ground_truth import LEAST, auroc, collect_tags, enough, halves, score


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_auroc_equals_scikit_learn(levels):
    rng = np.random.default_rng(levels)
    values = rng.integers(0, levels, (80, 6)).astype(np.float32)
    values[:, 5] = 0
    has = rng.random((80, 3)) < 0.3
    expected = [[roc_auc_score(has[:, t], values[:, c]) for t in range(3)] for c in range(6)]
    np.testing.assert_allclose(auroc(values, has), expected, rtol=0, atol=1e-12)
    assert (auroc(values, has)[5] == 0.5).all()


def test_auroc_without_both_classes_is_nan():
    has = np.stack([np.ones(4, bool), np.zeros(4, bool)], 1)
    assert np.isnan(auroc(np.arange(4.0)[:, None], has)).all()


def test_tags_take_single_objects_with_known_labels():
    labels = [
        {"objects": ["1"], "colour": ["red"]},
        {},
        {"objects": ["2"], "colour": ["red", "blue"]},
        {"colour": ["blue"]},
        {"colour": ["red", "blue"]},
    ]
    tags = collect_tags(labels)
    assert tags.tags == [("colour", "red"), ("colour", "blue")]
    assert tags.images.tolist() == [0, 3]
    assert tags.has.tolist() == [[True, False], [False, True]]


def test_a_prompt_is_never_in_both_halves():
    prompts = [f"prompt {i % 50}" for i in range(200)]
    reports = halves(prompts, seed=3)
    assert len({(prompt, bool(half)) for prompt, half in zip(prompts, reports, strict=True)}) == 50
    assert 0.25 < reports.mean() < 0.75
    assert (reports != halves(prompts, seed=4)).any()


def test_chosen_on_one_half_reported_on_the_other():
    """A feature that is perfect on the first half only is chosen, and reported at what it is worth."""
    rng = np.random.default_rng(0)
    has = rng.random((200, 1)) < 0.5
    reports = np.arange(200) >= 100
    lucky = np.where(reports, rng.random(200), has[:, 0] + 0.1)
    honest = has[:, 0] + rng.normal(0, 0.3, 200).clip(-0.4)
    values = np.stack([np.zeros(200), honest, lucky], 1).astype(np.float32)
    result = score(iter([(slice(0, 3), values, np.zeros_like(values))]), has, reports, m=3)
    assert result.tag_feature.tolist() == [2]
    assert result.selected[2, 0] == 1
    assert result.reported[2, 0] == pytest.approx(auroc(values[reports], has[reports])[2, 0])
    assert result.reported[2, 0] < 0.7
    assert result.best_tag.tolist() == [-1, 0, 0]
    assert result.order.tolist() == [2, 1, 0]


def test_pooling_is_chosen_on_the_first_half():
    has = np.tile([[True], [False]], (20, 1))
    reports = np.arange(40) >= 20
    noise = np.random.default_rng(1).random((40, 1)).astype(np.float32)
    result = score(iter([(slice(0, 1), noise, has.astype(np.float32))]), has, reports, m=1)
    assert result.pooling[0, 0] == 1 and result.reported[0, 0] == 1


def test_equal_auroc_goes_to_the_wider_gap():
    has = np.tile([[True], [False]], (20, 1))
    reports = np.arange(40) >= 20
    base = np.linspace(0.5, 1, 40)
    narrow = base + 0.6 * has[:, 0]
    wide = base + 6 * has[:, 0]
    values = np.stack([narrow, wide, narrow], 1).astype(np.float32)
    result = score(iter([(slice(0, 3), values, values)]), has, reports, m=3)
    assert (result.selected == 1).all()
    assert result.tag_feature.tolist() == [1]
    assert result.order.tolist() == [1, 0, 2]


def test_rare_tags_are_left_out():
    reports = np.arange(40) >= 20
    has = np.zeros((40, 3), bool)
    has[:LEAST, 0] = has[20 : 20 + LEAST, 0] = True
    has[: LEAST - 1, 1] = has[20:30, 1] = True
    has[:, 2] = True
    assert enough(has, reports).tolist() == [True, False, False]
