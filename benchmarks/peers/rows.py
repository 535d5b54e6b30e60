"""The rows that all contenders are given: planted ones, and those of the embedded model.

All are exact in bfloat16, which is what ours reads from a store, so that every contender gets the
same numbers.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np

from harvest.store import open_store
from jaxdict import cli
from jaxdict.rows import fit, floats, image_rows, source_of

SITE = "double.2.img"


def planted(
    rows: int, d: int, m: int, k: int, *, noise: float, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Sums of k random unit atoms of m with exponential weights, and noise.

    Args:
        rows: how many.
        d: width.
        m: atoms to draw from.
        k: atoms in a row.
        noise: standard deviation of the noise, as a multiple of the signal's root mean square.
        seed: of everything.

    Returns:
        Rows float32 [rows, d] of root mean square 1, and the noise's share of their variance.
    """
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, d), np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    x = np.zeros((rows, d), np.float32)
    for first in range(0, rows, 4096):
        part = x[first : first + 4096]
        chosen = rng.random((len(part), m), np.float32).argpartition(k, axis=1)[:, :k]
        weights = rng.standard_exponential((len(part), k), np.float32)
        for slot in range(k):
            part += weights[:, slot, None] * atoms[chosen[:, slot]]
    size = noise * np.sqrt(np.square(x).mean())
    x += size * rng.standard_normal(x.shape, np.float32)
    share = size**2 * d / x.var(axis=0, dtype=np.float64).sum()
    return _exact(x / np.sqrt(np.square(x).mean())), float(share)


def write_planted(folder: Path, *, rows: int, held_out: int, d: int, m: int, k: int) -> float:
    """Writes train.npy and held_out.npy of one planted dictionary; returns the noise's share."""
    x, share = planted(rows + held_out, d, m, k, noise=0.1)
    np.save(folder / "train.npy", x[:rows])
    np.save(folder / "held_out.npy", x[rows:])
    return share


def write_embedded(folder: Path, path: Path, *, images: int, steps: int, held_out: int) -> str:
    """Writes train.npy and held_out.npy of a store of the embedded model.

    Args:
        folder: where the files go.
        path: the store; it is harvested if there is nothing.
        images: of such a harvest.
        steps: of such a harvest.
        held_out: about how many rows of the validation images to take.

    Returns:
        The store's fingerprint.
    """
    if not path.exists():
        words = f"harvest --model shapes --sites {SITE} --images {images} --steps {steps} --seed 0"
        cli.call([*words.split(), "--out", str(path)])
    store = open_store(path)
    train = source_of(store, SITE)
    fitted = fit(lambda: image_rows(train.blocks()), "standardize")
    validation = source_of(store, SITE, split="validation").spread(held_out)
    for name, source in (("train", train), ("held_out", validation)):
        x = np.concatenate([floats(block.bits) for block in source.blocks()])
        z = (x - fitted.mean) * fitted.transform
        np.save(folder / f"{name}.npy", _exact(z))
    return store.fingerprint


def _exact(x: np.ndarray) -> np.ndarray:
    """Rounded to bfloat16, as float32."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)
