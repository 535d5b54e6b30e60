"""Readers of prompts: text, JSON lines, CSV, Parquet, and data sets of the hub, all row by row."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

COLUMN = "prompt"
_OTHER_COLUMNS = ("caption", "text")


class Prompt(NamedTuple):
    """A prompt and the ground truth about its picture.

    Attributes:
        text: the prompt itself.
        labels: attribute -> values, for example `{"colour": ["red"]}`; `{}` where unknown.
    """

    text: str
    labels: dict[str, list[str]]


def read_dataset(source: str, column: str) -> Iterator[Prompt | None]:
    """Stream a data set, downloading only what is read.

    Args:
        source: `owner/name/config:split`, the last two optional, or a folder.
        column: the one with the prompts; the default finds others too, as in `read_prompts`.

    Yields:
        a prompt for each row; None where it is empty.

    Raises:
        ValueError: there is no such data set, split or column, or it is unreachable.
    """
    datasets = _package("datasets", f"reading {source}")
    name, config, split = _dataset_name(source)
    try:
        splits = datasets.load_dataset(name, config, streaming=True)
        data = splits.get(split or ("train" if len(splits) > 1 else next(iter(splits), "")))
        names = None if data is None else data.column_names or list(next(iter(data), {}))
    except (
        Exception
    ) as error:  # the hub, the network and each file format raise errors of their own
        raise ValueError(_unreachable(source, error)) from error
    if data is None or names is None:
        raise ValueError(
            f"expected a split {split or 'train'!r} in {source}, got {', '.join(splits)}; "
            f"name one of them, such as hf:{source.rpartition(':')[0] or source}:{next(iter(splits), 'test')}"
        )
    column = _column(names, column, source)
    chosen = [column, *(["labels"] if "labels" in names and column != "labels" else ())]
    rows = iter(data.select_columns(chosen))  # pictures beside the prompts are not decoded
    with tqdm(desc=f"prompts of {source}", unit=" rows", delay=2) as bar:
        while True:
            try:
                row = next(rows, None)
            except Exception as error:
                raise ValueError(_unreachable(source, error)) from error
            if row is None:
                return
            bar.update()
            yield _row(row, column, f"row {bar.n} of {source}")


def _column(names: Sequence[str], wanted: str, where: str) -> str:
    """The column that holds the prompts."""
    others = [name for name in _OTHER_COLUMNS if name in names]
    if wanted in names:
        return wanted
    if wanted == COLUMN and len(others) == 1:
        return others[0]
    raise ValueError(
        f"expected a column {wanted!r} in {where}, got {', '.join(names) or 'none'}; "
        "name the one with the prompts by --prompt-column"
    )


def _read_txt(path: Path, column: str) -> Iterator[Prompt]:
    with path.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if line.strip():
                yield Prompt(line.strip(), {})


def _read_jsonl(path: Path, column: str) -> Iterator[Prompt]:
    known = ""
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            wanted = (
                f"expected line {number} of {path} to be an object with a text {known or column!r}"
            )
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{wanted}, got no JSON ({error.msg})") from error
            if not isinstance(entry, dict):
                raise ValueError(f"{wanted}, got {line.strip()[:80]}")
            known = known or _column(list(entry), column, f"line {number} of {path}")
            if not isinstance(entry.get(known), str):
                raise ValueError(f"{wanted}, got {line.strip()[:80]}")
            yield Prompt(entry[known], _labels(entry.get("labels") or {}, wanted))


def _read_csv(path: Path, column: str) -> Iterator[Prompt]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        column = _column(rows.fieldnames or (), column, str(path))
        for row in rows:
            if not (row[column] or "").strip():
                raise ValueError(f"expected a prompt in line {rows.line_num} of {path}, got none")
            others = {k: [v] for k, v in row.items() if k and k != column and v}
            yield Prompt(row[column].strip(), others)


def _read_parquet(path: Path, column: str) -> Iterator[Prompt | None]:
    pyarrow, parquet = (
        _package(name, f"reading {path}") for name in ("pyarrow", "pyarrow.parquet")
    )
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            column = _column(names, column, str(path))
            chosen = [column, *(["labels"] if "labels" in names and column != "labels" else ())]
            number = 0
            for batch in file.iter_batches(columns=chosen):
                for row in batch.to_pylist(maps_as_pydicts="strict"):
                    number += 1
                    yield _row(row, column, f"row {number} of {path}")
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"expected {path} to be a Parquet file, got {_line(error)}") from error


def _dataset_name(source: str) -> tuple[str, str | None, str]:
    """Split `owner/name/config:split`, or a folder, into (name, config, split)."""
    if Path(source).is_dir():
        return source, None, ""
    name, _, split = source.partition(":")
    if Path(name).is_dir():
        return name, None, split
    owner, _, rest = name.partition("/")
    rest, _, config = rest.partition("/")
    return f"{owner}/{rest}" if rest else owner, config or None, split


def _unreachable(source: str, error: Exception) -> str:
    return (
        f"expected a data set of the hub, or a folder of one, at {source}, got {_line(error)}; "
        "check its name and the network, or name a .txt, .jsonl, .csv or .parquet file"
    )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _package(name: str, purpose: str) -> Any:
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{purpose} needs the package {package}; run: pip install 'jaxdict[data]'"
        ) from error


def _row(row: Mapping[str, Any], column: str, where: str) -> Prompt | None:
    """A row of a table; None if it holds no prompt."""
    text, labels = row[column], row.get("labels") if column != "labels" else None
    if text is None or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str):
        raise ValueError(
            f"expected the column {column!r} to hold text, got {type(text).__name__} in {where}; "
            "name the one with the prompts by --prompt-column"
        )
    if not isinstance(labels, dict):  # a data set's own labels, such as class numbers
        return Prompt(text, {})
    known = {name: value for name, value in labels.items() if value is not None}
    return Prompt(text, _labels(known, f"expected {where} to hold a text {column!r}"))


def _labels(labels: Any, wanted: str) -> dict[str, list[str]]:
    if not isinstance(labels, dict):
        raise ValueError(f"{wanted} and 'labels' from attributes to values, got {labels!r}")
    lists = {k: v if isinstance(v, list) else [v] for k, v in labels.items()}
    if not all(isinstance(value, str) for values in lists.values() for value in values):
        raise ValueError(f"{wanted} and labels that are texts, got {labels!r}")
    return lists


FILES = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
"""Suffix -> reader(path, column), which gives the prompts; None where a row holds none."""
