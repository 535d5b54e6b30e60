"""What does a sweep of eight cost beside one training, and how long does a training wait for its rows?

python benchmarks/bench_sweep.py [--quick]

The real command's function, on a store of made-up rows: one training, then a sweep of eight in learning rate and seed,
which share one vmapped step, and eight that differ in k too, in two groups.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from made_up import write_store
from record import answer

from jaxdict.devices import huge_pages
from jaxdict.sae import TrainSAEConfig
from jaxdict.training import train_sae

SITE = "double.2.img"
SWEEPS = {
    "one": (),
    "eight, one group": ("lr=5e-4,1e-3,2e-3,4e-3", "seed=0,1"),
    "eight, two groups": ("lr=1e-3,2e-3", "k=8,16", "seed=0,1"),
}
SHAPES = ((128, 1024, 300_000), (768, 6144, 30_000))
"""Width d, atoms m, rows."""
QUICK = ((32, 128, 20_000),)


def measure(d: int, m: int, rows: int) -> dict[str, Any]:
    """Seconds of each, start and compilation included, after a check that a member equals the training alone."""
    folder = Path(tempfile.mkdtemp(prefix="bench-sweep-"))
    try:
        store = _store(folder / "store", d)
        found = {
            name: _train(store, folder / str(i), d, m, rows, sweep)
            for i, (name, sweep) in enumerate(SWEEPS.items())
        }
    finally:
        shutil.rmtree(folder)
    alone = found["one"]["heldout"]["fvu"]
    same = found["eight, one group"]["members"]["lr=0.002_seed=0"]["heldout"]["fvu"]
    assert abs(same / alone - 1) < 0.02, (alone, same)
    seconds = {name: one["seconds"] for name, one in found.items()}
    return {
        "shape": {"n": 1024, "d": d, "m": m, "k": 16, "rows": rows},
        "seconds": seconds,
        "times one": {name: value / seconds["one"] for name, value in seconds.items()},
        "waited for rows": {name: one["waited_for_rows"] for name, one in found.items()},
    }


def _store(path: Path, d: int, *, images: int = 64, steps: int = 4, tokens: int = 64) -> Path:
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(4 * d, d)).astype(np.float32) / np.sqrt(d)

    def rows(n: int) -> np.ndarray:
        size = (n * steps * tokens, 4 * d)
        codes = (rng.random(size) < 8 / (4 * d)) * rng.exponential(size=size)
        return (codes.astype(np.float32) @ atoms).reshape(n, steps, tokens, d)

    split = [int(i % 8 == 0) for i in range(images)]
    return write_store(path, SITE, (images, steps, tokens, d), rows, split=split)


def _train(
    store: Path, out: Path, d: int, m: int, rows: int, sweep: tuple[str, ...]
) -> dict[str, Any]:
    config = TrainSAEConfig.of(
        store=store,
        site=SITE,
        out=out,
        atoms=m,
        k=16,
        rows=rows,
        lr=2e-3,
        sweep=sweep,
        save_every=10**6,
    )
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return train_sae(config)


if __name__ == "__main__":
    huge_pages.ask()
    answer("sweep", measure, SHAPES, quick=QUICK)
