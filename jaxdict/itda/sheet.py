"""`jaxdict inspect DICT --plot FOLDER`: the pictures that an ITDA dictionary's most used atoms came from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harvest.store import open_store
from jaxdict.dictionary import load_dictionary
from jaxdict.itda.labels import draw_sheet, pictures
from jaxdict.metrics import feature_usage
from jaxdict.rows import source_of

_MOST = 24


def sheet(path: Path, folder: Path, rows: int) -> Path:
    """Draw the sheet.

    Args:
        path: the dictionary; its store is where it was when the dictionary was built.
        folder: where to put atoms.png.
        rows: training rows that tell how much each atom is used.

    Returns:
        The picture's path.

    Raises:
        ValueError: the dictionary is none of ITDA, or its store is gone, another one or without pictures.
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
    used = feature_usage(dictionary, source_of(store, str(dictionary.card["site"])).spread(rows))
    most = np.argsort(-used.energy, kind="stable")[:_MOST].tolist()
    notes = [f"active in {used.fired[atom] / used.rows:.2%} of rows" for atom in most]
    out = draw_sheet(dictionary, store, most, folder / "atoms.png", notes=notes)
    print(f"pictures of the {len(most)} most used atoms: {out}")
    return out
