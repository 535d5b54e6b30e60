"""The dictionaries that are compared, read from disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harvest.atomic import read_json
from harvest.store import stream_of
from jaxdict.dictionary import CARD_FILE, FORMAT, VERSION, open_tensors, read_facts
from jaxdict.runs import CONFIG

_ITDA = "an ITDA dictionary (with sources)"
_WHY = "only the atoms of `jaxdict train itda` are activations of known places"


class ComparedDictionary(NamedTuple):
    """What the comparison needs of an ITDA dictionary.

    Attributes:
        path: its folder.
        card: its card, or what the card of a run's dictionary would be.
        source: int32 [m, 3], (image, step, token) of each atom, as its store counts them.
    """

    path: Path
    card: dict[str, Any]
    source: np.ndarray

    @property
    def site(self) -> str:
        """The site whose rows it was built from."""
        return str(self.card["site"])

    @property
    def stream(self) -> str:
        """The stream of its site, `img` or `txt`."""
        return stream_of(self.site)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of its store."""
        return str(self.card["store_fingerprint"])

    @property
    def seed(self) -> int | None:
        """The seed of the order in which it saw the rows."""
        return self.card.get("config", {}).get("seed")


def find_dictionaries(
    paths: Sequence[Path], *, verify: bool = True
) -> tuple[list[ComparedDictionary], list[Path]]:
    """Read dictionaries and runs: each path is one of them, or a folder that holds some.

    Args:
        paths: folders; one that is named twice counts once.
        verify: whether what is read has to have the hashes that were written beside it.

    Returns:
        The dictionaries, and the subfolders that were skipped because they hold none.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a path is not an ITDA dictionary, nor a folder that holds one.
    """
    dictionaries: dict[Path, ComparedDictionary] = {}
    skipped: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"expected {_ITDA} at {path}, but nothing is there")
        kind = _kind(path, verify)
        if kind is not None:
            dictionaries.setdefault(path.resolve(), _read(path, kind, verify))
            continue
        if not path.is_dir() or (path / "zarr.json").is_file():
            what = "an activation store (name it with --store)" if path.is_dir() else "a file"
            raise ValueError(f"{path}: expected {_ITDA}, got {what}; {_WHY}")
        inner = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        kinds = {p: _kind(p, verify) for p in inner}
        found = [p for p in inner if kinds[p] == "itda"]
        if not found:
            raise ValueError(
                f"expected {_ITDA}, a run of one, or a folder of such at {path}, found none; {_WHY}"
            )
        skipped += [p for p in inner if p not in found]
        for p in found:
            dictionaries.setdefault(p.resolve(), _read(p, "itda", verify))
    return list(dictionaries.values()), skipped


def _kind(path: Path, verify: bool) -> str | None:
    """Kind of the dictionary or the run at a path; None if it is neither."""
    if (path / CARD_FILE).is_file():
        return str(_card(path, verify).get("kind"))
    if (path / CONFIG).is_file():
        said = read_json(path / CONFIG, verify=verify)
        return str(said["kind"]) if "kind" in said else None
    return None


def _card(path: Path, verify: bool) -> dict[str, Any]:
    return read_facts(path / CARD_FILE, format=FORMAT, version=VERSION, verify=verify)


def _read(path: Path, kind: str, verify: bool) -> ComparedDictionary:
    if kind != "itda":
        raise ValueError(f"{path}: expected {_ITDA}, got kind {kind}; {_WHY}")
    if (path / CARD_FILE).is_file():
        card = _card(path, verify)
        tensors = open_tensors(path, card, verify=verify)
        # The sources alone are read, and none of the atoms.
        source = tensors.read("source") if "source" in tensors.names else None
    else:
        from jaxdict.itda import run_to_dictionary

        dictionary = run_to_dictionary(path, verify=verify)
        card, source = dictionary.card, dictionary.source
    if source is None:
        raise ValueError(f"{path}: expected {_ITDA}, got one without; export its run again")
    missing = [name for name in ("site", "store_fingerprint") if not card.get(name)]
    if missing:
        raise ValueError(f"{path}: expected a card with {missing[0]}; export its run again")
    if source.ndim != 2 or source.shape[1:] != (3,) or not len(source) or source.min() < 0:
        raise ValueError(f"{path}: expected sources [m, 3] of at least 0; export its run again")
    return ComparedDictionary(path, card, source)
