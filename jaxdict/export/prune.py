"""`jaxdict prune`: a smaller dictionary made of a large one, and the held-out error that it costs.

Use is measured on training rows with the dictionary's own encoder. Atoms are dropped in three ways,
each optional, in this order:

    --unused    never active
    --merge c   cosine above c with an atom that is used more, which takes over for both
    --keep N    the least energy, sum over rows of value_j^2 ||atom_j||^2, until N are left

Any kind is pruned; what is left is encoded anew (pursuit, or the encoder's rows that are left), so
that other atoms take over part of what was dropped.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from harvest.store import open_store
from harvest.tensors import aligned
from jaxdict.dictionary import Dictionary, load_dictionary, refuse_foreign, save_dictionary
from jaxdict.export.config import MEMORY_MB, PruneConfig
from jaxdict.itda import select_sources
from jaxdict.metrics import (
    Usage,
    check_width,
    feature_usage,
    measure_dictionary,
    typical_activations,
)
from jaxdict.rows import print_padding, source_of
from jaxdict.tables import print_table

_BLOCK = 2048


def merged(
    dictionary: Dictionary, used: Usage, cosine: float, *, among: np.ndarray | None = None
) -> np.ndarray:
    """The atoms that stay when near-duplicates are merged into the one used most.

    Atoms are taken in order of falling energy; one stays unless its cosine with an atom that stays is
    above `cosine`. If the dictionary has an encoder, the encoder rows' cosine has to be above it too.

    Args:
        dictionary: any kind.
        used: how much each atom is used.
        cosine: in (0, 1).
        among: int64, ascending, the atoms to look at; all by default.

    Returns:
        Atoms that stay, ascending: int64 [kept].
    """
    among = np.arange(dictionary.m) if among is None else among
    order = among[np.argsort(-used.energy[among], kind="stable")]
    tables = [_Directions(dictionary.atoms)]
    if dictionary.encoder is not None:
        tables.append(_Directions(dictionary.encoder))
    kept = np.zeros(0, np.int64)
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        free = np.ones(len(block), bool)
        for first in range(0, len(kept), _BLOCK):
            near = _near(tables, block, kept[first : first + _BLOCK], cosine)
            free &= ~near.any(1)
        inner = _near(tables, block, block, cosine)
        for place in range(len(block)):
            if free[place]:
                free[place + 1 :] &= ~inner[place, place + 1 :]
        kept = np.concatenate([kept, block[free]])
    return np.sort(kept)


def _near(
    tables: list[_Directions], some: np.ndarray, others: np.ndarray, cosine: float
) -> np.ndarray:
    """Whether the cosine is above `cosine` in every table: bool [some, others]."""
    return np.logical_and.reduce([table.of(some) @ table.of(others).T > cosine for table in tables])


class _Directions:
    """Rows scaled to unit norm, some at a time, so that they are not all in memory twice."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows
        parts = [rows[i : i + _BLOCK] for i in range(0, len(rows), _BLOCK)]
        norms = np.concatenate([np.linalg.norm(part, axis=1, keepdims=True) for part in parts])
        self.norms = np.where(norms > 0, norms, 1)

    def of(self, some: np.ndarray) -> np.ndarray:
        """The rows `some`, of unit norm."""
        return self.rows[some] / self.norms[some]


def part(dictionary: Dictionary, keep: np.ndarray) -> Dictionary:
    """A dictionary of some of the atoms, in their order, with their sources and labels.

    Args:
        dictionary: any kind.
        keep: int [kept], which atoms.

    Returns:
        The smaller dictionary; with an encoder its k is at most its number of atoms.

    Raises:
        ValueError: no atom is kept.
    """
    if not len(keep):
        raise ValueError("expected at least one atom that stays, got none; prune less")
    changes: dict[str, Any] = {}
    for name in ("atoms", "encoder", "encoder_bias", "threshold", "typical", "source"):
        value = getattr(dictionary, name)
        if value is not None:
            room = aligned((len(keep), *value.shape[1:]), value.dtype)
            changes[name] = np.take(value, keep, axis=0, out=room, mode="clip")  # no further copy
    card = {name: v for name, v in dictionary.card.items() if name not in ("m", "k", "d", "d_out")}
    if dictionary.source is not None and "sources" in card:
        card["sources"] = select_sources(card["sources"], dictionary.source, keep)
    k = int(dictionary.k) if dictionary.kind == "itda" else min(int(dictionary.k), len(keep))
    return dataclasses.replace(dictionary, k=k, card=card, **changes)


def prune(config: PruneConfig) -> dict[str, Any]:
    """Drop atoms, measure what that costs, and write the smaller dictionary.

    Args:
        config: settings.

    Returns:
        The newest entry of the card's `pruning`, with `path`: atoms before and after, each way's count, held-out
        numbers before and after, and `kept`, the old numbers of the atoms that stay.

    Raises:
        ValueError: dictionary and store do not fit each other, or --keep asks for more atoms than there are.
        FileExistsError: --out holds something that is not a dictionary.
    """
    dictionary = load_dictionary(config.dictionary, verify=config.verify)
    store = open_store(config.store)
    refuse_foreign(config.out)
    if config.keep > dictionary.m:
        raise ValueError(
            f"--keep: expected at most the {dictionary.m} atoms there are, got {config.keep}; lower it"
        )
    site = config.site or str(dictionary.card.get("site", ""))
    padding = dictionary.padding if config.padding == "same" else config.padding
    rows = source_of(store, site, padding=padding).spread(config.rows)
    held = source_of(store, site, split="validation", padding=padding).spread(config.rows)
    print_padding([rows])
    check_width(dictionary, rows)
    room: dict[str, Any] = {"memory_mb": MEMORY_MB}
    before = measure_dictionary(dictionary, held, name="before", **room).summary()

    used = feature_usage(dictionary, rows, **room)
    keep, ways = _choose(dictionary, used, config)
    smaller, m = part(dictionary, keep), dictionary.m
    del dictionary  # its memory is free from here on
    smaller = dataclasses.replace(smaller, typical=typical_activations(smaller, rows, **room))
    after = measure_dictionary(smaller, held, name="after", **room).summary()
    told = {
        "from": str(config.dictionary),
        "before": m,
        "after": smaller.m,
        **ways,
        "usage_rows": used.rows,
        "store_fingerprint": store.fingerprint,
        "heldout_before": before,
        "heldout_after": after,
        "kept": keep.tolist(),
    }
    history = [*smaller.card.get("pruning", ()), told]
    card = smaller.card | {"pruning": history, "metrics": {"split": "validation", **after}}
    path = save_dictionary(dataclasses.replace(smaller, card=card), config.out)
    lines = [
        (name, str(m), *(f"{numbers[key]:.4f}" for key in ("fvu", "fvu_standardized", "ve", "l0")))
        for name, m, numbers in (
            ("before", m, before),
            ("after", smaller.m, after),
        )
    ]
    print_table(("held-out", "atoms", "FVU raw", "standardized", "VE", "L0"), lines)
    print(
        f"dropped {m - smaller.m} of {m} atoms "
        f"({', '.join(f'{count} {name}' for name, count in ways.items())}); held-out FVU "
        f"{before['fvu']:.4f} -> {after['fvu']:.4f}"
    )
    print(f"dictionary: {path}")
    return {**told, "path": str(path)}


def _choose(
    dictionary: Dictionary, used: Usage, config: PruneConfig
) -> tuple[np.ndarray, dict[str, int]]:
    """The atoms that stay, and how many are dropped in each way that is asked for."""
    stays = np.ones(dictionary.m, bool)
    ways: dict[str, int] = {}
    if config.unused:
        stays &= used.fired > 0
        ways["unused"] = int((~stays).sum())
    if config.merge:
        left = np.flatnonzero(stays)
        chosen = merged(dictionary, used, config.merge, among=left)
        ways["merged"] = len(left) - len(chosen)
        stays = np.isin(np.arange(dictionary.m), chosen)
    if config.keep:
        left = np.flatnonzero(stays)
        most = left[np.argsort(-used.energy[left], kind="stable")[: config.keep]]
        ways["least energy"] = len(left) - len(most)
        stays = np.isin(np.arange(dictionary.m), most)
    return np.flatnonzero(stays), ways
