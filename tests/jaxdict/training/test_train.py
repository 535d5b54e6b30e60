"""Training: a planted dictionary found, and runs that cannot be lost."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from harvest.atomic import read_json
from jaxdict.flags import growing, resumable, sweepable
from jaxdict.runs import folder
from jaxdict.runs.folder import read_lines, read_run
from jaxdict.sae import kinds
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training import train
from jaxdict.training.saved_run import read_sae
from jaxdict.training.train import train_sae
from tests.jaxdict.planted import SITE, write_planted_store

SMALL = {"site": SITE, "atoms": 48, "k": 4, "batch": 128, "rows": 128 * 60, "warmup": 5}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("train") / "store")


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory):
    """A run that nothing disturbed, with a moving average and dead features."""
    out = tmp_path_factory.mktemp("whole") / "run"
    config = TrainSAEConfig.of(store=store, out=out, **SMALL, ema=0.9, dead_rows=500, save_every=20)
    return config, train_sae(config)


def weights(run):
    trained = read_sae(run, read_run(run))
    return trained.step, [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(trained.params)]


def test_a_planted_dictionary_is_found(tmp_path):
    store = write_planted_store(tmp_path / "store", images=120, true=20, d=16)
    out = tmp_path / "run"
    summary = train_sae(
        TrainSAEConfig.of(
            store=store, site=SITE, out=out, atoms=48, k=5, batch=256, rows=150_000, aux=0
        )
    )
    assert summary["heldout"]["fvu_normalized"] < 0.08
    assert summary["heldout"]["fvu"] < 0.1
    assert summary["heldout"]["l0"] <= 5
    params, (normalization, _), *_ = read_sae(out, read_run(out))
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20, 16))
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    scale = np.exp(0.5 * rng.normal(size=16))
    scale[1] = 20
    true = true * scale / normalization.inverse
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    best = (np.asarray(params.atoms) @ true.T).max(0)
    assert np.median(best) > 0.9, best


def test_run_folder_holds_everything(whole):
    config, summary = whole
    names = {path.name for path in config.out.iterdir()}
    assert {"config.json", "metrics.jsonl", "summary.json", "loss.png", "checkpoints"} <= names
    assert not [name for name in names if name.endswith(".tmp")]
    assert read_json(config.out / "summary.json") == json.loads(json.dumps(summary))
    lines = read_lines(config.out / "metrics.jsonl")
    held = [line for line in lines if line["kind"] == "heldout"][-1]
    assert held["fvu"] == summary["heldout"]["fvu"]
    assert set(held["fvu_per_step"]) == {"0", "1"}
    last = [line for line in lines if line["kind"] == "train"][-1]
    assert last["rows"] == config.data.rows and last["dead"] == pytest.approx(
        summary["training"]["dead_share"]
    )
    assert (config.out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_logging_and_measuring_change_no_number(whole, tmp_path):
    config, _ = whole
    other = config.replace(
        out=tmp_path / "run", log_every=1, eval_every=13, save_every=17, memory=0
    )
    train_sae(other)
    assert weights(other.out) == weights(config.out)


def test_seed_changes_the_weights(whole, tmp_path):
    config, _ = whole
    other = config.replace(out=tmp_path / "run", seed=1)
    train_sae(other)
    assert weights(other.out)[1] != weights(config.out)[1]


def test_sigterm_saves_and_exits_and_resume_goes_on(whole, tmp_path):
    config, _ = whole
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)

    def terminate():
        while not read_lines(out / "metrics.jsonl"):
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    longer = config.replace(out=out, log_every=1, rows=128 * 5000, save_every=10_000, aux=0)
    with pytest.raises(SystemExit) as stopped:
        train_sae(longer)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    step, _ = weights(out)
    assert 1 <= step < 5000
    assert read_lines(out / "metrics.jsonl")[-1]["step"] == step


def test_folder_in_use_and_other_settings_are_refused_by_name(whole, store, tmp_path):
    config, _ = whole
    with pytest.raises(FileExistsError, match="--resume"):
        train_sae(config)
    with pytest.raises(ValueError, match=r"--k = 4 .*got 5"):
        train_sae(config.replace(resume=True, k=5))
    other = write_planted_store(tmp_path / "other", seed=9, images=48)
    with pytest.raises(
        ValueError, match=r"expected the store that the run in .* \(fingerprint \w+\).*got"
    ):
        train_sae(config.replace(resume=True, store=other))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "note.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"found no config\.json"):
        train_sae(config.replace(resume=True, out=tmp_path / "foreign"))


def test_resume_of_a_finished_run_leaves_its_weights(whole):
    config, summary = whole
    before = weights(config.out)
    again = train_sae(config.replace(resume=True))
    assert weights(config.out) == before
    assert again["heldout"] == summary["heldout"]


def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(store, tmp_path):
    config = TrainSAEConfig.of(
        store=store, out=tmp_path / "run", **SMALL, aux=0, lr=1e30, clip=0, save_every=1
    )
    with pytest.raises(ValueError, match=r"finite loss, got .*last good checkpoint: .*; start"):
        train_sae(config)


def test_store_without_validation_images_still_trains(tmp_path):
    store = write_planted_store(tmp_path / "store", validation=0, images=16)
    config = TrainSAEConfig.of(
        store=store, out=tmp_path / "run", **{**SMALL, "rows": 1280, "aux": 0}
    )
    assert train_sae(config)["heldout"] is None


def test_bad_settings_say_what_was_expected(store, tmp_path):
    for wrong, message in (
        ({"k": 0}, r"--k: expected a whole number"),
        ({"rows": 3}, r"at least one batch \(128\), got 3"),
        ({"k": 49}, r"at most the number of atoms \(48\), got 49"),
        ({"b1": 1.0}, r"--b1: expected a decay in \[0, 1\), got 1\.0"),
        ({"normalize": "pca"}, r"--normalize: expected one of"),
        ({"steps": (1, 1)}, r"--steps: expected different indices"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainSAEConfig.of(store=store, out=tmp_path, **{**SMALL, **wrong})
    config = TrainSAEConfig.of(store=store, out=tmp_path / "x", site=SITE, k=200)
    with pytest.raises(ValueError, match=r"number of atoms \(128\), got 200"):
        train_sae(config)
    assert not (tmp_path / "x").exists()


def test_every_field_of_the_config_is_read():
    """As `config.site`, or `config.data.rows`; a group may first be given a name, such as that of its class."""
    folders = {Path(module.__file__).parent for module in (train, kinds, folder)}
    files = (file for at in folders for file in at.glob("*.py") if file.name != "config.py")
    read = {("config", "preset")}  # the command line reads that one, before there is a config
    for tree in (ast.parse(file.read_text()) for file in files):
        named = {
            target.id: value.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target, value in pairs_of(node)
            if isinstance(target, ast.Name) and isinstance(value, ast.Attribute)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
                at = node.value
                name = at.attr if isinstance(at, ast.Attribute) else named.get(at.id, at.id)
                read.add((name, node.attr))
    for field in dataclasses.fields(TrainSAEConfig):
        if dataclasses.is_dataclass(field.default):
            for inner in dataclasses.fields(field.default):
                assert (field.name, inner.name) in read
        else:
            assert ("config", field.name) in read


def pairs_of(node):
    """(target, value) of an assignment, one by one where it assigns several."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=True)
        else:
            yield target, node.value


def test_settings_have_one_name_each_and_an_unknown_one_is_refused(store, tmp_path):
    config = TrainSAEConfig.of(store=store, out=tmp_path, **SMALL)
    groups = [group for group in vars(config).values() if dataclasses.is_dataclass(group)]
    names = [field.name for one in (config, *groups) for field in dataclasses.fields(one)]
    assert len(names) == len(set(names)) == len(config.flat()) + len(groups)
    other = config.replace(lr=0.5, k=2, site="double.7.img")
    changed = {name for name, value in other.flat().items() if value != config.flat()[name]}
    assert changed == {"lr", "k", "site"} and other.optimizer.lr == 0.5
    for make in (TrainSAEConfig.of, config.replace):
        with pytest.raises(TypeError, match=r"settings of TrainSAEConfig, got speed"):
            make(store=store, out=tmp_path, **SMALL, speed=3)
    with pytest.raises(ValueError, match=r"--k: expected a whole number"):
        config.replace(k=0)


def test_what_a_resumed_run_may_change_is_nothing_to_sweep():
    free = resumable(TrainSAEConfig)
    assert {"store", "out", "mesh", "memory", "eval_rows", "resume"} < free
    assert not free & {"site", "seed", "rows", "fit_rows", "lr"}
    assert growing(TrainSAEConfig) == {"rows"}
    assert not free & sweepable(TrainSAEConfig)
    assert {"lr", "k", "seed", "normalize"} < sweepable(TrainSAEConfig)
    assert not sweepable(TrainSAEConfig) & {"site", "batch", "rows", "target", "sweep"}
