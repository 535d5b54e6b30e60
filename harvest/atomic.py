"""Files and folders written whole or not at all: under another name first, then moved into place."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harvest.hashing import NAME, hash_json

SUFFIX = ".tmp"
"""Ending of the names of files and folders that are still being written; they begin with a dot."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which takes the place of `path` when the block ends well.

    If the block raises, what it wrote is removed and `path` is left as it was. The file gets the
    permissions that the umask gives a new file, whatever wrote it. A symbolic link stays one: the file
    that it leads to is replaced.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path  # a pipe or a device, whose place no file may take
        return
    draft = path.with_name(f".{path.name}{SUFFIX}")
    try:
        mode = _new_mode(draft)
        yield draft
        _set_mode(draft, mode)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which takes the place of `path` when the block ends well.

    If the block raises, the new folder is removed and `path` is left as it was. The folder and its
    files get the permissions that the umask gives new ones, whatever wrote them.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}{SUFFIX}")
    draft.mkdir()
    try:
        mode = draft.stat().st_mode & 0o666
        yield draft
        for folder, _, files in os.walk(draft):
            for name in files:
                _set_mode(Path(folder, name), mode)
        if path.exists():
            # os.replace cannot put a folder over a non-empty one: step the old one aside first.
            aside = draft.with_suffix(".old")
            os.replace(path, aside)
            try:
                os.replace(draft, path)
            except BaseException:
                os.replace(aside, path)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(draft, path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _new_mode(path: Path) -> int:
    """Permissions of a new file at `path`, found by making one and removing it.

    `os.umask` tells them only by changing them, for every thread of the process.
    """
    path.unlink(missing_ok=True)
    with path.open("xb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    path.unlink()
    return mode


def _set_mode(path: Path, mode: int) -> None:
    """Some writers make their files readable by their owner alone (safetensors does)."""
    if path.stat().st_mode & 0o777 != mode:
        path.chmod(mode)


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all; the path."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write_json(
    path: Path, value: Any, *, indent: int = 2, allow_nan: bool = True, hashed: bool = False
) -> Path:
    """Write JSON, whole or not at all; what JSON has no form for, such as a path, becomes its text.

    Args:
        path: its file.
        value: what to write.
        indent: spaces a level.
        allow_nan: write NaN and infinity, which strict readers refuse, rather than raise.
        hashed: add the hash of an object's values, which `read_json` checks, under `xxh3_128`.

    Returns:
        The path.

    Raises:
        ValueError: a number is not finite and `allow_nan` is off.
    """

    def text_of(value: Any) -> str:
        return json.dumps(
            value, indent=indent, ensure_ascii=False, allow_nan=allow_nan, default=str
        )

    text = text_of(value)
    if hashed:
        text = text_of(with_hash(json.loads(text)))
    return write_text(path, text + "\n")


def with_hash(facts: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of its values added, in place of one that it has."""
    facts = {name: value for name, value in facts.items() if name != NAME}
    return facts | {NAME: hash_json(facts)}


def read_json(path: Path, *, encoding: str = "utf-8", verify: bool = True) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: its file.
        encoding: of its text.
        verify: whether the values have to be those that a hash in the file was made of.

    Returns:
        What it holds, by name, without the hash.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, changed since it was written, or something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding=encoding))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"expected JSON in {path}, got a damaged file ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object in {path}, got {type(value).__name__}")
    expected = value.pop(NAME, None)
    if verify and expected is not None and (found := hash_json(value)) != expected:
        raise ValueError(
            f"{path} is damaged or was edited: expected values with the hash {expected}, got {found}; "
            f"copy it again, or take its line {NAME} out if the change was meant"
        )
    return value
