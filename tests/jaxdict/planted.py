"""A small activation store of sparse sums of known atoms, with one massive dimension."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harvest.store import StoreSpec, create_store

SITE = "double.2.img"


def write_planted_store(
    path: Path,
    *,
    images: int = 40,
    steps: int = 2,
    grid: tuple[int, int] = (4, 4),
    d: int = 16,
    true: int = 24,
    seed: int = 0,
    validation: int = 5,
    more: dict[str, tuple[int, int]] | None = None,
    numbers: tuple[int, ...] = (),
) -> Path:
    """Write the store.

    Args:
        path: its folder.
        images: number of images.
        steps: captured steps.
        grid: rows and columns of image tokens.
        d: width of a row at `SITE`.
        true: number of planted atoms.
        seed: of everything random.
        validation: every so many-th image is held out; 0 for none.
        more: further sites -> tokens and width; their rows have the same codes on other atoms.
        numbers: the denoising step that each captured one is; empty for the first ones.
    """
    more = more or {}
    rng = np.random.default_rng(seed)
    tokens = grid[0] * grid[1]
    atoms = rng.normal(size=(true, d))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    scale, mean = np.exp(0.5 * rng.normal(size=d)), rng.normal(size=d)
    scale[1], mean[1] = 20.0, 60.0
    spec = StoreSpec(
        sites={SITE: (tokens, d), **more},
        images=images,
        steps=steps,
        denoising_steps=max(numbers, default=steps - 1) + 1,
        step_numbers=numbers,
        prompts=[f"prompt {i}" for i in range(images)],
        seeds=list(range(images)),
        split=[int(validation > 0 and i % validation == 0) for i in range(images)],
        sigmas=list(np.linspace(1, 0.5, steps)),
        timesteps=list(np.linspace(1000, 500, steps)),
        grid=grid,
        images_per_shard=8,
        attrs={"model": {"id": "planted"}},
    )
    writer = create_store(path, spec)
    for shard in writer.pending():
        part = writer.images_of(shard)
        n = (part.stop - part.start) * steps * tokens
        codes = rng.exponential(size=(n, true)) * (rng.random((n, true)) < 3 / true)
        rows = (codes @ atoms + 0.02 * rng.normal(size=(n, d))) * scale + mean
        found = {SITE: rows.astype(np.float32).reshape(-1, steps, tokens, d)}
        every = codes.reshape(-1, steps, tokens, true)
        for number, (site, (some, width)) in enumerate(more.items()):
            others = np.random.default_rng([seed, number]).normal(size=(true, width))
            found[site] = (every[:, :, :some] @ others + 5).astype(np.float32)
        writer.write(shard, found)
    return path
