"""What a comparison finds, before it is printed, drawn and written."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jaxdict.compare.groups import Groups
from jaxdict.compare.rows import RowSimilarity
from jaxdict.compare.source_sets import SourceSets


class Comparison(NamedTuple):
    """Dictionaries side by side.

    Attributes:
        names: short names of the dictionaries, in the order of every matrix.
        sources: the dictionaries, and the set of sources of each.
        groups: which dictionary belongs where; those of a group lie side by side.
        measures: name -> similarity, float64 [dictionary, dictionary], NaN where two cannot be compared.
        matching: an entry for each ordered pair of groups, see `jaxdict.compare.groups.match_groups`.
        between: name -> mean similarity at the same site, float64 [group, group].
        rows: what CKA and SVCCA were measured on; None without stores.
    """

    names: list[str]
    sources: SourceSets
    groups: Groups
    measures: dict[str, np.ndarray]
    matching: list[dict[str, Any]]
    between: dict[str, np.ndarray]
    rows: RowSimilarity | None = None

    @property
    def sites(self) -> list[str]:
        """The site of each dictionary."""
        return [one.site for one in self.sources.dictionaries]

    def facts(self) -> dict[str, Any]:
        """All of it as JSON has it."""
        rows = self.rows
        return {
            "dictionaries": self._dictionaries(),
            "by": list(self.sources.by),
            "groups": {"by": self.groups.by, "names": self.groups.names},
            "measures": {name: _nested(values) for name, values in self.measures.items()},
            "matching": self.matching,
            "between": {name: _nested(values) for name, values in self.between.items()},
            "rows": rows and {"rows": rows.rows.tolist(), "components": rows.components.tolist()},
        }

    def _dictionaries(self) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "path": str(one.path),
                "site": one.site,
                "stream": one.stream,
                "group": self.groups.names[group],
                "store_fingerprint": one.fingerprint,
                "seed": one.seed,
                "atoms": len(one.source),
                "places": len(places),
            }
            for name, one, places, group in zip(
                self.names,
                self.sources.dictionaries,
                self.sources.sets,
                self.groups.of,
                strict=True,
            )
        ]


def _nested(values: np.ndarray) -> list[list[float | None]]:
    """A matrix as nested lists, None for NaN."""
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]
