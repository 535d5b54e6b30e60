"""`jaxdict inspect`: what a store, a run or a dictionary holds, as tables, JSON and plots."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from harvest.atomic import write_json
from jaxdict.inspect.config import InspectConfig
from jaxdict.tables import brief, flat, print_table, print_title, print_values

_STORE, _CARD = "zarr.json", "card.json"


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Print what lies at a path.

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
    for file, read in {_STORE: None, **_READERS}.items():
        if (path / file).is_file():
            if read is None:
                return inspect_store(config, str(path))
            _only_path(config, path, *(() if file == _CARD else ("plot",)))
            facts = read(path)
            if config.plot is not None:
                from jaxdict.itda import draw_most_used

                facts["plots"] = [str(draw_most_used(path, config.plot, rows=config.rows))]
            return facts
    if not path.exists():
        raise ValueError(f"expected a store, a run or a dictionary at {path}, but nothing is there")
    known = (_STORE, *_READERS)
    inner = sorted(p.name for p in path.iterdir() if any((p / file).is_file() for file in known))
    hint = f"; try one of its folders: {', '.join(inner)}" if inner else ""
    raise ValueError(
        f"expected a store, a run or a dictionary at {path}, found none of {', '.join(known)}{hint}"
    )


def _only_path(config: InspectConfig, path: Path, *others: str) -> None:
    stores_own = ("sites", "spectrum", "verify", "compare", *others)
    asked = [name for name in stores_own if getattr(config, name)]
    if asked:
        raise ValueError(
            f"--{asked[0]}: expected an activation store, but {path} is none; leave it out"
        )


def _dictionary(path: Path) -> dict[str, Any]:
    card = _json(path / "card.json")
    tensors: dict[str, list[int]] = {}
    try:
        with safe_open(path / "dictionary.safetensors", framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no mapping)
                tensors[name] = list(file.get_slice(name).get_shape())
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"expected tensors in {path / 'dictionary.safetensors'}, got: {error}; export it again"
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
    return {
        "what": "dictionary",
        "path": str(path),
        **facts,
        "tensors": tensors,
        "metrics": metrics,
    }


def _run(path: Path) -> dict[str, Any]:
    config = _json(path / "config.json")
    facts = {key: brief(config[key]) for key in ("verb", "kind") if key in config}
    settings = config.get("config", config)
    lines = []
    if (path / "metrics.jsonl").is_file():
        for text in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                continue  # a last line that a kill cut off
    last: dict[str, dict[str, Any]] = {}
    for line in lines:
        last[str(line.get("kind", ""))] = line
    finished = (path / "summary.json").is_file()
    facts["state"] = "finished" if finished else "unfinished (go on with --resume)"
    print_title(f"{path}: run", facts)
    print_values("settings", dict(flat(settings)))
    for kind, line in last.items():
        print_values(f"last {kind} line".replace("  ", " "), dict(flat(line)))
    summary = dict(flat(_json(path / "summary.json"))) if finished else {}
    print_values("summary", summary)
    result = {"what": "run", "path": str(path), **facts, "config": settings}
    return {**result, "metrics": last, "summary": summary}


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON in {path}, got a damaged file ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(value).__name__}")
    return value


_READERS = {_CARD: _dictionary, "config.json": _run}
