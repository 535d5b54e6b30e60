"""Rows left out of fitting because their norm is far above the median one (`--max-norm`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from harvest.atomic import read_json, write_json
from jaxdict.rows.source import Source, floats

_PIECE = 1 << 16


class NormLimit(NamedTuple):
    """The norm above which rows of a site are left out.

    Attributes:
        limit: the norm.
        median: norm of the rows that were looked at.
        rows: that were looked at.
        left_out: how many of them lie above the limit.
    """

    limit: float
    median: float
    rows: int
    left_out: int


def norms(bits: np.ndarray) -> np.ndarray:
    """Norms of bfloat16 rows: uint16 [n, d] to float32 [n]."""
    pieces = (bits[at : at + _PIECE] for at in range(0, len(bits), _PIECE))
    found = [np.linalg.norm(floats(piece), axis=1) for piece in pieces]
    return np.concatenate(found) if found else np.zeros(0, np.float32)


def limit_once(
    path: Path, sources: list[Source], times: float, *, resume: bool
) -> dict[str, NormLimit]:
    """The limits of a run: read if an earlier start has saved them, else measured and saved.

    Args:
        path: the run's file for them.
        sources: rows to look at, one of each site.
        times: the limit as a multiple of the median norm.
        resume: whether a file found there belongs to this run.
    """
    if not (resume and path.is_file()):
        found = {source.site: _measured(source, times)._asdict() for source in sources}
        write_json(path, {"sites": found}, hashed=True)
    return {site: NormLimit(**one) for site, one in read_json(path)["sites"].items()}


def _measured(source: Source, times: float) -> NormLimit:
    found = np.concatenate([norms(block.bits) for block in source.blocks()])
    median = float(np.median(found))
    limit = times * median
    return NormLimit(limit, median, len(found), int((found > limit).sum()))


def print_limits(limits: dict[str, NormLimit]) -> None:
    """Say what is left out of each site."""
    for site, one in limits.items():
        print(
            f"{site}: rows of a norm above {one.limit:.4g} (median {one.median:.4g}) are left out of fitting, "
            f"{one.left_out:,} of the {one.rows:,} looked at ({one.left_out / one.rows:.2%})"
        )


def kept_rows(images: Iterator[np.ndarray], limit: NormLimit | None) -> Iterator[np.ndarray]:
    """Float rows [n, d] without those above a limit."""
    for rows in images:
        yield rows if limit is None else rows[np.linalg.norm(rows, axis=1) <= limit.limit]


def without(order: np.ndarray, above: np.ndarray, seed: list[int]) -> np.ndarray:
    """An order of rows in which others take the places of those that are left out.

    So a batch holds as many rows as ever, and which is known from the seed and its number.

    Args:
        order: int [n], rows of a table.
        above: bool, of each row of the table, whether it is left out.
        seed: of which rows take the places: rows of the same pool, drawn at random.

    Raises:
        ValueError: all are left out.
    """
    out = above[order]
    if not out.any():
        return order
    kept = order[~out]
    if not len(kept):
        raise ValueError("--max-norm: expected rows below it in each pool, found none; raise it")
    order = order.copy()
    order[out] = np.random.default_rng(seed).choice(kept, int(out.sum()))
    return order
