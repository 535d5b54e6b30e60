"""Contact sheets: pictures in labelled rows on white paper, small ones enlarged without blur."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK, PALE, PAPER = (32, 34, 40), (116, 120, 130), (255, 255, 255)
GOOD, LINE = (22, 140, 80), (218, 220, 226)
_PAD, _GAP = 28, 14


@dataclass(frozen=True)
class Cell:
    """One picture of a sheet.

    Attributes:
        picture: uint8 [H, W, 3].
        caption: words below it; a line break starts a new line.
        mark: True for a green frame, False for a pale caption, None for neither.
    """

    picture: np.ndarray
    caption: str = ""
    mark: bool | None = None


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Cell]]],
    *,
    title: str,
    subtitle: str = "",
    side: int = 128,
    columns: int | None = None,
    text: int = 15,
) -> Image.Image:
    """Draw rows of pictures under a title.

    Args:
        rows: (label, cells); all rows of the same length.
        title: one or two lines on top.
        subtitle: smaller words below it.
        side: pixels of the longer side of a picture on the sheet.
        columns: pictures side by side; longer rows continue below, all rows together. None for as
            many as a row has.
        text: size of the captions in pixels.

    Returns:
        The sheet, RGB.
    """
    count = len(rows[0][1])
    columns = min(columns or count, count)
    small, bold = ImageFont.load_default(text), ImageFont.load_default(round(1.6 * text))
    label_width = max((round(small.getlength(label)) for label, _ in rows), default=0)
    label_width += _GAP if label_width else 0
    height, width = _fit(rows[0][1][0].picture.shape[:2], side)
    layout = _CellLayout((width, height), small, round(1.35 * text))
    lines = max(
        cell.caption.count("\n") + 1 if cell.caption else 0 for _, cells in rows for cell in cells
    )
    cell_height = height + lines * layout.line_height + (6 if lines else 0) + _GAP
    paper_width = 2 * _PAD + label_width + columns * (width + _GAP) - _GAP
    heading = _wrap(title, bold, paper_width - 2 * _PAD)
    below = _wrap(subtitle, small, paper_width - 2 * _PAD) if subtitle else []
    top = _PAD + len(heading) * round(2.0 * text) + len(below) * layout.line_height + _GAP
    bands = -(-count // columns)
    band_height = len(rows) * cell_height + (_GAP if bands > 1 else 0)
    sheet = Image.new("RGB", (paper_width, top + bands * band_height + _PAD - _GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    y = _PAD
    for line in heading:
        pen.text((_PAD, y), line, INK, bold)
        y += round(2.0 * text)
    for line in below:
        pen.text((_PAD, y), line, PALE, small)
        y += layout.line_height
    for index in range(count):
        band, column = divmod(index, columns)
        for row, (label, cells) in enumerate(rows):
            y = top + band * band_height + row * cell_height
            if column == 0 and label:
                pen.text((_PAD, y + height // 2), label, PALE, small, anchor="lm")
            x = _PAD + label_width + column * (width + _GAP)
            _draw_cell(sheet, cells[index], (x, y), layout)
    return sheet


class _CellLayout(NamedTuple):
    """What all cells of a sheet have alike.

    Attributes:
        size: width and height of a picture on the sheet.
        font: of the captions.
        line_height: of a line of a caption.
    """

    size: tuple[int, int]
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont
    line_height: int


def _draw_cell(sheet: Image.Image, cell: Cell, place: tuple[int, int], layout: _CellLayout) -> None:
    (x, y), (width, height) = place, layout.size
    pen = ImageDraw.Draw(sheet)
    enlarges = width >= cell.picture.shape[1]
    resampling = Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS
    sheet.paste(Image.fromarray(cell.picture).resize(layout.size, resampling), place)
    if cell.mark:
        pen.rectangle((x - 4, y - 4, x + width + 3, y + height + 3), outline=GOOD, width=4)
    else:
        pen.rectangle((x - 1, y - 1, x + width, y + height), outline=LINE)
    for line, words in enumerate(cell.caption.split("\n")):
        colour = {None: INK, True: GOOD, False: PALE}[cell.mark]
        below = y + height + 7 + line * layout.line_height
        pen.text((x, below), _shorten(words, layout.font, width + _GAP - 2), colour, layout.font)


def _fit(shape: tuple[int, ...], side: int) -> tuple[int, int]:
    """Height and width of a picture on the sheet: enlarged by a whole factor, or shrunk to `side`."""
    height, width = shape
    longest = max(height, width)
    factor = max(1, side // longest) if longest <= side else side / longest
    return round(height * factor), round(width * factor)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of text that fit a width in pixels, by the width of an average letter."""
    letters = max(8, int(width / max(1.0, font.getlength("n" * 20) / 20)))
    return [line for part in text.split("\n") for line in textwrap.wrap(part, letters) or [""]]


def _shorten(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """A text cut so that it fits a width in pixels, which `textwrap.shorten` cannot measure."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"
