"""A small store's spec and contents, made without a model."""

from dataclasses import replace

import numpy as np

from harvest.store import StoreSpec

SITES = {"double.2.img": (12, 8), "double.2.txt": (5, 8), "single.0.img.mlp": (12, 16)}


def make_spec(images=11, **changes):
    spec = StoreSpec(
        sites=SITES,
        images=images,
        steps=3,
        prompts=[f"a café number {i}" for i in range(images)],
        seeds=[2**40 + i for i in range(images)],
        split=[i % 4 == 0 for i in range(images)],
        labels=[{"shape": ["ring", "star"]} if i else {} for i in range(images)],
        sigmas=[1.0, 0.5, 0.25],
        timesteps=[1000.0, 500.0, 250.0],
        grid=(3, 4),
        words=[["<s>", "é", str(i), "<pad>", "<pad>"] for i in range(images)],
        picture=(6, 4),
        attrs={"model": {"name": "toy"}, "guidance": 0.0, "config": {"seed": 3}},
        images_per_shard=4,
    )
    return replace(spec, **changes)


def content(spec, seed=0):
    rng = np.random.default_rng(seed)
    activations = {
        site: rng.normal(size=(spec.images, spec.steps, *shape)).astype(np.float32) * 10
        for site, shape in spec.sites.items()
    }
    return activations, rng.integers(0, 256, (spec.images, 6, 4, 3), dtype=np.uint8)


def write(writer, shard, activations, pictures):
    where = writer.images_of(shard)
    writer.write(shard, {s: a[where] for s, a in activations.items()}, pictures[where])


def same_files(left, right):
    """Asserts that two folders hold the same files, byte for byte."""
    files = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (left, right)
    ]
    assert sorted(files[0].keys() ^ files[1].keys()) == []
    assert [name for name in files[0] if files[0][name] != files[1][name]] == []
