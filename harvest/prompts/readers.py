"""Readers of prompts: text, JSON lines and lists, CSV, TSV, COCO captions, Parquet, and data sets of the hub.

One rule for all: a row whose prompt is missing or blank is given as None, for the caller to count; labels are
an object from attributes to texts or numbers, and anything else called `labels` is left alone.
"""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from harvest.prompts.text import canonical, half_surrogate, lines_of

COLUMN = "prompt"
FILE_KINDS = ".txt, .jsonl, .csv, .tsv, .parquet or .json file"
"""The files of `FILES`, for messages."""
_OTHER_COLUMNS = ("caption", "text")
_LONGEST = 2**31 - 1
"""Characters that a field of a table may have; the csv module's own limit is 131,072."""


class Prompt(NamedTuple):
    """A prompt and the ground truth about its picture.

    Attributes:
        text: the prompt itself.
        labels: attribute -> values, for example `{"colour": ["red"]}`; `{}` where unknown.
        seed: seed of its picture's noise, which `steer-eval` takes from JSON objects; None where there is none.
    """

    text: str
    labels: dict[str, list[str]]
    seed: int | None = None


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
    # The hub, the network and each file format raise errors of their own.
    except Exception as error:
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
    """The column that holds the prompts; upper and lower case matter only where two names differ in them."""
    alike = [name for name in names if name.lower() == wanted.lower()]
    others = [name for name in names if name.lower() in _OTHER_COLUMNS]
    if wanted in names:
        return wanted
    if len(alike) == 1:
        return alike[0]
    if wanted == COLUMN and not alike and len(others) == 1:
        return others[0]
    raise ValueError(
        f"expected a column {wanted!r} in {where}, got {', '.join(names) or 'none'}; "
        "name the one with the prompts by --prompt-column"
    )


def _read_txt(path: Path, column: str) -> Iterator[Prompt | None]:
    for line in lines_of(path):
        yield Prompt(line.strip(), {}) if canonical(line) else None


def _read_jsonl(path: Path, column: str) -> Iterator[Prompt | None]:
    known = ""
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        wanted = f"expected {where} to be an object with a text {known or column!r}"
        entry = _json(line, wanted)
        if isinstance(entry, str):
            yield _row({column: entry}, column, where)
            continue
        if not isinstance(entry, dict):
            raise ValueError(f"{wanted}, got {line.strip()[:80]}")
        known = known or _column(list(entry), column, where)
        if known not in entry:
            raise ValueError(f"{wanted}, got {line.strip()[:80]}")
        yield _row(entry, known, where)


def _read_json(path: Path, column: str) -> Iterator[Prompt | None]:
    """A list of objects or texts, or COCO's captions: `{"annotations": [{"caption": ...}, ...]}`."""
    content = _json("".join(lines_of(path)), f"expected prompts in {path}")
    coco = isinstance(content, dict)
    entries = content.get("annotations") if coco else content
    if not isinstance(entries, list) or not all(isinstance(one, dict | str) for one in entries):
        named = ", ".join(content) or "an empty object" if coco else type(content).__name__
        raise ValueError(
            f"expected a list of objects or texts in {path}, or COCO captions, a list under 'annotations', "
            f"got {named}; name a .jsonl file for an object a line"
        )
    for number, one in enumerate(entries, 1):
        where = f"{'annotation' if coco else 'entry'} {number} of {path}"
        entry = {column: one} if isinstance(one, str) else one
        yield _row(entry, _column(list(entry), column, where), where)


def _json(text: str, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # digits and depth have limits of their own
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise ValueError(f"{wanted}, got no JSON that can be read ({reason})") from error


def _read_table(path: Path, column: str, *, delimiter: str) -> Iterator[Prompt | None]:
    rows = _table_rows(lines_of(path, newline=""), path, delimiter)
    _, names = next(rows, (1, []))
    column = _column(names, column, str(path))
    for line, row in rows:
        if any(row[len(names) :]):
            raise ValueError(
                f"expected at most {len(names)} fields in line {line} of {path}, as in its header, "
                f"got {len(row)}; put a prompt that holds the separator in quotes"
            )
        entry = dict(zip(names, row, strict=False))
        labels = {name: value for name, value in entry.items() if name != column and value}
        yield _row({column: entry.get(column), "labels": labels}, column, f"line {line} of {path}")


def _table_rows(file: Iterable[str], path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, with the number of the line in which each begins."""
    csv.field_size_limit(_LONGEST)
    rows = csv.reader(file, delimiter=delimiter, strict=True)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(
                f"expected a row in line {line} of {path}, got a quote there that does not close before "
                f"a separator or the end of the file ({error}); close it, or double a quote inside quotes"
            ) from error
        if row:
            yield line, row


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
        f"check its name and the network, or name a {FILE_KINDS}"
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
    if text is None or (isinstance(text, str) and not canonical(text)):
        return None
    if not isinstance(text, str):
        raise ValueError(
            f"expected the column {column!r} to hold text, got {type(text).__name__} in {where}; "
            "name the one with the prompts by --prompt-column"
        )
    if (place := half_surrogate(text)) is not None:
        raise ValueError(
            f"expected text in {where}, got half of a surrogate pair (U+{ord(text[place]):04X}) at its "
            f"character {place}; write the whole character, or leave it out"
        )
    seed = row.get("seed")
    seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else None
    if not isinstance(labels, dict):  # a data set's own labels, such as class numbers
        return Prompt(text, {}, seed)
    known = {name: value for name, value in labels.items() if value is not None}
    return Prompt(text, _labels(known, f"expected {where} to hold a text {column!r}"), seed)


def _labels(labels: Mapping[str, Any], wanted: str) -> dict[str, list[str]]:
    lists = {k: v if isinstance(v, list) else [v] for k, v in labels.items()}
    for value in (value for values in lists.values() for value in values):
        broken = isinstance(value, str) and half_surrogate(value) is not None
        if broken or not isinstance(value, str | int | float):
            raise ValueError(f"{wanted} and labels that are texts or numbers, got {value!r}")
    return {
        name: [value if isinstance(value, str) else json.dumps(value) for value in values]
        for name, values in lists.items()
    }


FILES: dict[str, Callable[[Path, str], Iterator[Prompt | None]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""Suffix -> reader(path, column), which gives the prompts; None where a row holds none."""
