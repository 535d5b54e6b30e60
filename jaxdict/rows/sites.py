"""Names of sites: those that a glob matches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase


def match_sites(sites: Sequence[str], patterns: Iterable[str]) -> tuple[list[str], list[str]]:
    """The sites that names and globs ask for.

    As in `jaxdict harvest` a glob is matched part by part: double.2.* is both streams of the residual
    and none of its neurons, and double.* is no site.

    Args:
        sites: names to choose from.
        patterns: names or globs; one string may hold several, separated by commas.

    Returns:
        The sites that match, in the order of `sites`, and the patterns that match none.
    """
    texts = list(patterns)
    asked = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    found = {
        pattern: {
            site
            for site in sites
            if site.count(".") == pattern.count(".")
            and all(map(fnmatchcase, site.split("."), pattern.split(".")))
        }
        for pattern in asked or texts
    }
    chosen = set().union(*found.values())
    return [site for site in sites if site in chosen], [p for p in found if not found[p]]
