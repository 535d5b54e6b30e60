"""The trainer's options from end to end: transcoders, every kind, starts from rows, resampling, trackers, presets."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct

import jax
import numpy as np
import pytest

from harvest.atomic import read_json
from harvest.store import open_store
from jaxdict import cli
from jaxdict.dictionary.arrays import ENCODER_KINDS
from jaxdict.dictionary.files import load_dictionary
from jaxdict.flags import flatten, settings_of
from jaxdict.rows.loader import Loader
from jaxdict.rows.normalization import fit, normalize, to_device
from jaxdict.rows.source import floats, source_of
from jaxdict.runs.checkpoint import Checkpoints
from jaxdict.runs.folder import CONFIG, SUMMARY, read_run
from jaxdict.sae import dead_features
from jaxdict.sae.config import PRESETS, TrainSAEConfig
from jaxdict.sae.state import Batch
from jaxdict.training import batches, initialize, sweep
from jaxdict.training.saved_run import read_sae, state_template
from tests.jaxdict.command import curve, raw, weights, words
from tests.jaxdict.planted import SITE, write_planted_store

NARROW, SHORT, TEXT = "double.3.img", "single.3.txt", "double.2.txt"
SMALL = {"site": SITE, "atoms": 48, "k": 4, "batch": 128, "rows": 128 * 60, "warmup": 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("more") / "store"
    return write_planted_store(path, more={NARROW: (16, 10), SHORT: (8, 10), TEXT: (16, 10)})


def sae(out, store, **settings):
    return cli.call(["train", "sae", *words(store=store, out=out, **{**SMALL, **settings})])


def one_line(capsys, *flags):
    """The one line that a wrong command prints."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(flags)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1, said
    return said


@pytest.fixture(scope="module")
def resampled(store, tmp_path_factory):
    """A run in which features die for sure: one atom a row, and dead after two batches."""
    out = tmp_path_factory.mktemp("more") / "resampled"
    settings = {"k": 1, "aux": 0, "dead_rows": 256, "resample": 20, "log_every": 1}
    settings |= {"save_every": 10, "keep": 9, "eval_every": 20}
    sae(out, store, **settings)
    return out, settings


def test_a_transcoder_predicts_another_site_and_is_measured_on_it(store, tmp_path, capsys):
    out, dictionary = tmp_path / "run", tmp_path / "dictionary"
    summary = sae(out, store, target=NARROW, rows=128 * 250, atoms=64, k=6, init="rows", lr=4e-3)
    cli.call(["export", str(out), *words(out=dictionary)])
    found = load_dictionary(dictionary)
    assert (found.d, found.d_out) == (16, 10) and found.card["target"] == NARROW
    assert found.card["folding_error"]["relative"] < 1e-4
    measured = cli.call(
        ["eval", str(dictionary), *words(store=store, out=tmp_path / "eval.json"), "--no-plots"]
    )
    fvu = measured["metrics"]["fvu"]
    assert fvu < 0.6 * measured["baselines"]["mean"]["fvu"]
    # The same rows of the target, whoever measures.
    assert summary["heldout"]["fvu"] == pytest.approx(fvu, rel=1e-3)
    assert found.card["metrics"]["fvu"] == pytest.approx(fvu, rel=1e-3)
    capsys.readouterr()
    for target, message in (
        (SHORT, f"stream of {SITE} (16 tokens), got {SHORT} (8)"),
        (TEXT, f"stream of {SITE} (16 tokens), got {TEXT} (16)"),
        ("double.9.txt", "--target: expected a site of"),
    ):
        flags = words(store=store, out=tmp_path / "none", **SMALL, target=target)
        assert message in one_line(capsys, "train", "sae", *flags)
        assert not (tmp_path / "none").exists()


# The others are exported in test_mesh.py (batchtopk) or differ from these in training only.
USUAL = ("topk", "jumprelu")


@pytest.mark.parametrize(
    "kind",
    [k if k in USUAL else pytest.param(k, marks=pytest.mark.slow) for k in ENCODER_KINDS],
)
def test_every_kind_trains_folds_and_is_as_sparse_as_it_should_be(kind, store, tmp_path):
    out = tmp_path / "run"
    summary = sae(out, store, kind=kind, aux=0, rows=128 * 100)
    cli.call(["export", str(out), *words(out=tmp_path / "dictionary")])
    card = load_dictionary(tmp_path / "dictionary").card
    assert card["folding_error"]["relative"] < 1e-4
    assert card["folding_error"]["same_features"] > 0.999
    held = summary["heldout"]
    assert card["metrics"]["fvu"] == pytest.approx(held["fvu"], rel=1e-3)
    assert card["metrics"]["l0"] == pytest.approx(held["l0"], rel=1e-2)
    low, high = {"topk": (3.9, 4), "relu": (2, 16)}.get(kind, (2, 8))
    assert low <= held["l0"] <= high and held["fvu"] < 0.5


def test_atoms_from_rows_are_rows_and_a_transcoders_pairs_are_rows_of_one_token(store):
    opened = open_store(store)
    sources = [source_of(opened, site) for site in (SITE, NARROW)]
    blocks = [[floats(block.bits) for block in source.blocks()] for source in sources]
    fitted = batches.Normalizations(*(fit(lambda b=one: b, "whiten") for one in blocks))
    loaders = [Loader(source, batch=20, seed=5, pool=300) for source in sources]
    config = TrainSAEConfig.of(store=store, out=store, **SMALL, target=NARROW)
    member = sweep.expand(config, opened)[0]
    params = initialize.from_rows(
        initialize.random_state(member, fitted).params, loaders[0], fitted, target=loaders[1]
    )
    places = []
    for atoms, normalization, block in zip(
        (params.encoder, params.atoms), (fitted.site, fitted.target), blocks, strict=True
    ):
        z = np.asarray(normalize(to_device(normalization), np.concatenate(block)))
        cosine = np.asarray(atoms) @ (z / np.linalg.norm(z, axis=1, keepdims=True)).T
        np.testing.assert_allclose(cosine.max(axis=1), 1, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(atoms, axis=1), 1, atol=1e-5)
        places.append(cosine)
    place = places[0].argmax(axis=1)
    assert len(set(place)) == 48, "each from another row"
    np.testing.assert_allclose(places[1][np.arange(48), place], 1, atol=1e-4)


def test_resampling_resets_what_is_dead(resampled):
    out, _ = resampled
    dead = [line["dead"] for line in curve(out) if line["kind"] == "train"]
    for step in (20, 40):
        assert dead[step - 1] > 0.1, "features should have died"
        assert dead[step] < dead[step - 1] / 2, "and be counted anew"


def test_resampling_goes_on_after_resume_as_if_nothing_had_happened(resampled, store, tmp_path):
    whole, settings = resampled
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    for path in (out / "checkpoints").iterdir():
        if int(path.name) > 30:
            shutil.rmtree(path)
    (out / SUMMARY).unlink()
    sae(out, store, **settings, resume=True)
    assert raw(weights(out)[1]) == raw(weights(whole)[1])
    assert curve(out) == curve(whole)


def test_a_resampled_feature_is_a_row_and_the_others_stay_as_they_are(resampled, store):
    run, _ = resampled
    state, _ = _state_of(run)
    dead = np.arange(48) % 5 == 0
    state = state._replace(since_fired=np.where(dead, 999, 3).astype(np.int32))
    site = source_of(open_store(store), SITE)
    normalization = fit(lambda: [floats(block.bits) for block in site.blocks()], "standardize")
    bits = site.read(site.images[:2]).reshape(-1, 16)
    batch = Batch(jax.numpy.asarray(bits), to_device(normalization))
    step_config = sweep.step_config_of(_member(run))
    before = jax.tree.map(np.array, state)
    after = dead_features.resample(
        jax.tree.map(jax.numpy.asarray, state), batch, step_config, seeds=[7], step=20
    )
    live = ~dead
    for old, new in zip(before.params[:3], after.params[:3], strict=True):
        np.testing.assert_array_equal(np.asarray(new)[live], old[live])
    z = np.asarray(normalize(batch.normalizer, floats(bits))) - before.params.bias
    cosine = np.asarray(after.params.atoms)[dead] @ (z / np.linalg.norm(z, axis=1, keepdims=True)).T
    np.testing.assert_allclose(cosine.max(axis=1), 1, atol=1e-4)
    size = 0.2 * np.linalg.norm(before.params.encoder[live], axis=1).mean()
    lengths = np.linalg.norm(np.asarray(after.params.encoder)[dead], axis=1)
    np.testing.assert_allclose(lengths, size, rtol=1e-4)
    for moments, old in (
        (after.optimizer.mu, before.optimizer.mu),
        (after.optimizer.nu, before.optimizer.nu),
    ):
        for name in ("encoder", "encoder_bias", "atoms"):
            now, then = np.asarray(getattr(moments, name)), getattr(old, name)
            assert not now[dead].any() and then[dead].any()
            np.testing.assert_array_equal(now[live], then[live])
    np.testing.assert_array_equal(after.since_fired, np.where(dead, 0, 3))
    again = dead_features.resample(
        jax.tree.map(jax.numpy.asarray, state), batch, step_config, seeds=[7], step=20
    )
    assert raw(jax.tree.leaves(jax.tree.map(np.asarray, again))) == raw(
        jax.tree.leaves(jax.tree.map(np.asarray, after))
    )


def _member(run):
    config = read_sae(run, read_run(run)).config
    return sweep.Member("", config, sweep.resolve(config, 16))


def _state_of(run):
    member = _member(run)
    zero = fit(lambda: [np.random.default_rng(0).normal(size=(9, 16))], "standardize")
    with Checkpoints(run) as checkpoints:
        return checkpoints.restore(state_template(member, batches.Normalizations(zero)))


def test_the_best_checkpoint_outlives_the_newest_and_can_be_exported(tmp_path):
    # Two training images of 16 rows, learned by heart: held-out rows soon suffer.
    store = write_planted_store(tmp_path / "store", images=8, steps=1, validation=2)
    out = tmp_path / "run"
    settings = {"batch": 16, "rows": 16 * 300, "atoms": 64, "lr": 0.02, "decay": 0, "aux": 0}
    sae(out, store, **settings, k=2, save_every=10, eval_every=10, keep=1, log_every=10)
    held = {line["step"]: line["fvu"] for line in curve(out) if line["kind"] == "heldout"}
    best = min(held, key=lambda step: held[step])
    assert best < 300 and held[300] > 1.02 * held[best], "learned by heart, it should do worse"
    assert {path.name for path in (out / "checkpoints").iterdir()} == {str(best), "300"}
    for checkpoint, step in (("best", best), ("newest", 300)):
        assert weights(out, checkpoint=checkpoint)[0] == step
        cli.call(["export", str(out), *words(out=tmp_path / checkpoint, checkpoint=checkpoint)])
        card = load_dictionary(tmp_path / checkpoint).card
        assert card["metrics"]["fvu"] == pytest.approx(held[step], rel=1e-3)
        assert card["training"]["rows"] == 16 * step


def test_no_best_checkpoint_is_made_up_where_none_was_measured(tmp_path, capsys):
    store = write_planted_store(tmp_path / "store", images=8, steps=1, validation=0)
    out, to = tmp_path / "run", tmp_path / "dictionary"
    sae(out, store, batch=16, rows=16 * 20, atoms=32, k=2, aux=0, save_every=10)
    capsys.readouterr()
    line = one_line(capsys, "export", str(out), *words(out=to, checkpoint="best"))
    assert "--checkpoint best: expected one measured on held-out rows in" in line
    assert "found none; use --checkpoint newest" in line
    assert not to.exists()
    cli.call(["export", str(out), *words(out=to)])
    assert load_dictionary(to).card["training"]["rows"] == 16 * 20


def test_a_tracker_hears_every_number_and_changes_none(resampled, store, tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    whole, settings = resampled
    out = tmp_path / "run"
    sae(out, store, **settings, tracker="tensorboard")
    assert raw(weights(out)[1]) == raw(weights(whole)[1])
    heard = {}
    for path in sorted((out / "tensorboard").iterdir()):
        for step, tag, value in _scalars(path.read_bytes()):
            heard[tag, step] = value
    for line in curve(out):
        name = "loss" if line["kind"] == "train" else "fvu"
        assert heard[f"{line['kind']}/{name}", line["step"]] == pytest.approx(line[name], rel=1e-6)
    if importlib.util.find_spec("wandb") is None:
        capsys.readouterr()
        flags = words(store=store, out=tmp_path / "none", **SMALL, tracker="wandb")
        assert "pip install wandb" in one_line(capsys, "train", "sae", *flags)
        assert not (tmp_path / "none").exists()


def _scalars(data):
    """(step, tag, value) of a TensorBoard file: records of length, checksum, event, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        at += 16 + length
        for value in event.summary.value:
            yield event.step, value.tag, value.simple_value


def test_a_preset_is_shown_can_be_changed_and_is_saved_in_full(store, tmp_path, capsys):
    for flag in (["--preset", "flux-paper"], ["--preset=flux-paper"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", "sae", *flag, "--help"])
        assert not stopped.value.code
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for number in ("65536", "30720000", "whiten", "0.995", "10.0", "0.99", "1e-10", "0.0002"):
            assert f"default: {number})" in text, number
    out = tmp_path / "run"
    flags = words(store=store, out=out, site=SITE, atoms=32, k=3, batch=64, rows=128)
    cli.call(["train", "sae", *flags, "--preset", "flux-paper", "--ema", "0.5"])
    saved = json.loads((out / CONFIG).read_text())["config"]
    changed = {"atoms": 32, "k": 3, "batch": 64, "rows": 128, "ema": 0.5}
    wanted = {**PRESETS["flux-paper"], **changed, "preset": "flux-paper"}
    groups = {name for name, value in saved.items() if isinstance(value, dict)}
    assert {"model", "data", "optimizer", "run"} < groups
    assert {name: flatten(saved)[name] for name in wanted} == wanted
    assert flatten(saved).keys() == settings_of(TrainSAEConfig).keys()


def test_resume_with_other_settings_or_another_store_names_both_values(
    resampled, store, tmp_path, capsys
):
    out, settings = resampled
    usual = {**SMALL, **settings, "resume": True}
    for changed, message in (
        ({"lr": 0.5}, "--lr = 0.0 as in its config.json, got 0.5"),
        ({"normalize": "rms"}, "--normalize = 'standardize' as in its config.json, got 'rms'"),
        ({"resample": 7}, "--resample = 20 as in its config.json, got 7"),
        ({"sweep": ("seed=0,1",)}, "--sweep = [] as in its config.json, got ['seed=0,1']"),
    ):
        flags = words(store=store, out=out, **{**usual, **changed})
        assert message in one_line(capsys, "train", "sae", *flags)
    other = write_planted_store(tmp_path / "other", seed=3)
    said = one_line(capsys, "train", "sae", *words(store=other, out=out, **usual))
    prints = [open_store(one).fingerprint[:12] for one in (store, other)]
    assert f"(fingerprint {prints[0]})" in said and f"got {other} ({prints[1]})" in said


def test_a_run_of_an_older_version_asks_to_be_trained_again(resampled, tmp_path, capsys):
    old = tmp_path / "old"
    shutil.copytree(resampled[0], old)
    description = read_json(old / CONFIG)  # without its hash, as an older version wrote it
    del description["config"]["sweep"], description["config"]["data"]["order_seed"]
    (old / CONFIG).write_text(json.dumps(description))
    said = one_line(capsys, "export", str(old), *words(out=tmp_path / "dictionary"))
    assert "an older jaxdict" in said and "order_seed, sweep" in said and "train again" in said
