"""Which rows `jaxdict eval` measures, of one site or several, and what a transcoder predicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from harvest.store import Store
from jaxdict.dictionary import Dictionary
from jaxdict.evaluate.config import EvalConfig
from jaxdict.rows import Source, match_sites, source_of


class Rows(NamedTuple):
    """The rows of one site.

    Attributes:
        source: what is encoded.
        target: what is to be rebuilt, where that is another site (a transcoder); else None.
        train: training rows of what is to be rebuilt, for the baselines.
    """

    source: Source
    target: Source | None
    train: Source

    @property
    def rebuilt(self) -> Source:
        """What is to be rebuilt."""
        return self.source if self.target is None else self.target


def choose_rows(dictionary: Dictionary, store: Store, config: EvalConfig) -> dict[str, Rows]:
    """Which rows of which sites are measured, checked before anything is read.

    Args:
        dictionary: with `target` in its card if it predicts one site from another.
        store: with these sites.
        config: `site`, `split`, `rows`, `fit_rows` and `encoder` are used.

    Returns:
        Site -> its rows, in the order of the store.

    Raises:
        ValueError: no such site, another width, or something a transcoder cannot have.
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
    sources = {
        site: source_of(store, site, split=config.split).spread(config.rows) for site in sites
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
        paired = target_rows(source, target, dictionary.d_out) if target else None
        train = source_of(store, target or site, split="train").spread(config.fit_rows)
        found[site] = Rows(source, paired, train)
    return found


def _matching(store: Store, patterns: Sequence[str]) -> list[str]:
    """Sites that names or globs ask for."""
    found, missing = match_sites(store.sites, patterns)
    if missing:
        raise ValueError(
            f"--site: expected sites of {store.path} ({', '.join(store.sites)}), got "
            f"{missing[0]!r}; pick some of them"
        )
    return found


def target_rows(source: Source, target: str, width: int) -> Source:
    """The rows of a transcoder's target that belong to the same images, steps and tokens."""
    store = source.store
    if target not in store.sites:
        raise ValueError(
            f"expected the transcoder's target {target} in {store.path}, which holds "
            f"{', '.join(store.sites)}; harvest both sites into one store"
        )
    paired = source.beside(target)
    if paired.d != width:
        raise ValueError(
            f"expected rows of width {width} at the transcoder's target {target}, got {paired.d}; "
            "measure on a store of the same model"
        )
    return paired


def check_width(dictionary: Dictionary, source: Source) -> None:
    """ValueError when a dictionary does not fit a site's width."""
    if dictionary.d != source.d:
        raise ValueError(
            f"expected rows of width {dictionary.d} as in the dictionary, got {source.d} at "
            f"{source.site}; name the site it was trained on with --site"
        )
