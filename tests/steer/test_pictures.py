"""What is drawn of pictures: differences, and the tokens that an object covers."""

from __future__ import annotations

import numpy as np
import pytest

from steer.pictures import difference, token_mask


def test_difference_is_white_where_equal_and_darkest_at_the_largest_change():
    before = np.full((8, 8, 3), 100, np.uint8)
    after = before.copy()
    after[0, 0, 1] = 160
    after[1, 1, 2] = 70
    tones, largest = difference(before, after)
    assert largest == 60
    assert (tones[2:] == 255).all()
    assert tones[0, 0].sum() < tones[1, 1].sum() < 3 * 255
    same, none = difference(before, before)
    assert none == 0 and (same == 255).all()


def test_token_mask_by_coverage():
    mask = np.zeros((8, 8), bool)
    mask[:4, :4] = True
    mask[4:6, :2] = True
    assert token_mask(mask, (2, 2), 0.5).tolist() == [[True, False], [False, False]]
    assert token_mask(mask, (2, 2), 0.25).tolist() == [[True, False], [True, False]]
    small = np.zeros((8, 8), bool)
    small[7, 7] = True
    assert token_mask(small, (2, 2), 0.5).tolist() == [[False, False], [False, True]]
    assert not token_mask(np.zeros((8, 8), bool), (2, 2), 0.5).any()
    with pytest.raises(ValueError, match="divides into 3 by 2 tokens, got 8 by 8"):
        token_mask(mask, (3, 2), 0.5)
