"""Contact sheets."""

from __future__ import annotations

import numpy as np

from steer.sheet import GOOD, Cell, contact_sheet


def picture(value, height=8, width=8):
    return np.full((height, width, 3), value, np.uint8)


def test_pictures_are_enlarged_without_blur_and_marked():
    cells = [Cell(picture(10), "one", True), Cell(picture(200), "two", False)]
    sheet = np.asarray(contact_sheet([("row", cells)], title="Title", side=80))
    # 80 by 80 pixels of each picture and no tone in between, but for letters.
    for value in (10, 200):
        assert (sheet == value).all(-1).sum() == 80 * 80
    green = (sheet == GOOD).all(-1)
    one, two = ((sheet == value).all(-1).any(0).nonzero()[0] for value in (10, 200))
    # A frame around the first picture, at its left and right, none around the second.
    assert green[:, one[0] - 1].sum() >= 80 and green[:, one[-1] + 1].sum() >= 80
    assert not green[:, two[0] - 1].any() and not green[:, two[-1] + 1].any()


def test_long_rows_go_on_in_bands_and_large_pictures_shrink():
    cells = [Cell(picture(value)) for value in range(100, 110)]
    wide = contact_sheet([("a", cells), ("b", cells)], title="T", side=40)
    banded = contact_sheet([("a", cells), ("b", cells)], title="T", side=40, columns=4)
    assert banded.width < wide.width and banded.height > 2 * wide.height
    pixels = np.asarray(banded)
    assert all((pixels == value).all(-1).any() for value in range(100, 110))
    large = contact_sheet([("", [Cell(picture(90, 300, 600))])], title="", side=100)
    assert (np.asarray(large) == 90).all(-1).sum() == 50 * 100


def test_long_words_stay_on_the_paper():
    cells = [Cell(picture(10), "a caption that is far too long for its picture")]
    sheet = np.asarray(contact_sheet([("", cells)], title="many words " * 20, side=160))
    assert (sheet[:, -10:] == 255).all()
