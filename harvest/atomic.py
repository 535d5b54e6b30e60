"""Files and folders that are there as a whole or not at all: written under another name, then moved into place."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SUFFIX = ".tmp"
"""How the name of what is still being written ends; it begins with a dot."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a file to write, which takes the place of `path` when the block ends well.

    If the block raises, what it wrote is removed and `path` is left as it was.
    """
    draft = path.with_name(f".{path.name}{SUFFIX}")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which takes the place of `path` when the block ends well.

    If the block raises, the new folder is removed and `path` is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=SUFFIX, dir=path.parent))
    try:
        yield draft
        draft.chmod(0o755)
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


def write_text(path: Path, text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all; the path."""
    with whole_file(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def write_json(path: Path, value: Any, *, indent: int = 2, allow_nan: bool = True) -> Path:
    """Write JSON, whole or not at all; what JSON has no form for, such as a path, becomes its text.

    Args:
        path: Its file.
        value: What to write.
        indent: Spaces a level.
        allow_nan: Write NaN and infinity, which strict readers refuse, rather than raise.

    Returns:
        The path.

    Raises:
        ValueError: If a number is not finite and `allow_nan` is off.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan, default=str)
    return write_text(path, text + "\n")
