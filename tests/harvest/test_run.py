"""Harvesting end to end: what is stored is what the model computed, also when the run was killed."""

import json
import shutil
from dataclasses import fields, replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from harvest import plan, run
from harvest.capture import Capture
from harvest.config import HarvestConfig
from harvest.prompts.prompts import image_seed, read_prompts, split_of
from harvest.run import harvest
from harvest.store import open_store
from harvest.store.schema import fingerprint

SITES = ("double.2.*", "single.0.img.mlp", "double.1.txt.attn", "single.2.img.update")


@pytest.fixture(scope="module")
def base(random_folder):
    return HarvestConfig(
        out=random_folder / "never-written",
        model=str(random_folder),
        sites=SITES,
        images=11,
        steps=2,
        seed=5,
        batch=2,
        images_per_shard=4,
        max_sequence_length=16,
        device="cpu",
    )


@pytest.fixture(scope="module")
def stored(base, tmp_path_factory):
    config = replace(base, out=tmp_path_factory.mktemp("harvest") / "store")
    return config, harvest(config), open_store(config.out)


def test_activations_are_those_of_the_model(stored, random_model):
    _, _, store = stored
    images = [4, 5]  # a whole batch of the second shard
    with Capture(random_model.pipe.transformer, store.sites, steps=2) as capture:
        pictures = random_model.generate(
            [store.prompts[i] for i in images],
            store.seeds[images].tolist(),
            steps=2,
            max_sequence_length=16,
        )
        for site, values in capture.take().items():
            np.testing.assert_array_equal(store.read(site, images), values.float().numpy())
    np.testing.assert_array_equal(store.pictures(images), pictures)


def test_the_store_says_where_it_comes_from(stored, base, random_model):
    config, summary, store = stored
    assert store.done.all() and store.images == 11
    assert store.sites == (
        *("double.1.txt.attn", "double.2.img", "double.2.txt"),
        *("single.0.img.mlp", "single.2.img.update"),
    )
    assert store.shape("single.0.img.mlp") == (11, 2, 64, 512)
    assert store.shape("double.2.txt") == (11, 2, 16, 128)
    prompts = read_prompts("shapes", 11, seed=5).prompts
    assert store.prompts == [p.text for p in prompts] and store.labels == [
        p.labels for p in prompts
    ]
    assert store.seeds.tolist() == [image_seed(5, i) for i in range(11)]
    assert store.split.tolist() == [split_of(p.text, 0.2) for p in prompts]
    assert (store.sigmas.tolist(), store.timesteps.tolist()) == random_model.schedule(2)
    assert store.words == random_model.words(store.prompts, 16)
    attrs = store.attrs
    assert attrs["model"] == random_model.info and attrs["guidance"] == 3.5
    assert attrs["resolution"] == [64, 64] and attrs["scheduler"]["config"]["shift"] == 3.0
    assert attrs["config"]["batch"] == 2 and attrs["config"]["height"] == 64
    operational = {"out", "buffer_mb", "offload", "dry_run"}
    assert set(attrs["config"]) == {f.name for f in fields(HarvestConfig)} - operational
    assert summary["fingerprint"] == store.fingerprint and summary["made"] == 11
    assert summary["rows"]["double.2.img"] == 11 * 2 * 64
    beside = json.loads((config.out.parent / "store.config.json").read_text())
    assert beside["out"] == str(config.out) and beside["buffer_mb"] == 2048
    assert attrs["config"].items() <= beside.items()


def test_statistics_are_gathered_on_the_way(stored):
    store = stored[2]
    rows = store.read("double.2.img").reshape(-1, 128).astype(np.float64)
    got = store.statistics("double.2.img")
    assert got.count == len(rows)
    np.testing.assert_allclose(got.mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got.second, (rows**2).mean(0), rtol=1e-12)


def test_a_finished_harvest_is_left_as_it_is(stored, capsys):
    config, _, store = stored
    times = {p: p.stat().st_mtime_ns for p in config.out.rglob("*")}
    assert harvest(config)["made"] == 0
    assert {p: p.stat().st_mtime_ns for p in config.out.rglob("*")} == times
    assert str(config.out) in capsys.readouterr().out
    explicit = replace(config, sites=store.sites, guidance=3.5, height=64, dtype="float32")
    assert harvest(explicit)["made"] == 0  # the same settings, spelled out


def test_another_harvest_at_the_same_place_is_refused(stored):
    with pytest.raises(ValueError, match=r"config.seed = 5, but 6"):
        harvest(replace(stored[0], seed=6))
    with pytest.raises(
        ValueError, match=r"sites = \[.*attn.*\], but \[.double.2.img., .double.2.txt.\]"
    ):
        harvest(replace(stored[0], sites=("double.2.*",)))


def test_every_setting_has_its_effect(base, random_model, embedded, tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    changes = {
        "sites": ("double.0.img",),
        "prompts": str(tmp_path / "p.txt"),
        "images": 3,
        "steps": 3,
        "seed": 6,
        "batch": 3,
        "images_per_shard": 2,
        "validation": 0.7,
        "max_sequence_length": 20,
        "height": 32,
        "width": 32,
        "guidance": 1.0,
        "pictures": False,
        "capture_steps": "1",
        "tokens_per_image": 5,
        "prompt_column": "text",
        "compress": "zstd",
        "chunk_mb": 0.01,
    }
    (tmp_path / "p.jsonl").write_text('{"prompt": "one", "text": "two"}\n')
    base = replace(base, prompts=str(tmp_path / "p.jsonl"))
    # The rest decides where the result goes or which pipeline is loaded (tests of models).
    assert {f.name for f in fields(HarvestConfig)} - set(changes) == {
        *("out", "model", "quantize", "quantize_text", "dtype", "device"),
        *("offload", "buffer_mb", "dry_run"),
    }

    def spec(config, model=random_model):
        return plan.make_plan(config, model).spec

    plain = spec(base).content()
    for name, value in changes.items():
        changed = spec(replace(base, **{name: value})).content()
        for content in (plain, changed):
            content.pop("config", None)
        differs = fingerprint(changed) != fingerprint(plain)
        assert differs or name == "batch", name
    assert plan.make_plan(replace(base, batch=3), random_model).config.batch == 3
    assert spec(base, embedded).content()["model"] != plain["model"]
    assert spec(replace(base, prompts=str(tmp_path / "p.txt"), images=0)).prompts == ["one", "two"]


def test_defaults_suit_the_model(embedded, tmp_path):
    config = plan.make_plan(HarvestConfig(out=tmp_path / "s"), embedded).config
    assert (config.images, config.steps, config.batch, config.images_per_shard) == (
        1000,
        8,
        16,
        256,
    )
    assert (config.height, config.width, config.max_sequence_length) == (64, 64, 32)
    asked = replace(config, height=512, width=512, batch=0, images_per_shard=0)
    large = plan.make_plan(asked, embedded).config
    assert (large.batch, large.images_per_shard) == (4, 8)


def test_loading_options_are_passed_on(random_folder, tmp_path):
    out = tmp_path / "store"
    summary = harvest(
        HarvestConfig(
            out=out,
            model=str(random_folder),
            images=1,
            steps=1,
            max_sequence_length=16,
            dtype="bfloat16",
            quantize="nf4",
            device="cpu",
            pictures=False,
        )
    )
    model = open_store(out).attrs["model"]
    assert (model["dtype"], model["quantization"], model["device"]) == ("bfloat16", "nf4", "cpu")
    assert summary["model"] == str(random_folder)


@pytest.mark.parametrize(
    ("value", "site"), [(float("nan"), "double.1.img"), (float("inf"), "double.0.img")]
)
def test_a_model_that_breaks_is_refused_by_the_place(random_folder, base, tmp_path, value, site):
    folder = shutil.copytree(random_folder, tmp_path / "model")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    index = site.split(".")[1]
    weights[f"transformer_blocks.{index}.ff.net.2.bias"].fill_(value)
    save_file(weights, path)
    config = replace(base, out=tmp_path / "s", model=str(folder), sites=("*.*.img",), images=2)
    with pytest.raises(ValueError, match=rf"at site {site}, step 0, image 0, prompt 'a "):
        harvest(config)
    assert not open_store(tmp_path / "s").done.any()


def test_a_picture_that_is_not_finite_is_refused(random_folder, base, tmp_path):
    """Its activations are: the fault is in the decoder."""
    folder = shutil.copytree(random_folder, tmp_path / "model")
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["decoder.conv_in.bias"].fill_(float("nan"))
    save_file(weights, path)
    config = replace(base, out=tmp_path / "s", model=str(folder), images=2)
    with pytest.raises(
        ValueError, match=r"finite .* got NaN in 2 of 2 .* of seed \d+ and prompt 'a "
    ):
        harvest(config)
    assert not open_store(tmp_path / "s").done.any()
    harvest(replace(config, out=tmp_path / "bare", pictures=False))
    assert open_store(tmp_path / "bare").done.all()


def test_no_hook_is_left_on_a_pipeline_that_failed(random_model, base, tmp_path, monkeypatch):
    made = plan.make_plan(replace(base, out=tmp_path / "s"), random_model)
    broken = replace(made.spec, sigmas=[1.0, 0.1])  # not what the scheduler does
    with pytest.raises(RuntimeError, match="the pipeline used noise levels"):
        writer = run.create_store(made.config.out, broken)
        made = made._replace(spec=broken)
        run.fill(writer, made, random_model, shards=writer.pending(), quiet=True)
    modules = list(random_model.pipe.transformer.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": -1}, "--images: expected 0 or more, got -1"),
        ({"validation": 1.0}, r"--validation: expected a share in \[0, 1\)"),
        ({"sites": ()}, "--sites: expected at least one"),
        ({"max_sequence_length": 600}, "--max-sequence-length: expected 0 to 512"),
        ({"guidance": -1.0}, "--guidance"),
    ],
)
def test_bad_settings_are_refused_by_their_flag(base, change, message):
    with pytest.raises(ValueError, match=message):
        replace(base, **change)


def test_sites_the_model_lacks_are_refused_before_anything_is_written(base, tmp_path):
    with pytest.raises(ValueError, match=r"has no site 'double.7.img'; the nearest are"):
        harvest(replace(base, out=tmp_path / "s", sites=("double.7.img",)))
    assert not (tmp_path / "s").exists()
