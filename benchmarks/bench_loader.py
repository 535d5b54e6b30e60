"""How many rows a second does the loader give, beside grain doing the same, and how long does a training wait?

python benchmarks/bench_loader.py [--quick]

Both give shuffled batches of rows of a store of one site, first with all rows in memory, then read in blocks. With
grain (pip install grain; left out where it is missing) each row is an element of a MapDataset that is shuffled and
batched, over the same rows in memory, which is its way; it has none for rows of blocks.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from made_up import write_store
from record import answer, interleaved

from harvest.store import open_store
from jaxdict.rows import Loader, source_of

SITE = "double.18.img"
SHAPES = ((256, 4, 64, 128), (64, 4, 256, 3072))
"""Images, steps, tokens, d."""
QUICK = ((64, 2, 16, 64),)
BATCH = 1024


def measure(images: int, steps: int, tokens: int, d: int, *, rounds: int = 3) -> dict[str, Any]:
    """Rows a second of each way at one shape, after a check that an epoch holds each row once."""
    folder = Path(tempfile.mkdtemp(prefix="bench-loader-"))
    try:
        return _measure(folder / "store", (images, steps, tokens, d), rounds)
    finally:
        shutil.rmtree(folder)


def _measure(path: Path, shape: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    _, steps, tokens, d = shape
    rng = np.random.default_rng(0)

    def bits(n: int) -> np.ndarray:
        """Below 0x7F80: finite bfloat16 values."""
        return rng.integers(0, 0x7F00, (n, steps, tokens, d), np.uint16)

    write_store(path, SITE, shape, bits)
    source = source_of(open_store(path), SITE)
    batches = source.rows // BATCH
    ways = {
        "in memory": lambda: _ours(source, batches, memory=2**40),
        "in blocks": lambda: _ours(source, batches, memory=0),
    }
    table = source.read(source.images).reshape(-1, d)
    for name, run in ways.items():
        assert run() == batches * BATCH, name
    assert source.rows % BATCH == 0
    stream = Loader(source, batch=BATCH, seed=0, pool=2**18).batches()
    seen = np.concatenate(list(itertools.islice(stream, batches)))
    assert sorted(row.tobytes() for row in seen) == sorted(row.tobytes() for row in table)
    try:
        import grain.python as grain  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:

        def with_grain() -> int:
            dataset = grain.MapDataset.source(table).seed(0).shuffle().batch(BATCH)
            return sum(len(batch) for batch in dataset.to_iter_dataset())

        ways["grain, in memory"] = with_grain
        assert with_grain() >= batches * BATCH
    seconds = interleaved(ways, rounds=rounds)
    return {
        "shape": {"images": shape[0], "steps": steps, "tokens": tokens, "d": d},
        "rows": source.rows,
        "rows/s": {name: round(batches * BATCH / value) for name, value in seconds.items()},
    }


def _ours(source: Any, batches: int, *, memory: int) -> int:
    stream = Loader(source, batch=BATCH, seed=0, pool=2**18, memory=memory).batches()
    rows = sum(len(batch) for batch in itertools.islice(stream, batches))
    stream.close()
    return rows


if __name__ == "__main__":
    answer("loader", measure, SHAPES, quick=QUICK)
