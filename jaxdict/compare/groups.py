"""Groups of dictionaries (models, quantizations, seeds), and how they match each other, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from jaxdict.compare.config import GROUPINGS
from jaxdict.compare.similarity import match
from jaxdict.compare.sources import ComparedDictionary

_BLOCKS = ("double", "single")


class Groups(NamedTuple):
    """Which dictionary belongs where.

    Attributes:
        by: store, seed or folder; empty if there are no groups.
        names: of the groups, in the order of their first dictionaries; [""] if there are none.
        of: int64 [dictionary], the group of each.
    """

    by: str
    names: list[str]
    of: np.ndarray


def site_order(site: str) -> tuple[Any, ...]:
    """Sorts sites as the model passes them: double before single blocks, by number."""
    block, number, *rest = [*site.split("."), "0"]
    place = _BLOCKS.index(block) if block in _BLOCKS else len(_BLOCKS)
    return rest, place, int(number) if number.isdigit() else 0, site


def form_groups(dictionaries: Sequence[ComparedDictionary], choice: str) -> Groups:
    """Tell groups of dictionaries apart.

    Args:
        dictionaries: what is compared.
        choice: store, seed, folder, none; auto is the first of the three that makes more than one
            group, none of which has a site twice.

    Raises:
        ValueError: asked for by name, it makes a single group, or a group with a site twice.
    """
    for by in GROUPINGS if choice == "auto" else () if choice == "none" else (choice,):
        labels = _labels(dictionaries, by)
        names = list(dict.fromkeys(labels))
        of = np.array([names.index(label) for label in labels])
        taken = [(label, one.site) for label, one in zip(labels, dictionaries, strict=True)]
        twice = next((pair for pair in taken if taken.count(pair) > 1), None)
        if len(names) > 1 and twice is None:
            return Groups(by, names, of)
        if choice != "auto":
            wrong = (
                f"just one group ({names[0]})"
                if len(names) == 1
                else f"{twice[1]} more than once in group {twice[0]}"
                if twice
                else ""
            )
            raise ValueError(
                f"--groups {by}: expected several groups that have each site once, got {wrong}; "
                "choose another of " + ", ".join((*GROUPINGS, "none"))
            )
    return Groups("", [""], np.zeros(len(dictionaries), np.int64))


def _labels(dictionaries: Sequence[ComparedDictionary], by: str) -> list[str]:
    """The group that each dictionary would be in."""
    if by == "seed":
        return ["seed ?" if one.seed is None else f"seed {one.seed}" for one in dictionaries]
    if by == "folder":
        parents = [one.path.resolve().parent for one in dictionaries]
        short = {parent: parent.name for parent in parents}
        clash = len(set(short.values())) < len(short)
        return [str(parent) if clash else parent.name for parent in parents]
    models = {one.fingerprint: _model(one.card.get("model") or {}) for one in dictionaries}
    if len(set(models.values())) == len(models) and all(models.values()):
        return [models[one.fingerprint] for one in dictionaries]
    return [f"{models[one.fingerprint]} {one.fingerprint[:8]}".strip() for one in dictionaries]


def _model(model: Mapping[str, Any]) -> str:
    """A model in a few words: its name, and its quantization if it is quantized."""
    name = str(model.get("name") or model.get("id") or "").rstrip("/").rsplit("/", 1)[-1]
    quantization = str(model.get("quantization") or "none")
    return name if quantization == "none" else f"{name} {quantization}"


def name_dictionaries(dictionaries: Sequence[ComparedDictionary], groups: Groups) -> list[str]:
    """A short name for each dictionary: its site, with the group or the folder where needed."""
    sites = [one.site for one in dictionaries]
    grouped = [
        f"{site} {groups.names[g]}".strip() for site, g in zip(sites, groups.of, strict=True)
    ]
    for names in (sites, grouped):
        if len(set(names)) == len(names):
            return names
    return [f"{one.site} {one.path}" for one in dictionaries]


def match_groups(
    dictionaries: Sequence[ComparedDictionary], groups: Groups, measures: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """Match the layers of each pair of groups, both ways.

    Args:
        dictionaries: what is compared.
        groups: which belongs where.
        measures: name -> similarity, float64 [dictionary, dictionary].

    Returns:
        One entry for each ordered pair of groups. `sites` holds for each dictionary of `from` and
        each measure the most similar dictionary of `to` (`best`), whether that is of the same site
        (`right`; None where it does not count, since there is no such site or nothing else to take
        for it) and the similarity of the two of the same site (`same`). `accuracy`, `chance` and
        `mean_same` are by measure.
    """
    found = []
    for one, two in combinations(range(len(groups.names)), 2):
        for a, b in ((one, two), (two, one)):
            rows, columns = (np.flatnonzero(groups.of == g) for g in (a, b))
            found.append(
                {
                    "from": groups.names[a],
                    "to": groups.names[b],
                    **_match(dictionaries, rows, columns, measures),
                }
            )
    return found


def _match(
    dictionaries: Sequence[ComparedDictionary],
    rows: np.ndarray,
    columns: np.ndarray,
    measures: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    same = np.array([[dictionaries[i].site == dictionaries[j].site for j in columns] for i in rows])
    sites: list[dict[str, Any]] = [{"site": dictionaries[i].site} for i in rows]
    facts: dict[str, dict[str, float | None]] = {"accuracy": {}, "chance": {}, "mean_same": {}}
    counted: dict[str, int] = {}
    for name, values in measures.items():
        scores = values[np.ix_(rows, columns)]
        matches = match(scores, same)
        for i, site in enumerate(sites):
            best = int(matches.best[i])
            own = scores[i][same[i] & np.isfinite(scores[i])]
            site[name] = {
                "best": dictionaries[columns[best]].site if best >= 0 else None,
                "similarity": float(scores[i, best]) if best >= 0 else None,
                "same": float(own[0]) if len(own) else None,
                "right": bool(matches.right[i]) if matches.counted[i] else None,
            }
        own = scores[same & np.isfinite(scores)]
        facts["accuracy"][name], facts["chance"][name] = matches.accuracy, matches.chance
        facts["mean_same"][name] = float(own.mean()) if len(own) else None
        counted[name] = int(matches.counted.sum())
    return {"sites": sites, "counted": counted, **facts}


def between_groups(groups: Groups, matching: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """Mean similarity of the sites that two groups share: float64 [group, group], 1 with itself."""
    found = np.eye(len(groups.names))
    for entry in matching:
        a, b = groups.names.index(entry["from"]), groups.names.index(entry["to"])
        mean = entry["mean_same"][name]
        found[a, b] = np.nan if mean is None else mean
    return found
