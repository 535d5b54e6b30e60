"""Training of the embedded model: repeats bit for bit, resumes after a cut, learns."""

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from harvest.shapes.training import build, transformer
from harvest.shapes.training.data import make_data, pack, unpack
from harvest.shapes.training.muon import Muon, orthogonalise
from harvest.shapes.training.redraw import redraw
from harvest.shapes.training.vae import encode, pictures, polish_decoder, train_vae


@pytest.fixture(scope="module")
def data():
    return make_data(build.new_pipeline(0), 96, seed=1)


def run(data, path: Path, *, steps: int, stop: int | None = None) -> dict[str, torch.Tensor]:
    """Weights after `steps`; with `stop`, of a run that dies right after that checkpoint."""

    class Cut(Exception):
        pass

    def cut(step: int, pipe: FluxPipeline) -> None:
        if step == stop:
            raise Cut

    pipe = build.new_pipeline(0)
    try:
        transformer.train_transformer(pipe, data, path, steps=steps, every=1, report=cut)
    except Cut:
        return run(data, path, steps=steps)
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def test_repeats_and_resumes_bit_for_bit(data, tmp_path, monkeypatch):
    monkeypatch.setattr(transformer, "TEXT_STEPS", 2)
    monkeypatch.setattr(transformer, "BATCH", 8)
    torch.set_num_threads(1)
    whole = run(data, tmp_path / "a.pt", steps=3)
    cut = run(data, tmp_path / "b.pt", steps=3, stop=2)
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    start = build.new_pipeline(0).transformer.state_dict()
    assert any(not torch.equal(whole[name], start[name]) for name in whole)


def test_autoencoder_learns_and_latents_have_unit_variance(tmp_path):
    pipe = build.new_pipeline(0)
    batch = pictures(32, seed=9)
    before = (
        (pipe.vae.decode(pipe.vae.encode(batch).latent_dist.mean).sample - batch).square().mean()
    )
    train_vae(pipe.vae, tmp_path / "vae.pt", steps=12, scenes=256)
    after = (
        (pipe.vae.decode(pipe.vae.encode(batch).latent_dist.mean).sample - batch).square().mean()
    )
    assert after < 0.85 * before  # a dozen steps, most of them warm-up
    latents = encode(pipe.vae, pictures(128, seed=10))
    assert latents.std() == pytest.approx(1, abs=0.1)
    assert latents.mean() == pytest.approx(0, abs=0.15)


def test_polishing_changes_the_decoder_alone(tmp_path):
    pipe = build.new_pipeline(0)
    before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    latents, targets = redraw(pipe, 24, seed=3, batch=16)
    polish_decoder(pipe.vae, latents, targets, tmp_path / "decoder.pt", steps=2)
    after = pipe.vae.state_dict()
    changed = {name for name in after if (after[name] != before[name]).any()}
    assert changed
    assert all(name.startswith("decoder.") for name in changed)


def test_redrawn_latents_are_the_transformers():
    """An untrained transformer's output is zero: what it hands back is the noised latents themselves."""
    pipe = build.new_pipeline(0)
    latents, targets = redraw(pipe, 200, seed=3)
    again, _ = redraw(pipe, 200, seed=3)
    assert torch.equal(latents, again) and latents.shape == (200, 4, 16, 16)
    clean = encode(pipe.vae, targets)
    off = (latents - clean).flatten(1).norm(dim=1) / clean.flatten(1).norm(dim=1)
    untouched = off < 1e-6
    assert 0.1 < untouched.float().mean() < 0.4  # a quarter, of 200
    assert (off[~untouched] > 0.03).all()


def test_packing_is_the_pipelines_and_unpacking_undoes_it():
    latents = torch.randn(2, 4, 16, 16)
    theirs = FluxPipeline._pack_latents(latents, 2, 4, 16, 16)
    assert torch.equal(pack(latents), theirs)
    assert torch.equal(unpack(theirs), latents)


def test_orthogonalise_flattens_the_spectrum():
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.3
    tall = orthogonalise(matrix.T)
    torch.testing.assert_close(tall, orthogonalise(matrix).T, rtol=1e-4, atol=1e-4)


def test_muon_follows_torchs():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Parameter(torch.randn(16, 32)), torch.nn.Parameter(torch.zeros(16, 32))
    theirs.data.copy_(ours.data)
    start = ours.data.clone()
    a = Muon([ours], rate=0.02)
    b = torch.optim.Muon(
        [theirs], lr=0.02, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(3):
        gradient = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    moved, expected = (ours.data - start).flatten(), (theirs.data - start).flatten()
    assert (
        torch.cosine_similarity(moved, expected, dim=0) > 0.995
    )  # torch's iterations are bfloat16
    assert moved.norm() / expected.norm() == pytest.approx(1, abs=0.02)
