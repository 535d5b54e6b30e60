"""The rows that `jaxdict eval` measures, at one site or several, with a transcoder's target."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

from harvest.flags import expect
from harvest.sites import match_sites
from harvest.store import Store
from jaxdict.dictionary import Dictionary
from jaxdict.evaluate.config import EvalConfig
from jaxdict.metrics import check_width, target_rows
from jaxdict.rows import Source, source_of


class EvalRows(NamedTuple):
    """The rows of one site.

    Attributes:
        source: rows to encode.
        target: rows of another site that a transcoder is to rebuild; else None.
        train: training rows of the site that is rebuilt, for the baselines.
    """

    source: Source
    target: Source | None
    train: Source

    @property
    def rebuilt(self) -> Source:
        """The rows to be rebuilt."""
        return self.source if self.target is None else self.target


def choose_rows(dictionary: Dictionary, store: Store, config: EvalConfig) -> dict[str, EvalRows]:
    """Choose the rows of each site, and check them before anything is read.

    Args:
        dictionary: a transcoder's card names its `target`.
        store: holds the sites.
        config: `site`, `split`, `padding`, `rows`, `fit_rows` and `encoder` are used.

    Returns:
        Site -> its rows, in the order of the store.

    Raises:
        ValueError: no such site, rows of another width, or a setting that does not fit a transcoder.
    """
    own = str(dictionary.card.get("site", ""))
    sites = _matching(store, config.site) if config.site else [own]
    target = str(dictionary.card.get("target") or "")
    if target and len(sites) > 1:
        raise ValueError(
            f"--site: expected one site for a transcoder, which predicts {target} from {own}, got "
            f"{', '.join(sites)}; leave --site out"
        )
    if target and config.encoder == "pursuit":
        raise ValueError(
            f"--encoder: expected own for a transcoder, got 'pursuit', which would have to see the "
            f"rows of {target} that are to be predicted; leave --encoder out"
        )
    padding = dictionary.padding if config.padding == "same" else config.padding
    others = [site for site in sites if own and site != own]
    if others:
        carried = f"at {', '.join(others)} it says how far the dictionary carries over"
        print(f"note: the dictionary was trained at {own}; {carried}", file=sys.stderr)
    sources = {
        site: source_of(store, site, split=config.split, padding=padding).spread(config.rows)
        for site in sites
    }
    wrong = [site for site, source in sources.items() if source.d != dictionary.d]
    if wrong and len(sources) > 1:
        widths = ", ".join(f"{site} ({sources[site].d})" for site in wrong)
        raise ValueError(
            f"--site: expected sites of width {dictionary.d} as in the dictionary, got {widths}; "
            "leave them out"
        )
    found = {}
    for site, source in sources.items():
        check_width(dictionary, source)
        paired = target_rows(dictionary, source)
        train = source_of(store, target or site, padding=padding).spread(config.fit_rows)
        found[site] = EvalRows(source, paired, train)
    return found


def _matching(store: Store, patterns: Sequence[str]) -> list[str]:
    """The sites that names or globs ask for."""
    found, missing = match_sites(store.sites, patterns)
    known = f"sites of {store.path} ({', '.join(store.sites)})"
    expect(not missing, "site", known, next(iter(missing), None), "pick some of them")
    return found
