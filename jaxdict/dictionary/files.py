"""A dictionary on disk: one folder that holds everything needed to encode and decode.

A dictionary is a folder with two files, readable without this package:

* `dictionary.safetensors`: the tensors (`atoms`, `bias`, `encoder`, ...), no pickle anywhere;
* `card.json`: kind, d, m, k, site, metrics, config, versions, where atoms came from; for a
  transcoder also target and d_out; the hashes of the tensors and of the card itself.

It acts on **raw** activations x [n, d]. For the kinds with an encoder every normalization is folded
into the tensors, and `jaxdict.dictionary.arrays` says what they mean; for kind `itda` it is kept beside
the atoms, because pursuit runs in the normalized space:

    z = (x - mean) * transform        (or (x - mean) @ transform for a [d, d] transform)
    x = z * inverse + mean            (or z @ inverse + mean)

An itda dictionary with a target runs pursuit on `encoder` (unit rows of the site it reads) and rebuilds
the target's rows from `atoms` with the same codes: y = (sum_j e_j atoms_j) * inverse + bias.

Version 1 had the kinds topk and itda only; version 2 added `threshold` and transcoders.

Imports NumPy and safetensors alone, so that steer and interp can use it without JAX.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from harvest.atomic import read_json, whole_folder, with_hash
from harvest.tensors import TensorFile, write_tensors
from jaxdict.dictionary.arrays import TENSORS, Dictionary, check

FORMAT = "jaxdict-dictionary"
VERSION = 2
TENSORS_FILE = "dictionary.safetensors"
CARD_FILE = "card.json"
_HASH = "tensors_xxh3_128"
_REMEDY = "copy the dictionary again, or export its run again"


def save_dictionary(dictionary: Dictionary, path: str | os.PathLike[str]) -> Path:
    """Write a dictionary folder, all of it or nothing.

    A dictionary that is already there is replaced; anything else that is there is left alone.

    Args:
        dictionary: what to write.
        path: the folder to make.

    Returns:
        The folder's path.

    Raises:
        FileExistsError: `path` is a file, or a non-empty folder that is not a dictionary.
        ValueError: the card cannot be written as JSON, or contradicts the tensors.
    """
    target = Path(os.path.expanduser(path))
    refuse_foreign(target)
    check(dictionary)
    card = json.loads(_json(_whole_card(dictionary)))
    tensors = {name: value for name in TENSORS if (value := getattr(dictionary, name)) is not None}
    metadata = {"format": FORMAT, "version": str(VERSION)}
    with whole_folder(target) as folder:
        found = write_tensors(folder / TENSORS_FILE, tensors, metadata)
        text = _json(with_hash(card | {_HASH: found}))
        (folder / CARD_FILE).write_text(text + "\n", encoding="utf-8")
    return target


def load_dictionary(path: str | os.PathLike[str], *, verify: bool = True) -> Dictionary:
    """Read a dictionary folder and check all of it.

    Args:
        path: a folder written by `save_dictionary`.
        verify: whether card and tensors have to have the hashes that were written beside them; a folder without
            hashes, of an earlier jaxdict, is read either way.

    Returns:
        The dictionary; its `card` also holds kind, d, m and k, and d_out if it is a transcoder.

    Raises:
        FileNotFoundError: no such folder, or one of its two files is missing.
        ValueError: not a dictionary, written by a newer version, damaged, or inconsistent.
    """
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise FileNotFoundError(
            f"expected a dictionary folder at {folder}, found {what}; "
            "give the folder that `jaxdict export` made"
        )
    for name in (CARD_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"expected {name} in {folder}, found none: this is not a dictionary folder; "
                "make one with `jaxdict export RUN --out FOLDER`"
            )
    card = read_facts(folder / CARD_FILE, format=FORMAT, version=VERSION, verify=verify)
    tensors = open_tensors(folder, card, verify=verify).read_all()
    card.pop(_HASH, None)
    k = card.get("k")
    if not isinstance(k, int) or isinstance(k, bool):
        raise ValueError(f"{folder / CARD_FILE}: expected an integer k, got {k!r}")
    if "atoms" not in tensors:
        raise ValueError(
            f"{folder / TENSORS_FILE}: expected a tensor atoms, found {_list(tensors)}"
        )
    try:
        dictionary = Dictionary(kind=card.get("kind", ""), k=k, card=card, **tensors)
        _card_facts(dictionary)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; export the run again") from None
    return dictionary


def _card_facts(x: Dictionary) -> dict[str, Any]:
    """The facts that the card repeats; a ValueError where it contradicts the tensors."""
    facts: dict[str, Any] = {"kind": x.kind, "d": x.d, "m": x.m, "k": int(x.k)}
    if x.transcoder:
        facts["d_out"] = x.d_out
    for key, value in facts.items():
        said = x.card.get(key, value)
        if said != value:
            raise ValueError(f"card: expected {key} = {value!r} as in the tensors, got {said!r}")
    return facts


def _whole_card(x: Dictionary) -> dict[str, Any]:
    """What the card's file holds but for hashes: format and facts first, then the rest of the card."""
    card = {"format": FORMAT, "version": VERSION, **_card_facts(x)}
    return card | {key: value for key, value in x.card.items() if key not in card}


def _json(card: dict[str, Any]) -> str:
    """A card as JSON text."""
    try:
        return json.dumps(card, indent=2, default=_plain, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"card: expected JSON values (null if unknown), got {error}") from None


def _plain(value: Any) -> Any:
    """Convert what `json` cannot write: NumPy values, paths, dataclasses."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} {value!r}")


def read_facts(file: Path, *, format: str, version: int, verify: bool = True) -> dict[str, Any]:
    """Read a JSON file that names its format and version, and check both.

    Args:
        file: `card.json`, or a file of the same form.
        format: the name it has to hold.
        version: the newest version that can be read.
        verify: whether its values have to have the hash that it names, if it names one.

    Returns:
        All else that it holds.

    Raises:
        ValueError: the file is damaged, of another format, or of a newer version.
    """
    facts = read_json(file, verify=verify)
    found = facts.pop("format", None)
    if found != format:
        raise ValueError(f"{file}: expected format {format!r}, got {found!r}")
    written = facts.pop("version", None)
    if not isinstance(written, int) or not 1 <= written <= version:
        raise ValueError(
            f"{file}: expected version 1 to {version}, got {written!r}; install a newer jaxdict"
        )
    return facts


def open_tensors(folder: Path, card: dict[str, Any], *, verify: bool = True) -> TensorFile:
    """The tensors of a dictionary folder, none of them read yet.

    Args:
        folder: of the dictionary.
        card: what `read_facts` read in it.
        verify: whether hashes are checked: here that the tensors are those of the card, and each when it is read.

    Raises:
        ValueError: damaged, the tensors of another card, or with a tensor of an unknown name.
    """
    file = TensorFile(folder / TENSORS_FILE, verify=verify, remedy=_REMEDY)
    unknown = set(file.names) - set(TENSORS)
    if unknown:
        raise ValueError(
            f"{file.path}: expected tensors among {_list(TENSORS)}, found {_list(unknown)}"
        )
    expected = card.get(_HASH)
    if verify and expected is not None and expected != file.hash:
        raise ValueError(
            f"{file.path}: expected the tensors of the {CARD_FILE} beside it (hash {expected}), "
            f"got others (hash {file.hash}); {_REMEDY}"
        )
    return file


def refuse_foreign(target: Path) -> None:
    """Raise FileExistsError unless the target is free, empty, or already a dictionary."""
    if target.is_dir():
        names = {entry.name for entry in target.iterdir()}
        if names and names != {CARD_FILE, TENSORS_FILE}:
            other = _list(names - {CARD_FILE, TENSORS_FILE})
            raise FileExistsError(
                f"expected a free place or a dictionary at {target}, found other things ({other}); "
                "give another folder"
            )
    elif target.exists() or target.is_symlink():
        raise FileExistsError(f"expected a folder to write, found a file at {target}")


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
