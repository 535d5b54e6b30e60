"""`jaxdict inspect`: what a store, a run or a dictionary holds, as tables, JSON and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from harvest.atomic import read_json, write_json
from jaxdict.dictionary import CARD_FILE, TENSORS_FILE
from jaxdict.inspect.config import InspectConfig
from jaxdict.runs import CONFIG, METRICS, SUMMARY, read_lines
from jaxdict.tables import brief, flat, print_table, print_title, print_values

_STORE_FILE = "zarr.json"
_NEED_STORE = ("sites", "spectrum", "verify", "compare")
"""Flags that only an activation store can answer."""


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Print what a store, a run or a dictionary holds.

    Args:
        config: the path, and what else is to be shown of a store.

    Returns:
        what was printed, as JSON-able values: `what` (store, run or dictionary) and its facts.

    Raises:
        ValueError: nothing that jaxdict writes is there, or it is damaged; if --verify found
            a problem, or --compare cannot compare.
    """
    from jaxdict.inspect.store import make_folder

    facts = _inspect(config)
    if config.out is not None:
        make_folder(config.out.parent, "out")
        write_json(config.out, facts)
        print(f"\nJSON: {config.out}")
    problems = facts.get("problems")
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ValueError(f"found {count} in {config.path}; the first: {problems[0]}")
    return facts


def _inspect(config: InspectConfig) -> dict[str, Any]:
    from jaxdict.inspect.store import inspect_store

    if "://" in str(config.path):
        return inspect_store(config, str(config.path))
    path = Path(config.path)
    if path.is_file():
        path = path.parent
    if (path / _STORE_FILE).is_file():
        return inspect_store(config, str(path))
    if (path / CARD_FILE).is_file():
        return _inspect_dictionary(config, path)
    if (path / CONFIG).is_file():
        return _inspect_run(config, path)
    if not path.exists():
        raise ValueError(f"expected a store, a run or a dictionary at {path}, but nothing is there")
    known = (_STORE_FILE, CARD_FILE, CONFIG)
    inner = sorted(p.name for p in path.iterdir() if any((p / file).is_file() for file in known))
    hint = f"; try one of its folders: {', '.join(inner)}" if inner else ""
    raise ValueError(
        f"expected a store, a run or a dictionary at {path}, found none of {', '.join(known)}{hint}"
    )


def _refuse(config: InspectConfig, path: Path, flags: Sequence[str]) -> None:
    """Raise ValueError if a flag is given that needs an activation store."""
    asked = [name for name in flags if getattr(config, name)]
    if asked:
        raise ValueError(
            f"--{asked[0]}: expected an activation store, but {path} is none; leave it out"
        )


def _inspect_dictionary(config: InspectConfig, path: Path) -> dict[str, Any]:
    _refuse(config, path, _NEED_STORE)
    card = read_json(path / CARD_FILE)
    tensors: dict[str, list[int]] = {}
    try:
        with safe_open(path / TENSORS_FILE, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                tensors[name] = list(file.get_slice(name).get_shape())
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"expected tensors in {path / TENSORS_FILE}, got: {error}; export it again"
        ) from error
    keys = ("kind", "d", "m", "k", "site", "normalization", "store_fingerprint", "folding_error")
    facts = {key: brief(card[key]) for key in keys if key in card}
    model = card.get("model")
    if model is not None:
        facts["model"] = model.get("name") if isinstance(model, dict) else model
    print_title(f"{path}: dictionary", facts)
    print_table(("tensor", "shape"), [(n, " x ".join(map(str, s))) for n, s in tensors.items()])
    metrics = dict(flat(card.get("metrics") or {}))
    print_values("metrics", metrics)
    result = {"what": "dictionary", "path": str(path), **facts}
    result |= {"tensors": tensors, "metrics": metrics}
    if config.plot is not None:
        from jaxdict.itda import draw_most_used

        result["plots"] = [str(draw_most_used(path, config.plot, rows=config.rows))]
    return result


def _inspect_run(config: InspectConfig, path: Path) -> dict[str, Any]:
    _refuse(config, path, (*_NEED_STORE, "plot"))
    description = read_json(path / CONFIG)
    facts = {key: brief(description[key]) for key in ("verb", "kind") if key in description}
    settings = description.get("config", description)
    last = {str(line.get("kind", "")): line for line in read_lines(path / METRICS)}
    finished = (path / SUMMARY).is_file()
    facts["state"] = "finished" if finished else "unfinished (go on with --resume)"
    print_title(f"{path}: run", facts)
    print_values("settings", dict(flat(settings)))
    for kind, line in last.items():
        print_values(f"last {kind} line".replace("  ", " "), dict(flat(line)))
    summary = dict(flat(read_json(path / SUMMARY))) if finished else {}
    print_values("summary", summary)
    result = {"what": "run", "path": str(path), **facts, "config": settings}
    return {**result, "metrics": last, "summary": summary}
