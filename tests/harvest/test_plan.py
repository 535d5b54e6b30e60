"""What a harvest keeps of what a model computes: chosen steps, sampled tokens, no more work than asked for."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from harvest.config import HarvestConfig
from harvest.models.pipelines import load_model
from harvest.plan import make_plan, picked_tokens
from harvest.run import harvest
from harvest.store import open_store
from tests.harvest.synthetic import same_files

SITES = ("double.1.img", "double.1.txt", "single.0.img.mlp")


@pytest.fixture(scope="module")
def whole(random_folder, tmp_path_factory):
    config = HarvestConfig(
        out=tmp_path_factory.mktemp("plan") / "whole",
        model=str(random_folder),
        sites=SITES,
        images=5,
        steps=3,
        batch=2,
        images_per_shard=4,
        max_sequence_length=16,
        device="cpu",
    )
    harvest(config)
    return config, open_store(config.out)


def test_chosen_steps_are_those_of_the_whole_run(whole, tmp_path):
    config, everything = whole
    harvest(replace(config, out=tmp_path / "s", capture_steps="2, 0"))
    some = open_store(tmp_path / "s")
    assert some.step_numbers.tolist() == [0, 2] and some.attrs["denoising_steps"] == 3
    np.testing.assert_array_equal(some.sigmas, everything.sigmas[[0, 2]])
    for site in SITES:
        np.testing.assert_array_equal(some.read(site), everything.read(site, steps=[0, 2]))
    np.testing.assert_array_equal(some.pictures(), everything.pictures())


@pytest.mark.parametrize("steps", ["all", "0", "1"])
def test_without_pictures_each_image_ends_after_the_last_site(whole, tmp_path, steps, monkeypatch):
    config, everything = whole
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    calls = []
    forward = FluxSingleTransformerBlock.forward
    monkeypatch.setattr(
        FluxSingleTransformerBlock,
        "forward",
        lambda self, *args, **kwargs: calls.append(1) or forward(self, *args, **kwargs),
    )
    harvest(replace(config, out=tmp_path / "s", capture_steps=steps, pictures=False))
    some = open_store(tmp_path / "s")
    chosen = some.step_numbers
    for site in SITES:
        np.testing.assert_array_equal(some.read(site), everything.read(site, steps=chosen))
    batches = 3
    last = int(chosen[-1])
    assert len(calls) == batches * (
        3 * last + 1
    )  # of the last pass only single block 0, whose neurons are asked for


def test_a_sample_of_tokens_is_what_the_whole_run_has_there(whole, tmp_path):
    config, everything = whole
    harvest(replace(config, out=tmp_path / "s", tokens_per_image=20))
    some = open_store(tmp_path / "s")
    assert some.sampled and some.shape("double.1.img") == (5, 3, 20, 128)
    assert some.shape("double.1.txt") == (5, 3, 16, 128)  # shorter than the sample: kept whole
    where = some.positions("double.1.img")
    assert len({tuple(row) for row in where}) == 5  # each image has its own
    for image in range(5):
        np.testing.assert_array_equal(
            where[image], picked_tokens(0, image, "img", tokens=64, count=20)
        )
        np.testing.assert_array_equal(
            some.read("single.0.img.mlp", [image])[0],
            everything.read("single.0.img.mlp", [image])[0][:, where[image]],
        )


def test_a_sample_is_without_repetition_and_even():
    drawn = np.stack([picked_tokens(3, image, "img", tokens=16, count=4) for image in range(2000)])
    assert all(len(set(row)) == 4 and sorted(row) == list(row) for row in drawn)
    counts = np.bincount(drawn.ravel(), minlength=16)
    assert counts.min() > 400 and counts.max() < 600  # 500 expected, 20 standard deviation
    other = np.stack([picked_tokens(3, image, "txt", tokens=16, count=4) for image in range(2000)])
    assert (drawn != other).any()


def test_encoding_the_text_first_changes_no_bit(whole, tmp_path, capsys):
    config, everything = whole
    harvest(replace(config, out=tmp_path / "whole", offload="text"))
    same_files(everything.path, tmp_path / "whole")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_encoded_text_is_kept_over_a_cut(whole, tmp_path, monkeypatch):
    from harvest.models.pipelines import LoadedModel

    config, everything = whole
    encoded = []
    encode = LoadedModel.encode
    monkeypatch.setattr(
        LoadedModel,
        "encode",
        lambda self, prompts, length=None: (
            encoded.append(len(prompts)) or encode(self, prompts, length)
        ),
    )
    cut = replace(config, out=tmp_path / "whole", offload="text")
    generate = LoadedModel.generate

    def broken(self, *args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadedModel, "generate", broken)
    with pytest.raises(KeyboardInterrupt):
        harvest(cut)
    assert sum(encoded) == 5
    monkeypatch.setattr(LoadedModel, "generate", generate)
    harvest(cut)
    assert sum(encoded) == 5  # nothing was encoded again
    same_files(everything.path, tmp_path / "whole")


def test_a_dry_run_tells_the_size_and_writes_nothing(whole, tmp_path, capsys):
    config, everything = whole
    result = harvest(replace(config, out=tmp_path / "s", dry_run=True))
    assert list(tmp_path.iterdir()) == []
    rows = sum(np.prod(everything.shape(site)[:3]) for site in SITES)
    values = sum(np.prod(everything.shape(site)) for site in SITES)
    assert result["rows"] == rows
    assert result["store_bytes"] == 2 * values + everything.pictures().nbytes
    pipe = load_model(config.model, device="cpu").pipe
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    parameters = sum(p.numel() for part in parts for p in part.parameters())
    assert result["model_bytes"] == pytest.approx(4 * parameters, rel=0.02)
    parameters = sum(p.numel() for part in parts[:2] for p in part.parameters())
    apart = harvest(replace(config, out=tmp_path / "s", dry_run=True, offload="text"))
    assert apart["model_bytes"] == pytest.approx(4 * parameters, rel=0.02)
    told = capsys.readouterr().out
    assert f"{rows:,} at 3 sites" in told and "are free" in told


def test_a_dry_run_of_a_model_of_the_hub_needs_its_settings_alone(
    whole, tmp_path, monkeypatch, random_folder
):
    """As in the cache of the hub after only the settings were fetched."""
    config, _ = whole
    expected = harvest(replace(config, out=tmp_path / "s", dry_run=True))
    repository = tmp_path / "models--someone--tiny-flux"
    revision = "0123456789abcdef0123456789abcdef01234567"
    no_weights = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(random_folder, repository / "snapshots" / revision, ignore=no_weights)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub = replace(config, out=tmp_path / "s", model="someone/tiny-flux", dry_run=True)
    kept = ("rows", "store_bytes", "model_bytes", "buffer_bytes", "flops")
    found = harvest(hub)
    assert {name: found[name] for name in kept} == {name: expected[name] for name in kept}
    with pytest.raises(ValueError, match="expected a whole FLUX pipeline at someone/tiny-flux"):
        harvest(replace(hub, dry_run=False))


def test_the_buffer_bounds_batches_and_shards(random_model, tmp_path):
    config = HarvestConfig(out=tmp_path / "s", sites=("*.*.img",), images=500, steps=4)
    image = 6 * 64 * 128 * 4 * 2  # bytes
    free = make_plan(config, random_model).config
    assert (free.batch, free.images_per_shard) == (16, 160)
    tight = make_plan(replace(config, buffer_mb=40 * image / 1e6), random_model).config
    assert 2 * (tight.batch + tight.images_per_shard) <= 40 and tight.batch >= 8
    with pytest.raises(ValueError, match=r"--buffer-mb: expected room .* got 1 MB; raise it"):
        make_plan(replace(config, buffer_mb=1.0), random_model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capture_steps": "0,x"}, "--capture-steps: expected all, or numbers such as 0,2"),
        ({"capture_steps": "3"}, "--capture-steps: expected numbers from 0 to 2, got 3"),
        ({"chunk_mb": 0.0}, "--chunk-mb: expected more than 0 MB"),
        ({"tokens_per_image": -1}, "--tokens-per-image: expected 0 or more"),
        ({"offload": "model"}, "expected a GPU for --offload model, got device cpu"),
        ({"quantize_text": "int8"}, "expected a GPU for int8"),
    ],
)
def test_wrong_settings_are_refused(whole, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        harvest(replace(whole[0], out=tmp_path / "s", **change))
    assert list(tmp_path.iterdir()) == []


def test_the_text_encoder_is_quantized_by_itself(whole, tmp_path):
    config, everything = whole
    harvest(replace(config, out=tmp_path / "s", images=1, quantize_text="nf4"))
    store = open_store(tmp_path / "s")
    assert store.attrs["model"]["quantization"] == "none"
    assert store.attrs["model"]["text_quantization"] == "nf4"
    a, b = everything.read("double.1.txt", [0]), store.read("double.1.txt", [0])
    difference = np.linalg.norm(a - b) / np.linalg.norm(a)
    assert 0.001 < difference < 0.5
