"""Text of files as people have them, and when two texts are the same prompt."""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Iterator
from pathlib import Path

_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_WIDTH = dict.fromkeys(map(ord, "\u200b\u2060\ufeff"))
"""Zero-width space, word joiner, byte-order mark: they join or part nothing that can be seen."""


def lines_of(path: Path, newline: str | None = None) -> Iterator[str]:
    r"""Lines of a text file, each with its end: UTF-8, or UTF-16 with a byte-order mark.

    A line ends at \n, \r\n or \r and nowhere else, whatever Unicode calls a line separator.

    Args:
        path: the file.
        newline: as `open` takes it; "" leaves each line's end as it is.

    Yields:
        a line, as it is read.

    Raises:
        ValueError: a byte is not of the encoding (naming its position), or there are NUL characters.
    """
    encoding = _encoding(path)
    try:
        with path.open(encoding=encoding, newline=newline) as lines:
            for number, line in enumerate(lines, 1):
                if "\0" in line:
                    raise ValueError(
                        f"expected {path} to be text, got a NUL character in line {number}; save it as "
                        "UTF-8, or as UTF-16 with a byte-order mark"
                    )
                yield line
    except UnicodeDecodeError as error:
        raise ValueError(_no_text(path, encoding, error)) from error


def canonical(prompt: str) -> str:
    """A prompt in the form in which equal prompts are equal.

    Texts that differ in the amount of white space, in how accents are composed (Unicode's canonical
    equivalence) or in characters of no width that join nothing are one prompt.
    """
    return " ".join(unicodedata.normalize("NFC", prompt).translate(_NO_WIDTH).split())


def half_surrogate(text: str) -> int | None:
    """Where a text has half of a surrogate pair, which no encoding can write; None for text as it should be."""
    return next((i for i, one in enumerate(text) if "\ud800" <= one <= "\udfff"), None)


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(4)
    if start in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        raise ValueError(f"expected {path} to be UTF-8 or UTF-16, got UTF-32; save it as UTF-8")
    return next((name for mark, name in _MARKS.items() if start.startswith(mark)), "utf-8")


def _no_text(path: Path, encoding: str, error: UnicodeDecodeError) -> str:
    """Which byte of a file is wrong, whose text was read in pieces."""
    data = path.read_bytes()
    try:
        data.decode(encoding)
    except UnicodeDecodeError as whole:
        error = whole
    byte, kind = data[error.start], "UTF-16" if encoding == "utf-16" else "UTF-8"
    return (
        f"expected {path} to be {kind} text, got {error.reason} at byte {error.start} (0x{byte:02x}, counted "
        "from 0); save it as UTF-8, or as UTF-16 with a byte-order mark"
    )
