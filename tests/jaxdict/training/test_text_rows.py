"""Padding of the text through training, export, evaluation and pruning; runs and dictionaries made before."""

from __future__ import annotations

import json

import numpy as np
import pytest

from harvest.atomic import read_json, write_json
from harvest.store import open_store
from jaxdict.dictionary import load_dictionary
from jaxdict.evaluate.config import EvalConfig
from jaxdict.evaluate.evaluate import evaluate
from jaxdict.export.config import ExportConfig, PruneConfig
from jaxdict.export.export import export
from jaxdict.export.prune import prune
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.train import train_itda
from jaxdict.rows import load_normalization
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training.train import train_sae
from tests.jaxdict.texts import IMAGES, SITE, STEPS, TOKENS, lengths, write_text_store

HELD = np.arange(IMAGES) % 5 == 0
ALL = {"train": 32 * STEPS * TOKENS, "validation": 8 * STEPS * TOKENS}
REAL = {"train": STEPS * lengths()[~HELD].sum(), "validation": STEPS * lengths()[HELD].sum()}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_text_store(tmp_path_factory.mktemp("texts") / "store")


def train(kind, store, out, **settings):
    if kind == "itda":
        settings = {"k": 2, "threshold": 0.5, "rows": 0, "batch": 64, "pool": 60} | settings
        return train_itda(TrainITDAConfig(store=store, site=SITE, out=out, **settings))
    settings = {"atoms": 16, "k": 2, "rows": 640, "batch": 64, "pool": 60} | settings
    return train_sae(TrainSAEConfig.of(store=store, site=SITE, out=out, **settings))


def measured(dictionary, store, **settings):
    out = dictionary.parent / "eval.json"
    settings |= {"plots": False, "random": False, "batch": 64}
    return evaluate(EvalConfig(dictionary=dictionary, store=store, out=out, **settings))


@pytest.mark.parametrize("kind", ["topk", "itda"])
def test_a_dictionary_is_trained_and_measured_without_padding_unless_it_is_kept(
    kind, store, tmp_path, capsys
):
    for padding, rows in (("drop", REAL), ("keep", ALL)):
        run = tmp_path / padding
        summary = train(kind, store, run, padding=padding)
        left_out = ALL["train"] - rows["train"]
        told = f"{left_out:,} of {ALL['train']:,} rows of {SITE}" if left_out else "kept at"
        assert f"padding: {told}" in capsys.readouterr().out
        assert summary["heldout"]["rows"] == rows["validation"]
        assert load_normalization(run / "normalization.safetensors").rows == rows["train"]
        card = export(ExportConfig(run, run / "dictionary"))
        assert card["padding"] == load_dictionary(run / "dictionary").padding == padding
        found = measured(run / "dictionary", store)
        assert (found["metrics"]["rows"], found["padding"]) == (rows["validation"], padding)
        assert found["baselines"]["mean"]["fvu"] == pytest.approx(1, abs=0.2)
        assert found["metrics"]["fvu"] == pytest.approx(summary["heldout"]["fvu"], rel=1e-3)
        text = capsys.readouterr().out
        assert "split: validation (held out), 8 images" in text and "--split train" in text
        other = "keep" if padding == "drop" else "drop"
        found = measured(run / "dictionary", store, padding=other, split="train")
        assert found["metrics"]["rows"] == (ALL if other == "keep" else REAL)["train"]
        small = PruneConfig(run / "dictionary", store, run / "small", keep=3)
        assert prune(small)["usage_rows"] == rows["train"]


@pytest.mark.parametrize("kind", ["topk", "itda"])
def test_a_run_made_before_there_was_the_setting_keeps_its_padding(kind, store, tmp_path, capsys):
    run = tmp_path / "run"
    before = train(kind, store, run, padding="keep")
    description = read_json(run / "config.json")
    settings = description["config"]
    del (settings if kind == "itda" else settings["data"])["padding"]
    write_json(run / "config.json", description, hashed=True)
    capsys.readouterr()
    after = train(kind, store, run, resume=True)
    assert f"padding: kept at {SITE}" in capsys.readouterr().out
    assert after["heldout"] == before["heldout"]
    assert "padding" not in json.dumps(read_json(run / "config.json")["config"])
    card = export(ExportConfig(run, run / "dictionary"))
    assert card["padding"] == "keep"
    assert measured(run / "dictionary", store)["metrics"]["rows"] == ALL["validation"]
    fresh = load_normalization(run / "normalization.safetensors")
    assert fresh.rows == ALL["train"]
    with pytest.raises(ValueError, match=r"--padding = 'keep'.*got 'drop'"):
        train(kind, store, tmp_path / "keep", padding="keep")
        train(kind, store, tmp_path / "keep", padding="drop", resume=True)


def test_a_dictionary_whose_card_says_nothing_of_padding_is_measured_on_all_rows(store, tmp_path):
    train("topk", store, tmp_path / "run")
    export(ExportConfig(tmp_path / "run", tmp_path / "dictionary"))
    card = read_json(tmp_path / "dictionary" / "card.json")
    del card["padding"]
    write_json(tmp_path / "dictionary" / "card.json", card, hashed=True)
    found = measured(tmp_path / "dictionary", store)
    assert found["metrics"]["rows"] == ALL["validation"] and found["padding"] == "keep"
    assert open_store(store).unpadded(SITE) is not None
