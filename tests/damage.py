"""Files with a bit that has turned."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path


def flipped(file: Path, count: int = 200) -> Iterator[str]:
    """Turn one bit of a file after another, each alone, and say which; at the end the file is as it was.

    Args:
        file: what is damaged.
        count: bits, drawn from the whole file; of its first and last bytes there is always one.
    """
    whole, drawn = file.read_bytes(), random.Random(0)
    last = len(whole) - 1
    for place in [0, last, *(drawn.randint(0, last) for _ in range(count - 2))]:
        bit = drawn.randrange(8)
        broken = bytearray(whole)
        broken[place] ^= 1 << bit
        file.write_bytes(broken)
        yield f"bit {bit} of byte {place} of {file.name}"
    file.write_bytes(whole)
