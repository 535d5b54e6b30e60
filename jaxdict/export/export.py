"""`jaxdict export`: a run becomes a dictionary that acts on raw rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harvest.atomic import read_json
from harvest.store import as_it_was, expect_from, open_store, print_growth, stream_of
from jaxdict.dictionary import Dictionary, save_dictionary
from jaxdict.export.config import MEMORY_MB, ExportConfig
from jaxdict.export.fold import fold, folding_error
from jaxdict.flags import flatten
from jaxdict.itda import run_to_dictionary
from jaxdict.metrics import measure_dictionary, typical_activations
from jaxdict.rows import Source, source_of
from jaxdict.runs import SUMMARY, read_run
from jaxdict.training import Trained, read_sae


def export(config: ExportConfig) -> dict[str, Any]:
    """Export a run.

    Args:
        config: settings.

    Returns:
        The dictionary's card, with `path`.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the run cannot be read, has no checkpoint, or the store is another one.
        FileExistsError: --out holds something that is not a dictionary.
    """
    description = read_run(config.run, verify=config.verify)
    place = config.store or Path(description["store"]["path"])
    store = open_store(place)
    wanted = description["store"].get("fingerprint")
    if wanted is not None:
        held = expect_from(store, wanted, f"the run in {config.run}")
        print_growth(store, held, f"the run in {config.run}")
        store = as_it_was(store, held)
    settings = description["config"]
    every = flatten(settings)
    taken = {
        "steps": tuple(every.get("steps") or ()),
        "padding": every.get("padding", "keep"),
    }
    rows = source_of(store, settings["site"], **taken).spread(config.rows)
    dictionary = _read(config, description, rows)
    if dictionary.typical is None or not dictionary.typical.any():
        means = typical_activations(dictionary, rows, memory_mb=MEMORY_MB)
        dictionary = dataclasses.replace(dictionary, typical=means)
    card = dict(dictionary.card)
    if "metrics" not in card and len(store.indices("validation")):
        held = source_of(store, settings["site"], split="validation", **taken)
        measured = measure_dictionary(
            dictionary, held.spread(config.rows), name="held-out", memory_mb=MEMORY_MB
        )
        card["metrics"] = {"split": "validation", **measured.summary()}
    dictionary = dataclasses.replace(dictionary, card=card)
    path = save_dictionary(dictionary, config.out)
    error = card.get("folding_error")
    if error:
        print(f"folding error: {error['relative']:.1e} of the rows' deviation (root mean square)")
    if "metrics" in card:
        numbers = card["metrics"]
        print(f"held-out FVU of the dictionary: {numbers['fvu']:.4f} raw, L0 {numbers['l0']:.2f}")
    print(f"dictionary: {path}")
    facts = {"kind": dictionary.kind, "d": dictionary.d, "m": dictionary.m, "k": int(dictionary.k)}
    return {**facts, **card, "path": str(path)}


def _read(config: ExportConfig, description: dict[str, Any], rows: Source) -> Dictionary:
    """The dictionary of a run; of what it was made of nothing stays in memory."""
    if description.get("kind") == "itda":
        return run_to_dictionary(config.run, verify=config.verify)
    trained = read_sae(config.run, description, checkpoint=config.checkpoint, verify=config.verify)
    return _fold_run(config, description, trained, rows)


def _fold_run(
    asked: ExportConfig, description: dict[str, Any], trained: Trained, rows: Source
) -> Dictionary:
    """The dictionary of a run of `train sae`, with its card."""
    params, fitted, config, slots, step = trained
    store, summary = rows.store, asked.run / SUMMARY
    dictionary = fold(
        params,
        fitted.site,
        slots,
        kind=config.model.kind,
        target=fitted.target,
        target_site=config.target or None,
    )
    card = {
        "site": config.site,
        **({"target": config.target} if config.target else {}),
        "stream": stream_of(config.site),
        "padding": config.data.padding,
        "model": store.attrs.get("model"),
        "store_fingerprint": store.fingerprint,
        "normalization": {
            "kind": config.data.normalize,
            "rows": fitted.site.rows,
            "folded": True,
        },
        "folding_error": folding_error(
            dictionary,
            params,
            rows,
            normalization=fitted.site,
            target=fitted.target,
        ),
        "training": {
            "rows": step * config.data.batch,
            "finished": step * config.data.batch >= config.data.rows,
            **(read_json(summary, verify=asked.verify)["training"] if summary.is_file() else {}),
        },
        "config": description["config"],
        **({"init_from": description["init_from"]} if "init_from" in description else {}),
        "resolved": description["resolved"],
        "versions": description["versions"],
    }
    return dataclasses.replace(dictionary, card=card)
