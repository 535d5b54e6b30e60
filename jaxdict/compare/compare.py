"""`jaxdict compare`: ITDA dictionaries by their sources, and their sites by CKA and SVCCA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from harvest.atomic import write_json
from jaxdict.compare import plots
from jaxdict.compare.comparison import Comparison
from jaxdict.compare.config import CompareConfig
from jaxdict.compare.groups import (
    Groups,
    between_groups,
    form_groups,
    match_groups,
    name_dictionaries,
    site_order,
)
from jaxdict.compare.rows import RowSimilarity, measure_rows, open_stores
from jaxdict.compare.source_sets import SourceSets
from jaxdict.compare.sources import ComparedDictionary, find_dictionaries
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
        ValueError: a path holds no ITDA dictionary, or they cannot be compared.
        FileNotFoundError: a path does not exist.

    Source: arXiv 2505.17769 (Jaccard), 1905.00414 (CKA), 1706.05806 (SVCCA).
    """
    if config.out.exists() and not config.out.is_dir():
        raise ValueError(f"--out: expected a folder, got the file {config.out}; name another")
    dictionaries, skipped = find_dictionaries(config.paths, verify=config.verify)
    if len(dictionaries) < 2:
        raise ValueError(
            f"expected at least 2 ITDA dictionaries, got {dictionaries[0].path} alone; name more"
        )
    found = _measure(dictionaries, config)
    config.out.mkdir(parents=True, exist_ok=True)
    if skipped:
        print("left out, since not of kind itda: " + ", ".join(map(str, skipped)))
    _show(found)
    pictures = plots.draw(config.out, found, titles=_TITLES) if config.plots else []
    result = {
        **found.facts(),
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


def _measure(dictionaries: Sequence[ComparedDictionary], config: CompareConfig) -> Comparison:
    """Group the dictionaries, and compare each with each."""
    dictionaries, groups = _sorted(dictionaries, form_groups(dictionaries, config.groups))
    stores = open_stores(config.store, dictionaries)
    sources = SourceSets(dictionaries, config.by, stores)
    measures = {"jaccard": sources.jaccard()}
    rows = measure_rows(dictionaries, stores, config) if stores else None
    if rows is not None:
        measures |= {"cka": rows.cka, "svcca": rows.svcca}
    matching = match_groups(dictionaries, groups, measures)
    return Comparison(
        names=name_dictionaries(dictionaries, groups),
        sources=sources,
        groups=groups,
        measures=measures,
        matching=matching,
        between={name: between_groups(groups, matching, name) for name in measures},
        rows=rows,
    )


def _sorted(
    dictionaries: Sequence[ComparedDictionary], groups: Groups
) -> tuple[list[ComparedDictionary], Groups]:
    """Group by group, and in each as the model passes the sites."""
    order = sorted(
        range(len(dictionaries)),
        key=lambda i: (int(groups.of[i]), site_order(dictionaries[i].site)),
    )
    return [dictionaries[i] for i in order], groups._replace(of=groups.of[order])


def _show(found: Comparison) -> None:
    """Print tables for a terminal."""
    sources = found.sources
    lines = [
        (name, f"{len(one.source):,}", f"{len(places):,}")
        for name, one, places in zip(found.names, sources.dictionaries, sources.sets, strict=True)
    ]
    print_table(("dictionary", "atoms", "places"), lines, f"places by {', '.join(sources.by)}")
    if np.isnan(found.measures["jaccard"]).any():
        print(
            "  (a token of the text is another place than one of the picture: such pairs are left out)"
        )
    if len(found.names) <= _WIDEST:
        head = ("", *(f"({i + 1})" for i in range(len(found.names))))
        for measure, values in found.measures.items():
            cells = [
                (f"({i + 1}) {name}", *map(_cell, row))
                for i, (name, row) in enumerate(zip(found.names, values, strict=True))
            ]
            print_table(head, cells, f"{_TITLES[measure]} similarity")
    for entry in found.matching:
        if any(entry["counted"].values()):
            _show_matching(entry)
    if found.matching:
        _show_groups(found)
    if found.rows is not None:
        _warn_of_few_rows(found.names, found.rows)


def _show_matching(entry: Mapping[str, Any]) -> None:
    """Print which site of one group each site of another is most similar to."""
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


def _show_groups(found: Comparison) -> None:
    """Print how many layers are matched between groups, and how similar these are."""
    lines = []
    for entry in found.matching:
        cells = [f"{entry['from']} -> {entry['to']}", str(entry["counted"]["jaccard"])]
        for name in found.measures:
            cells += [number(entry["mean_same"][name]), percent(entry["accuracy"][name])]
        lines.append([*cells, percent(entry["chance"]["jaccard"])])
    head = ["groups", "sites"]
    for name in found.measures:
        head += [f"{_TITLES[name]}, same site", "matched"]
    print_table(
        [*head, "chance"], lines, f"Groups by {found.groups.by}: layers matched to themselves"
    )


def _cell(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.3f}"


def _warn_of_few_rows(names: Sequence[str], rows: RowSimilarity) -> None:
    """Say where canonical correlations are high only because there are few rows."""
    for name, count, components in zip(names, rows.rows, rows.components, strict=True):
        if count < 10 * components:
            print(
                f"\n  few rows for SVCCA: {count:,} for {components:,} components of {name}; chance "
                "alone correlates them, take more with --rows"
            )
            return
