"""`jaxdict compare`: ITDA dictionaries by their sources, and their sites by CKA and SVCCA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harvest.atomic import write_json
from jaxdict.compare import plots
from jaxdict.compare.config import CompareConfig
from jaxdict.compare.groups import (
    Groups,
    between_groups,
    form_groups,
    match_groups,
    name_members,
    site_order,
)
from jaxdict.compare.rows import measure_rows, open_stores
from jaxdict.compare.sources import Member, Places, find_members
from jaxdict.plots import MISSING
from jaxdict.runs import plain
from jaxdict.tables import number, percent, print_table

_FILE = "compare.json"
_TITLES = {"jaccard": "Jaccard", "cka": "CKA", "svcca": "SVCCA"}
_WIDEST = 12
"""Dictionaries up to which a whole matrix is printed."""


def compare(config: CompareConfig) -> dict[str, Any]:
    """Compare dictionaries; write compare.json and heat maps.

    Args:
        config: settings.

    Returns:
        What was written. `measures` holds a matrix [dictionary, dictionary] for each measure (None
        where two cannot be compared), `matching` an entry for each ordered pair of groups (see
        `jaxdict.compare.groups.match_groups`), `between` the mean similarity of the sites that two
        groups share, a matrix [group, group].

    Raises:
        ValueError: what is named are not ITDA dictionaries, or they cannot be compared.
        FileNotFoundError: nothing is there.

    Source: arXiv 2505.17769 (Jaccard), 1905.00414 (CKA), 1706.05806 (SVCCA).
    """
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {config.out}; name another")
    members, left = find_members(config.paths)
    if len(members) < 2:
        raise ValueError(
            f"expected at least 2 ITDA dictionaries, got {members[0].path} alone; name more"
        )
    members, groups = _sorted(members, form_groups(members, config.groups))
    stores = open_stores(config.store, members)
    places = Places(members, config.by, stores)
    measures = {"jaccard": places.jaccard()}
    rows: dict[str, Any] | None = None
    if stores:
        found = measure_rows(members, stores, config)
        measures |= {"cka": found.cka, "svcca": found.svcca}
        rows = {"rows": found.rows.tolist(), "components": found.components.tolist()}
    names = name_members(members, groups)
    matching = match_groups(members, groups, measures)
    between = {name: between_groups(groups, matching, name) for name in measures}
    config.out.mkdir(parents=True, exist_ok=True)
    _show(config, names, places, groups, measures, matching, left)
    if rows is not None:
        _warn(names, rows)
    pictures: list[Path] | None = []
    if config.plots:
        panels = {_TITLES[name]: values for name, values in measures.items()}
        means = {_TITLES[name]: values for name, values in between.items()}
        pictures = plots.draw(
            config.out, names, [member.site for member in members], groups, panels, means
        )
    result = {
        "dictionaries": _facts(names, places, groups),
        "by": list(config.by),
        "groups": {"by": groups.by, "names": groups.names},
        "measures": {name: _plain(values) for name, values in measures.items()},
        "matching": matching,
        "between": {name: _plain(values) for name, values in between.items()},
        "rows": rows,
        "plots": [path.name for path in pictures or ()],
        "config": plain(config),
    }
    write_json(config.out / _FILE, result)
    print(f"\ncomparison: {config.out / _FILE}")
    if pictures is None:
        print(f"no plots: {MISSING}")
    elif pictures:
        print("plots: " + ", ".join(map(str, pictures)))
    return result


def _sorted(members: Sequence[Member], groups: Groups) -> tuple[list[Member], Groups]:
    """Group by group, and in each as the model passes the sites."""
    order = sorted(
        range(len(members)), key=lambda i: (int(groups.of[i]), site_order(members[i].site))
    )
    return [members[i] for i in order], groups._replace(of=groups.of[order])


def _facts(names: Sequence[str], places: Places, groups: Groups) -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "path": str(member.path),
            "site": member.site,
            "stream": member.stream,
            "group": groups.names[group],
            "store_fingerprint": member.fingerprint,
            "seed": member.seed,
            "atoms": len(member.source),
            "places": len(own),
        }
        for name, member, own, group in zip(
            names, places.members, places.sets, groups.of, strict=True
        )
    ]


def _plain(values: np.ndarray) -> list[list[float | None]]:
    """A matrix as JSON has it."""
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]


def _show(
    config: CompareConfig,
    names: Sequence[str],
    places: Places,
    groups: Groups,
    measures: Mapping[str, np.ndarray],
    matching: Sequence[Mapping[str, Any]],
    left: Sequence[Path],
) -> None:
    """Tables for a terminal."""
    if left:
        print("left out, since not of kind itda: " + ", ".join(map(str, left)))
    lines = [
        (name, f"{len(member.source):,}", f"{len(own):,}")
        for name, member, own in zip(names, places.members, places.sets, strict=True)
    ]
    print_table(("dictionary", "atoms", "places"), lines, f"places by {', '.join(config.by)}")
    if np.isnan(measures["jaccard"]).any():
        print(
            "  (a token of the text is another place than one of the picture: such pairs are left out)"
        )
    if len(names) <= _WIDEST:
        for name, values in measures.items():
            cells = [(own, *map(_cell, row)) for own, row in zip(names, values, strict=True)]
            head = ("", *(f"({i + 1})" for i in range(len(names))))
            numbered = [(f"({i + 1}) {own}", *row) for i, (own, *row) in enumerate(cells)]
            print_table(head, numbered, f"{_TITLES[name]} similarity")
    for entry in matching:
        if any(entry["counted"].values()):
            _show_matching(entry)
    if matching:
        _show_groups(groups, matching, list(measures))


def _show_matching(entry: Mapping[str, Any]) -> None:
    """Which site of one group each site of another is most similar to."""
    measures = list(entry["accuracy"])
    lines = []
    for site in entry["sites"]:
        cells = [site["site"]]
        for name in measures:
            found = site[name]
            cells += [_cell(found["same"]), found["best"] or "-", _cell(found["similarity"])]
        lines.append(cells)
    head = [entry["from"]]
    for name in measures:
        head += [f"{_TITLES[name]}, same site", "best", "there"]
    print_table(head, lines, f"Most similar layer of {entry['to']}")


def _show_groups(
    groups: Groups, matching: Sequence[Mapping[str, Any]], measures: Sequence[str]
) -> None:
    """Layer matching and similarity of the groups."""
    lines = []
    for entry in matching:
        cells = [f"{entry['from']} -> {entry['to']}", str(entry["counted"]["jaccard"])]
        for name in measures:
            cells += [number(entry["mean_same"][name]), percent(entry["accuracy"][name])]
        lines.append([*cells, percent(entry["chance"]["jaccard"])])
    head = ["groups", "sites"]
    for name in measures:
        head += [f"{_TITLES[name]}, same site", "matched"]
    print_table([*head, "chance"], lines, f"Groups by {groups.by}: layers matched to themselves")


def _cell(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def _warn(names: Sequence[str], rows: Mapping[str, Sequence[int]]) -> None:
    """Say where canonical correlations are high for want of rows."""
    for name, count, components in zip(names, rows["rows"], rows["components"], strict=True):
        if count < 10 * components:
            print(
                f"\n  few rows for SVCCA: {count:,} for {components:,} components of {name}; chance "
                "alone correlates them, take more with --rows"
            )
            return
