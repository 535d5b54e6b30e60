"""Heat maps over pictures: what a feature responds to stays lit, the rest fades.

The picture keeps its colours where the feature is active (black glows a little, or it would not look lit) and turns a
quiet gray elsewhere, with a thin amber line at half of the feature's maximum. Heat is a share of that maximum, so that
the maps of one feature can be compared.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

AMBER = (255, 176, 32)
"""Colour of the contour at half maximum and of source patches."""

_GAMMA = 0.6
_GLOW = [round(255 * 0.36 * (1 - level / 255) ** 3) for level in range(256)]
_QUIET = [round(34 + 0.34 * level) for level in range(256)]


def fit_size(height: int, width: int, longest: int) -> tuple[int, int]:
    """(height, width) scaled so that the longer side is `longest` pixels."""
    scale = longest / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def enlarge(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A picture uint8 [H, W, 3] resampled (Lanczos) to (height, width)."""
    if picture.shape[:2] == size:
        return picture
    resized = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return np.asarray(resized)


def heat_field(heat: np.ndarray, size: tuple[int, int], *, soft: bool = True) -> np.ndarray:
    """Token heat spread over pixels.

    Args:
        heat: float [h, w], share of the feature's maximum on each token; clipped to [0, 1].
        size: (height, width) in pixels.
        soft: bicubic between the centres of tokens, instead of one flat rectangle a token.

    Returns:
        Float32 [height, width] in [0, 1].
    """
    method = Image.Resampling.BICUBIC if soft else Image.Resampling.NEAREST
    image = Image.fromarray(np.clip(heat, 0, 1).astype(np.float32))
    return np.clip(np.asarray(image.resize((size[1], size[0]), method)), 0, 1)


def faded(picture: np.ndarray) -> np.ndarray:
    """A picture uint8 [H, W, 3] in quiet gray: low in contrast, neither black nor white."""
    return np.asarray(_faded(Image.fromarray(picture)))


def overlay(picture: np.ndarray, heat: np.ndarray, *, soft: bool = True) -> np.ndarray:
    """A picture with the active tokens lit.

        result = faded + heat^0.6 (lit - faded), amber on the contour at half

    where `lit` is the picture with its dark places warmed a little.

    Args:
        picture: uint8 [H, W, 3] at its final size.
        heat: float [h, w], share of the feature's maximum on each token.
        soft: see `heat_field`.

    Returns:
        Uint8 [H, W, 3].
    """
    field = heat_field(heat, (picture.shape[0], picture.shape[1]), soft=soft)
    share = Image.fromarray(np.rint(255 * field**_GAMMA).astype(np.uint8))
    image = Image.fromarray(picture)
    result = np.array(Image.composite(_lit(image), _faded(image), share))
    result[contour(field, width=max(1, round(max(picture.shape[:2]) / 110)))] = AMBER
    return result


def contour(field: np.ndarray, *, level: float = 0.5, width: int = 1) -> np.ndarray:
    """Bool [H, W]: the inner edge, `width` pixels thick, of where `field` reaches `level`.

    The rim of the picture is no edge.
    """
    inside = field >= level
    core = inside
    for axis in (0, 1):
        # Erosion by shifts, one axis at a time: at a report's usual size faster than SciPy's filters and their import.
        before = np.moveaxis(core, axis, 0)
        after = before.copy()
        for shift in range(1, width + 1):
            after[shift:] &= before[:-shift]
            after[:-shift] &= before[shift:]
        core = np.moveaxis(after, 0, axis)
    return inside & ~core


def _lit(image: Image.Image) -> Image.Image:
    """The picture with a little amber in its dark places: black would not look lit."""
    share = image.convert("L").point(_GLOW)
    return Image.composite(Image.new("RGB", image.size, AMBER), image, share)


def _faded(image: Image.Image) -> Image.Image:
    gray = image.convert("L").point(_QUIET)
    return Image.merge("RGB", (gray, gray, gray))


def outlined(picture: np.ndarray, token: int, grid: tuple[int, int]) -> np.ndarray:
    """A picture with the patch of one token outlined and the rest faded.

    Args:
        picture: uint8 [H, W, 3].
        token: its place in the grid, row by row.
        grid: (h, w) tokens.

    Returns:
        Uint8 [H, W, 3].

    Raises:
        ValueError: the grid has no such token.
    """
    rows, columns = grid
    if not 0 <= token < rows * columns:
        raise ValueError(
            f"expected a token of the {rows} x {columns} grid, got {token}; "
            "check that dictionary and store belong together"
        )
    height, width = picture.shape[:2]
    y, x = divmod(token, columns)
    top, bottom = y * height // rows, (y + 1) * height // rows
    left, right = x * width // columns, (x + 1) * width // columns
    result = 0.55 * faded(picture) + 0.45 * picture
    result[top:bottom, left:right] = picture[top:bottom, left:right]
    image = Image.fromarray(np.clip(np.rint(result), 0, 255).astype(np.uint8))
    line = max(2, round(max(height, width) / 80))
    box = (left - line, top - line, right + line - 1, bottom + line - 1)
    ImageDraw.Draw(image).rectangle(box, outline=AMBER, width=line)
    return np.asarray(image)


def save_picture(picture: np.ndarray, file: Path) -> None:
    """Write a picture as WebP: lossless if it is small, else at high quality."""
    small = picture.shape[0] * picture.shape[1] <= 128 * 128
    Image.fromarray(picture).save(file, "WEBP", lossless=small, quality=88, method=4)


def save_strip(tiles: list[np.ndarray], file: Path) -> None:
    """Write tiles of one size below each other as one WebP; tile i of n is i / (n - 1) of the way down."""
    Image.fromarray(np.concatenate(tiles)).save(file, "WEBP", quality=84, method=1)


def save_sheet(
    tiles: list[np.ndarray], file: Path, *, places: int, columns: int = 2, gap: int = 3
) -> None:
    """Write tiles of one size on a sheet of `places` as one WebP; gaps and free places are transparent."""
    height, width = tiles[0].shape[:2]
    rows = -(-places // columns)
    sheet = np.zeros((rows * (height + gap) - gap, columns * (width + gap) - gap, 4), np.uint8)
    for place, tile in enumerate(tiles):
        y, x = divmod(place, columns)
        part = sheet[y * (height + gap) :, x * (width + gap) :][:height, :width]
        part[..., :3], part[..., 3] = tile, 255
    Image.fromarray(sheet).save(file, "WEBP", quality=84, method=1)
