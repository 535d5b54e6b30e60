"""`jaxdict inspect`: what a store, a run or a dictionary holds, as a table. Reads headers, not data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from harvest.store import open_store
from jaxdict.config import InspectConfig

_DEEPEST = 40


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Print what lies at a path.

    Args:
        config: The path.

    Returns:
        What was printed, as JSON-able values: ``what`` (store, run or dictionary) and its facts.

    Raises:
        ValueError: If nothing that jaxdict writes is there, or it is damaged.
    """
    path = config.path
    if path.is_file():
        path = path.parent
    for file, read in _READERS.items():
        if (path / file).is_file():
            return read(path)
    if not path.exists():
        raise ValueError(f"expected a store, a run or a dictionary at {path}, but nothing is there")
    inner = sorted(p.name for p in path.iterdir() if any((p / file).is_file() for file in _READERS))
    hint = f"; try one of its folders: {', '.join(inner)}" if inner else ""
    raise ValueError(
        f"expected a store, a run or a dictionary at {path}, found none of {', '.join(_READERS)}{hint}"
    )


def _store(path: Path) -> dict[str, Any]:
    store = open_store(path)
    done, model, own = int(store.done.sum()), store.attrs.get("model", {}), store.attrs
    counts = {name: len(store.indices(name)) for name in ("train", "validation")}
    facts = {
        "model": _join(model.get("name"), model.get("dtype"), _unless(model.get("quantization"))),
        "images": f"{done} of {store.images} done"
        + (f" ({counts['train']} train, {counts['validation']} validation)" if done else ""),
        "steps": f"{store.steps}, sigma {_numbers(store.sigmas)}",
        "tokens": f"{store.grid[0]} x {store.grid[1]} image"
        + (f", {own['words']} text" if own.get("words") else ""),
        "pictures": "none" if own["picture"] is None else "{} x {} pixels".format(*own["picture"]),
        "guidance": own.get("guidance"),
        "seed": own.get("config", {}).get("seed"),
        "fingerprint": store.fingerprint[:16],
    }
    sites: dict[str, dict[str, Any]] = {}
    for site in store.sites:
        shape = store.shape(site)
        _, steps, tokens, d = shape
        rows = done * steps * tokens
        norm = store.statistics(site).norm if done else None
        sites[site] = {"shape": list(shape), "rows": rows, "bytes": rows * d * 2, "rms norm": norm}
    _title(f"{path}: activation store", facts)
    _table(
        ("site", "image x step x token x d", "rows", "size", "rms norm"),
        [
            (
                site,
                " x ".join(map(str, fact["shape"])),
                f"{fact['rows']:,}",
                _size(fact["bytes"]),
                "-" if fact["rms norm"] is None else f"{fact['rms norm']:.4g}",
            )
            for site, fact in sites.items()
        ],
    )
    if done < store.images:
        print("\n  unfinished: run the same harvest command again to go on")
    return {"what": "store", "path": str(path), "done": done, **facts, "sites": sites}


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
    facts = {key: _brief(card[key]) for key in keys if key in card}
    model = card.get("model")
    if model is not None:
        facts["model"] = model.get("name") if isinstance(model, dict) else model
    _title(f"{path}: dictionary", facts)
    _table(("tensor", "shape"), [(n, " x ".join(map(str, s))) for n, s in tensors.items()])
    metrics = dict(_flat(card.get("metrics") or {}))
    _values("metrics", metrics)
    return {
        "what": "dictionary",
        "path": str(path),
        **facts,
        "tensors": tensors,
        "metrics": metrics,
    }


def _run(path: Path) -> dict[str, Any]:
    config = _json(path / "config.json")
    facts = {key: _brief(config[key]) for key in ("verb", "kind") if key in config}
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
    _title(f"{path}: run", facts)
    _values("settings", dict(_flat(settings)))
    for kind, line in last.items():
        _values(f"last {kind} line".replace("  ", " "), dict(_flat(line)))
    summary = dict(_flat(_json(path / "summary.json"))) if finished else {}
    _values("summary", summary)
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


def _flat(value: Mapping[str, Any], name: str = "") -> Iterable[tuple[str, Any]]:
    """Nested values under dotted names; long lists are told by their length."""
    for key, inner in value.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(inner, Mapping):
            yield from _flat(inner, path)
        else:
            yield path, inner


def _brief(value: Any) -> Any:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_brief(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        text = ", ".join(str(_brief(inner)) for inner in value)
        return text if len(text) <= _DEEPEST else f"{len(value)} values"
    return value


def _title(title: str, facts: Mapping[str, Any]) -> None:
    print(title)
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        if value is not None and value != "":
            print(f"  {name:<{width}}  {value}")


def _values(title: str, values: Mapping[str, Any]) -> None:
    if values:
        print(f"\n  {title}")
        width = max(len(name) for name in values)
        for name, value in values.items():
            print(f"    {name:<{width}}  {_brief(value)}")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print()
    for row in (head, *rows):
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  " + "  ".join([f"{row[0]:<{widths[0]}}", *cells]).rstrip())


def _join(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part)


def _unless(quantization: str | None) -> str | None:
    return None if quantization == "none" else quantization


def _numbers(values: Iterable[float]) -> str:
    texts = [f"{value:.3g}" for value in values]
    return " ".join(texts if len(texts) <= 8 else [*texts[:3], "...", *texts[-2:]])


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


_READERS = {"zarr.json": _store, "card.json": _dictionary, "config.json": _run}
