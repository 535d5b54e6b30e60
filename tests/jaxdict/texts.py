"""A small activation store with a text site, whose prompts differ in length and are padded as T5 pads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from harvest.store import StoreSpec, create_store

SITE, OTHER, IMAGE = "double.2.txt", "double.3.txt", "double.2.img"
TOKENS, STEPS, D, IMAGES = 12, 2, 8, 40


def lengths(images: int = IMAGES) -> np.ndarray:
    """Tokens of each image's text that are no padding, int64 [images]."""
    return np.random.default_rng(5).integers(1, TOKENS // 2, images)


def write_text_store(path: Path, *, words: bool = True, picked: np.ndarray | None = None) -> Path:
    """Write the store; every fifth image is held out. Rows of padding are alike but for a little noise.

    Args:
        path: its folder.
        words: whether it keeps text tokens, which tell what is padding.
        picked: positions [images, token] of the text that are kept; all by default.
    """
    rng, real = np.random.default_rng(1), lengths()
    pieces = [[*(["a", "<pad>", "b"] * TOKENS)[: n - 1], "</s>"] for n in real]
    spec = StoreSpec(
        sites={s: (TOKENS if picked is None else picked.shape[1], D) for s in (SITE, OTHER)}
        | {IMAGE: (4, D)},
        images=IMAGES,
        steps=STEPS,
        prompts=[f"prompt {i}" for i in range(IMAGES)],
        seeds=list(range(IMAGES)),
        split=[int(i % 5 == 0) for i in range(IMAGES)],
        sigmas=[1.0, 0.5],
        timesteps=[1000.0, 500.0],
        grid=(2, 2),
        words=[(row + ["<pad>"] * TOKENS)[:TOKENS] for row in pieces] if words else None,
        positions={} if picked is None else {"txt": picked},
        images_per_shard=8,
        chunk_bytes=2 * 5 * D,
        attrs={"model": {"id": "texts"}},
    )
    writer = create_store(path, spec)
    for shard in writer.pending():
        part = writer.images_of(shard)
        n = part.stop - part.start
        rows = {s: rng.standard_normal((n, STEPS, TOKENS, D)).astype("f4") for s in (SITE, OTHER)}
        for some in rows.values():
            for i, image in enumerate(range(part.start, part.stop)):
                some[i, :, real[image] :] = 3 + 0.1 * some[i, :, real[image] :]
            if picked is not None:
                some[:, :, : picked.shape[1]] = np.take_along_axis(
                    some, picked[part, None, :, None], 2
                )
        kept = spec.sites[SITE][0]
        image = rng.standard_normal((n, STEPS, 4, D)).astype(np.float32)
        writer.write(
            shard,
            {s: np.ascontiguousarray(r[:, :, :kept]) for s, r in rows.items()} | {IMAGE: image},
        )
    return path
