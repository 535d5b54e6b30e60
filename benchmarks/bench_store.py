"""How fast is the activation store beside a plain write, a memory map and tensorstore, and does it stay so as it grows?

python benchmarks/bench_store.py [--quick]

Write: whole shards, with and without compression, against the same bytes written to one file and synced. Read: images in
shuffled order, against numpy's memory map of that file and tensorstore on the same store. Files are warm in the page cache.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from made_up import SHARD, write_store
from record import answer, interleaved

from harvest.store import open_store, to_bits

SITE = "double.18.img"
TOKENS, STEPS, WIDTH = 256, 4, 3072
SHAPES = ((16,), (80,), (400,), (800,))
"""Images of 6.3 MB each: 0.1, 0.5, 2.5 and 5 GB."""
QUICK = ((16,),)


def measure(images: int, *, rounds: int = 3) -> dict[str, Any]:
    """GB/s of writes and shuffled reads at one size, after a check that all read the same values."""
    folder = Path(tempfile.mkdtemp(prefix="bench-store-"))
    try:
        return _measure(images, folder, rounds)
    finally:
        shutil.rmtree(folder)


def _measure(images: int, folder: Path, rounds: int) -> dict[str, Any]:
    bits = _activations()
    flat = folder / "flat.bin"
    total = images * bits[0].nbytes
    writes = {
        "store": lambda: _write(folder / "none", images, bits, "none"),
        "store, zstd": lambda: _write(folder / "zstd", images, bits, "zstd"),
        "plain file": lambda: _plain(flat, images, bits),
    }
    written = interleaved(writes, rounds=rounds if images <= 100 else 1)
    order = np.random.default_rng(0).permutation(images)
    batches = [np.sort(part) for part in np.array_split(order, max(1, images // 4))]
    mapped = np.memmap(flat, np.uint16, "r", shape=(images, STEPS, TOKENS, WIDTH))
    stores = {name: open_store(folder / name) for name in ("none", "zstd")}
    other = tensorstore.open(
        {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder / "none" / "sites" / SITE)},
        },
        read=True,
    ).result()
    for batch in batches[:2]:
        expected = bits[batch % len(bits)]
        assert (stores["none"].read_bits(SITE, batch) == expected).all()
        assert (stores["zstd"].read_bits(SITE, batch) == expected).all()
        assert (mapped[batch] == expected).all()
        assert (np.asarray(other[batch]) == expected).all()
    reads = {
        "store": lambda: (stores["none"].read_bits(SITE, batch) for batch in batches),
        "store, zstd": lambda: (stores["zstd"].read_bits(SITE, batch) for batch in batches),
        "memory map": lambda: (mapped[batch] for batch in batches),
        "tensorstore": lambda: (np.asarray(other[batch]) for batch in batches),
    }
    read = interleaved({name: _drained(run) for name, run in reads.items()}, rounds=rounds)
    rows = images * STEPS * TOKENS
    array: Any = stores["none"].group[f"sites/{SITE}"]
    return {
        "images": images,
        "gigabytes": total / 1e9,
        "row bytes": WIDTH * 2,
        "chunk": list(array.chunks),
        "compressed to": _size(folder / "zstd") / total,
        "write GB/s": {name: total / 1e9 / seconds for name, seconds in written.items()},
        "read GB/s": {name: total / 1e9 / seconds for name, seconds in read.items()},
        "microseconds a row": {
            "write": written["store"] / rows * 1e6,
            "read": read["store"] / rows * 1e6,
        },
    }


def _activations() -> np.ndarray:
    """Bits of a few images whose values spread as a residual stream's do: most small, a few dimensions huge."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(0, 1, WIDTH)).astype(np.float32)
    scale[:4] *= 200
    values = rng.normal(size=(SHARD, STEPS, TOKENS, WIDTH)).astype(np.float32) * scale
    return to_bits(values)


def _write(path: Path, images: int, bits: np.ndarray, compress: str) -> None:
    shutil.rmtree(path, ignore_errors=True)
    shape = (images, STEPS, TOKENS, WIDTH)
    write_store(path, SITE, shape, lambda n: bits[:n], compress=compress)
    os.sync()


def _plain(path: Path, images: int, bits: np.ndarray) -> None:
    with path.open("wb") as file:
        for _ in range(0, images, SHARD):
            file.write(bits.data)
    os.sync()


def _drained(run: Callable[[], Iterable[np.ndarray]]) -> Callable[[], int]:
    """Read batches one after another, and a value of each page of each."""

    def wrapped() -> int:
        return sum(int(batch.reshape(-1)[::2048].sum()) for batch in run())

    return wrapped


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


if __name__ == "__main__":
    answer("store", measure, SHAPES, quick=QUICK)
