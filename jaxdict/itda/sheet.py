"""Sheets of pictures that an ITDA dictionary's atoms came from, for `jaxdict inspect DICT --plot FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harvest.atomic import whole_file
from harvest.store import open_store, stream_of
from jaxdict.dictionary import load_dictionary
from jaxdict.itda.labels import label, pictures
from jaxdict.metrics import feature_usage
from jaxdict.rows import print_padding, source_of

if TYPE_CHECKING:
    from harvest.store import Store
    from jaxdict.dictionary import Dictionary

_MOST = 24


def draw_most_used(path: Path, folder: Path, *, rows: int) -> Path:
    """Draw a sheet of the atoms that are used most.

    Args:
        path: the dictionary; its store has to be where the dictionary was built from.
        folder: folder for atoms.png.
        rows: training rows to measure the use of each atom on.

    Returns:
        The picture's path.

    Raises:
        ValueError: the dictionary is not of kind itda, or its store is gone, has changed or has no pictures.
    """
    dictionary = load_dictionary(path)
    place = (dictionary.card.get("config") or {}).get("store")
    if dictionary.source is None or place is None:
        raise ValueError(
            f"--plot: expected a dictionary that `jaxdict train itda` built from a store, got kind "
            f"{dictionary.kind!r} in {path}; leave --plot out"
        )
    store = open_store(place)
    pictures(dictionary, store, [0])  # refuses another store, or one without pictures, at once
    site = str(dictionary.card["site"])
    measured = source_of(store, site, padding=dictionary.padding).spread(rows)
    print_padding([measured])
    used = feature_usage(dictionary, measured)
    most = np.argsort(-used.energy, kind="stable")[:_MOST].tolist()
    notes = [f"active in {used.fired[atom] / used.rows:.2%} of rows" for atom in most]
    out = draw_sheet(dictionary, store, most, folder / "atoms.png", notes=notes)
    print(f"pictures of the {len(most)} most used atoms: {out}")
    return out


def draw_sheet(
    dictionary: Dictionary,
    store: Store,
    atoms: Sequence[int],
    out: Path,
    *,
    notes: Sequence[str] = (),
    columns: int = 6,
) -> Path:
    """Draw a sheet of atoms: the picture that each came from, its token marked, step and prompt below.

    Args:
        dictionary: of kind itda.
        store: the one that the dictionary was made from.
        atoms: which, in the order of the sheet.
        out: the PNG file to write.
        notes: one more line for each atom.
        columns: pictures in a row.

    Returns:
        The file's path.

    Raises:
        ValueError: as `pictures`.
    """
    from PIL import Image, ImageDraw, ImageFont

    found = pictures(dictionary, store, atoms)
    side, gap, text = 200, 16, 84
    rows = -(-len(atoms) // columns)
    size = (gap + columns * (side + gap), gap + rows * (side + text + gap))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    image_stream = stream_of(str(dictionary.card.get("site", ""))) == "img"
    for place, (atom, picture) in enumerate(zip(atoms, found, strict=True)):
        row, column = divmod(place, columns)
        left, top = gap + column * (side + gap), gap + row * (side + text + gap)
        sheet.paste(Image.fromarray(picture).resize((side, side)), (left, top))
        told = label(dictionary, atom)
        where = f"step {told.step if told.denoising_step is None else told.denoising_step}"
        if image_stream:
            h, w = store.grid
            y, x = divmod(told.position, w)
            box = (x * side / w, y * side / h, (x + 1) * side / w, (y + 1) * side / h)
            ends = [left + box[0], top + box[1], left + box[2], top + box[3]]
            pen.rectangle(ends, outline="white", width=4)
            pen.rectangle(ends, outline="black", width=2)
            where += f", token ({y}, {x})"
        else:
            where += f", token {told.position}" + (f" {told.word!r}" if told.word else "")
        lines = [f"atom {atom}: {where}", *(notes[place : place + 1])]
        lines += _wrapped(told.prompt or "", side, font, most=5 - len(lines))
        pen.multiline_text((left, top + side + 4), "\n".join(lines), fill="black", font=font)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(out) as draft:
        sheet.save(draft, format="png")
    return out


def _wrapped(text: str, width: int, font: Any, *, most: int) -> list[str]:
    """Lines of a text, none wider than `width` pixels; the last ends in ... where more follows."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        elif len(lines) == most:
            lines[-1] += " ..."
            break
        else:
            lines.append(word)
    return lines
