"""An index of a text site leaves padding out: no row of it is encoded or counted."""

from __future__ import annotations

import numpy as np
import torch

from interp.config import IndexConfig
from interp.index.arrays import load_index
from interp.index.build import build_index
from steer.coder import Coder
from tests.interp.conftest import STEPS, WORDS


def test_padding_is_neither_encoded_nor_counted(world, tmp_path, capsys):
    settings = {"dictionary": world.root / "sae_txt", "store": world.root / "store"}
    coder = Coder.from_pretrained(settings["dictionary"])
    images = world.store.indices("validation")
    real = np.array([sum(word != "<pad>" for word in world.store.words[i]) for i in images])
    assert 0 < real.sum() < len(images) * WORDS
    rows = [world.activations["double.0.txt"][i, :, :n] for i, n in zip(images, real, strict=True)]
    codes = [coder.encode(torch.from_numpy(row)).dense(coder.m).numpy() for row in rows]
    every = np.concatenate([code.reshape(-1, coder.m) for code in codes])
    out = tmp_path / "index"
    summary = build_index(IndexConfig(**settings, out=out, padding="drop"))
    index = load_index(out)
    assert summary["rows"] == len(every) == STEPS * real.sum()
    np.testing.assert_allclose(index.density, (every > 0).mean(0), atol=1e-9)
    np.testing.assert_allclose(index.maximum, every.max(0), rtol=1e-5)
    by_step = np.concatenate([code for code in codes], axis=1)
    np.testing.assert_allclose(index.step_density.T, (by_step > 0).mean(1), atol=1e-6)
    np.testing.assert_allclose(index.step_mean.T, by_step.mean(1), atol=1e-5)
    seen = index.example_image >= 0
    place = {int(image): n for image, n in zip(images, real, strict=True)}
    assert all(
        token < place[int(image)]
        for image, token in zip(index.example_image[seen], index.example_token[seen], strict=True)
    )
    told = capsys.readouterr().out
    total = len(images) * WORDS * STEPS
    assert f"padding: {total - len(every):,} of {total:,} rows of double.0.txt" in told
    assert f"split: validation (held out), {len(images)} images of it; read others" in told
    kept = build_index(IndexConfig(**settings, out=out))  # its card says nothing of padding
    assert kept["rows"] == total and load_index(out).facts["padding_left_out"] == 0
