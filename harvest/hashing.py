"""Hashes of contents, by which a changed byte is noticed: XXH3 of 128 bits, as 32 hex digits.

They find what a disk or a copy has damaged; against somebody who means harm they are no protection.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

NAME = "xxh3_128"
"""The hash, by its name in xxHash; it is written beside the digits."""
_PIECE = 4 << 20


def hasher() -> xxhash.xxh3_128:
    """A hash that is fed piece by piece with `update` and read with `hexdigest`."""
    return xxhash.xxh3_128()


def hash_bytes(data: bytes | bytearray | memoryview) -> str:
    """The hash of bytes, or of a contiguous array's memory."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_file(path: Path) -> str:
    """The hash of a file's content, read in pieces of a few MB."""
    found, piece = hasher(), memoryview(bytearray(_PIECE))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            found.update(piece[:count])
    return found.hexdigest()


def hash_json(value: Any) -> str:
    """The hash of JSON's values, whatever the order of their names and the white space between them."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hash_bytes(text.encode())
