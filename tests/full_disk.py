"""A disk that is full: files may not grow beyond some bytes, which every writer meets as it meets a full disk."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from jaxdict import cli


@contextmanager
def full_beyond(size: int) -> Iterator[None]:
    """Writes beyond the first `size` bytes of a file fail, in this process and while this lasts."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def refused(words: list[str], size: int, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line in which a verb says that its files have no room; it ends with status 2."""
    capsys.readouterr()
    with full_beyond(size), pytest.raises(SystemExit) as ended:
        cli.main(words)
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert "Traceback" not in said, said
    assert said.count("jaxdict: ") == 1, said
    line = said.partition("jaxdict: ")[2].strip()
    assert "\n" not in line, line
    assert "File too large" in line or "No space left" in line, line
    return line


def everything(folder: Path) -> set[Path]:
    """Every file and folder below a folder."""
    return set(folder.rglob("*"))
