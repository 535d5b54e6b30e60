"""Names of the places in a FLUX transformer where activations are read.

A site is `block.index.stream[.kind]`: `double.7.img` is the image stream of the residual after
the double block 7. The kinds read other places of the same block: `mlp` the hidden neurons after
the non-linearity, `attn` the attention output, `update` what the block added (output - input).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

BLOCKS = ("double", "single")
STREAMS = ("img", "txt")
KINDS = ("", "mlp", "attn", "update")

_SITE = re.compile(r"(double|single)\.(0|[1-9][0-9]*)\.(img|txt)(?:\.(mlp|attn|update))?")


@dataclass(frozen=True)
class Site:
    """One place in the transformer; `str(site)` gives its name back.

    Attributes:
        block: `double` (two streams, joint attention) or `single` (one joined sequence).
        index: number of the block among its own kind, from 0.
        stream: `img` or `txt`.
        kind: `""` the residual stream after the block, or `mlp`, `attn`, `update`.

    Raises:
        ValueError: a part is not one of these.
    """

    block: str
    index: int
    stream: str
    kind: str = ""

    def __post_init__(self) -> None:
        """Check each part."""
        for name, value, allowed in (
            ("block", self.block, BLOCKS),
            ("stream", self.stream, STREAMS),
            ("kind", self.kind, KINDS),
        ):
            if value not in allowed:
                raise ValueError(f"expected a site's {name} to be one of {allowed}, got {value!r}")
        if self.index < 0:
            raise ValueError(f"expected a site's index to be 0 or more, got {self.index}")

    def __str__(self) -> str:
        """The site's name."""
        kind = f".{self.kind}" if self.kind else ""
        return f"{self.block}.{self.index}.{self.stream}{kind}"


def parse_site(name: str) -> Site:
    """Read a site's name.

    Args:
        name: for example `double.2.img.mlp`.

    Returns:
        the site; `str` of it is `name` again.

    Raises:
        ValueError: this is no site's name; the nearest ones are named.
    """
    match = _SITE.fullmatch(name)
    if match is None:
        index = re.search(r"\d+", name)
        near = _nearest(name, _names((int(index.group()) if index else 0,)))
        raise ValueError(
            f"expected a site such as double.7.img or single.20.txt.mlp, got {name!r}; {near}"
        )
    block, index, stream, kind = match.groups()
    return Site(block, int(index), stream, kind or "")


def all_sites(double: int, single: int, kinds: Iterable[str] = ("",)) -> tuple[str, ...]:
    """List the sites of a transformer, in the order in which they are computed.

    Args:
        double: number of double blocks (19 in FLUX.1).
        single: number of single blocks (38 in FLUX.1).
        kinds: which kinds to list, of `KINDS`.

    Returns:
        the names, `img` before `txt`.
    """
    kinds = tuple(kinds)
    return tuple(
        str(Site(block, index, stream, kind))
        for block, count in zip(BLOCKS, (double, single), strict=True)
        for index in range(count)
        for stream in STREAMS
        for kind in kinds
    )


def expand_sites(patterns: Iterable[str], *, double: int, single: int) -> tuple[str, ...]:
    """Turn names and globs into the sites of one transformer.

    A glob is matched part by part, so that `double.*.img` (and `*.*.img`) are residual streams
    only, and `double.*.*.mlp` the neurons of both streams.

    Args:
        patterns: site names or globs; one string may hold several, separated by commas.
        double: number of double blocks of the model.
        single: number of single blocks of the model.

    Returns:
        each matching site once, in the order in which the model computes them.

    Raises:
        ValueError: a pattern matches nothing (the nearest sites are named), or there is no pattern.
    """
    valid = all_sites(double, single, KINDS)
    found, missing = match_sites(valid, patterns)
    if missing and missing[0].strip():
        raise ValueError(
            f"the model has no site {missing[0]!r}; {_nearest(missing[0], valid)} "
            f"(it has double.0 to double.{double - 1} and single.0 to single.{single - 1}, "
            "streams img and txt, and the suffixes .mlp, .attn and .update)"
        )
    if not found:
        raise ValueError("expected at least one site, got none; ask for one such as double.*.img")
    return tuple(found)


def match_sites(sites: Sequence[str], patterns: Iterable[str]) -> tuple[list[str], list[str]]:
    """The sites that names and globs ask for, matched part by part.

    So double.2.* is both streams of the residual and none of its neurons, and double.* is no site.

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


def _names(indices: Iterable[int]) -> list[str]:
    return [
        str(Site(block, index, stream, kind))
        for block in BLOCKS
        for index in indices
        for stream in STREAMS
        for kind in KINDS
    ]


def _nearest(name: str, valid: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=3, cutoff=0.0)
    return "the nearest are " + ", ".join(close)
