from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from interp.report.heat_maps import (
    AMBER,
    contour,
    enlarge,
    faded,
    fit_size,
    heat_field,
    outlined,
    overlay,
    save_picture,
    save_sheet,
    save_strip,
)

PICTURE = np.random.default_rng(0).integers(190, 256, (64, 64, 3)).astype(np.uint8)


def test_size_keeps_the_aspect():
    assert fit_size(64, 64, 192) == (192, 192)
    assert fit_size(768, 1024, 192) == (144, 192)
    assert enlarge(PICTURE, (96, 128)).shape == (96, 128, 3)


def test_grid_heat_is_flat_on_each_token():
    heat = np.asarray([[0, 1], [0.25, 2]], np.float32)
    field = heat_field(heat, (8, 8), soft=False)
    expected = np.repeat(np.repeat(np.minimum(heat, 1), 4, 0), 4, 1)
    np.testing.assert_array_equal(field, expected)


def test_soft_heat_stays_in_range_and_peaks_at_the_token():
    heat = np.zeros((8, 8), np.float32)
    heat[2, 5] = 1
    field = heat_field(heat, (64, 64))
    assert field.min() >= 0 and field.max() <= 1
    y, x = np.unravel_index(field.argmax(), field.shape)
    assert (y // 8, x // 8) == (2, 5)


def test_no_heat_fades_all_and_full_heat_lights_all():
    np.testing.assert_array_equal(overlay(PICTURE, np.zeros((8, 8))), faded(PICTURE))
    lit = overlay(PICTURE, np.ones((8, 8)))
    np.testing.assert_allclose(lit, PICTURE, atol=3)


def test_fading_keeps_neither_colour_nor_black_nor_white():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    gray = faded(np.stack([levels, levels.T, levels], -1))
    assert (gray[..., 0] == gray[..., 2]).all() and gray.min() > 30 and gray.max() < 130


def test_lit_black_does_not_look_like_black():
    black = np.zeros((16, 16, 3), np.uint8)
    red, green, blue = (int(x) for x in overlay(black, np.ones((2, 2)))[8, 8])
    assert red > 60 and red > green > blue
    assert red - blue > 40


@pytest.mark.parametrize("soft", [True, False])
def test_only_the_hot_token_is_lit(soft):
    heat = np.zeros((8, 8), np.float32)
    heat[3, 3] = 1
    image = overlay(PICTURE, heat, soft=soft)
    np.testing.assert_allclose(image[28, 28], PICTURE[28, 28], atol=5)
    np.testing.assert_array_equal(image[48:], faded(PICTURE)[48:])
    assert (image == AMBER).all(-1).any()


def test_weaker_examples_are_drawn_weaker():
    """The scale is the feature's, not the picture's."""
    heat = np.ones((8, 8), np.float32)
    full, half = (overlay(PICTURE, share * heat, soft=False) for share in (1, 0.3))
    gap = [np.abs(x.astype(int) - faded(PICTURE)).mean() for x in (full, half)]
    assert gap[1] < 0.6 * gap[0]


@pytest.mark.parametrize("width", [1, 2])
def test_contour_is_the_inner_edge(width):
    field = np.zeros((16, 16))
    field[4:12, 5:13] = 1
    expected = field > 0
    expected[4 + width : 12 - width, 5 + width : 13 - width] = False
    np.testing.assert_array_equal(contour(field, width=width), expected)
    assert not contour(np.ones((5, 5))).any()


def test_source_patch_keeps_its_pixels_and_gets_a_frame():
    image = outlined(PICTURE, 9, (8, 8))
    np.testing.assert_array_equal(image[8:16, 8:16], PICTURE[8:16, 8:16])
    assert (image[7, 7:17] == AMBER).all() and (image[7:17, 16] == AMBER).all()
    assert not np.array_equal(image[40:], PICTURE[40:])
    with pytest.raises(ValueError, match="8 x 8 grid, got 64"):
        outlined(PICTURE, 64, (8, 8))


def test_files(tmp_path):
    save_picture(PICTURE, tmp_path / "small.webp")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "small.webp")), PICTURE)
    save_strip([PICTURE] * 3, tmp_path / "strip.webp")
    assert Image.open(tmp_path / "strip.webp").size == (64, 192)
    save_sheet([PICTURE] * 3, tmp_path / "sheet.webp", places=4, gap=2)
    sheet = np.asarray(Image.open(tmp_path / "sheet.webp"))
    assert sheet.shape == (130, 130, 4)
    assert (sheet[66:, 66:, 3] == 0).all() and (sheet[:64, :64, 3] == 255).all()
