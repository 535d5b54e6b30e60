"""`jaxdict export`: a run becomes a dictionary that acts on raw rows."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from harvest.store import Store, open_store
from jaxdict.dictionary import Dictionary, save_dictionary
from jaxdict.export.config import ExportConfig
from jaxdict.export.fold import fold, folding_error
from jaxdict.itda import run_to_dictionary
from jaxdict.metrics import measure_dictionary, typical
from jaxdict.rows import Source, source_of, stream_of
from jaxdict.runs import SUMMARY, read_json, read_run
from jaxdict.training import read_sae


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
    description = read_run(config.run)
    place = config.store or Path(description["store"]["path"])
    store = open_store(place)
    wanted = description["store"].get("fingerprint")
    if wanted is not None and wanted != store.fingerprint:
        raise ValueError(
            f"expected the store the run was trained on (fingerprint {wanted}), got {place} "
            f"({store.fingerprint}); name it with --store"
        )
    settings = description["config"]
    steps = tuple(settings.get("steps") or ())
    rows = source_of(store, settings["site"], steps=steps).spread(config.rows)
    if description.get("kind") == "itda":
        dictionary = run_to_dictionary(config.run)
    else:
        dictionary = _fold_run(config.run, description, store, rows, config.checkpoint)
    if dictionary.typical is None or not dictionary.typical.any():
        dictionary = dataclasses.replace(dictionary, typical=typical(dictionary, rows))
    card = dict(dictionary.card)
    if "metrics" not in card and len(store.indices("validation")):
        held = source_of(store, settings["site"], split="validation", steps=steps)
        held, other = held.spread(config.rows), None
        if settings.get("target"):
            other = held.beside(settings["target"])
        measured = measure_dictionary(dictionary, held, name="held-out", target=other)
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


def _fold_run(
    run: Path, description: dict[str, Any], store: Store, rows: Source, checkpoint: str
) -> Dictionary:
    params, fitted, config, slots, step = read_sae(run, description, checkpoint=checkpoint)
    dictionary = fold(
        params,
        fitted.site,
        slots,
        kind=config.kind,
        target=fitted.target,
        target_site=config.target or None,
    )
    summary, other = run / SUMMARY, None
    if config.target:
        other = rows.beside(config.target)
    card = {
        "site": config.site,
        **({"target": config.target} if config.target else {}),
        "stream": stream_of(config.site),
        "model": store.attrs.get("model"),
        "store_fingerprint": store.fingerprint,
        "normalization": {
            "kind": config.normalize,
            "rows": fitted.site.rows,
            "folded": True,
        },
        "folding_error": folding_error(
            dictionary, params, fitted.site, rows, target=fitted.target, target_rows=other
        ),
        "training": {
            "rows": step * config.batch,
            "finished": step == description["resolved"]["steps"],
            **(read_json(summary)["training"] if summary.is_file() else {}),
        },
        "config": description["config"],
        "resolved": description["resolved"],
        "versions": description["versions"],
    }
    return dataclasses.replace(dictionary, card=card)
