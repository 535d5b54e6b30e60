"""A training that starts from a dictionary does before its first step what the dictionary does."""

from __future__ import annotations

import json

import pytest

from harvest.store import open_store
from jaxdict.dictionary import load_dictionary
from jaxdict.export.config import ExportConfig
from jaxdict.export.export import export
from jaxdict.metrics import measure_dictionary
from jaxdict.rows import source_of
from jaxdict.runs.folder import read_lines, read_run
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training.train import train_sae
from tests.jaxdict.command import raw, weights
from tests.jaxdict.planted import SITE, write_planted_store

PARTNER = "double.1.img"
SMALL = {"site": SITE, "k": 4, "batch": 64, "rows": 64 * 6, "eval_rows": 10**6}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    place = tmp_path_factory.mktemp("start") / "store"
    return write_planted_store(place, images=20, more={PARTNER: (16, 12)})


def config(store, out, **settings):
    return TrainSAEConfig.of(store=store, out=out, **{**SMALL, **settings})


def first_fvu(run):
    line = read_lines(run / "metrics.jsonl")[0]
    assert (line["kind"], line["step"]) == ("heldout", 0)
    return line["fvu"]


def fvu_of(dictionary, store):
    rows = source_of(open_store(store), SITE, split="validation")
    return measure_dictionary(load_dictionary(dictionary), rows, name="").summary()["fvu"]


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "topk", "normalize": "whiten"},
        {"kind": "jumprelu", "ema": 0.9},
        {"kind": "batchtopk", "target": PARTNER},
    ],
    ids=lambda one: one["kind"],
)
def test_the_first_error_is_that_of_the_dictionary(settings, store, tmp_path, capsys):
    old = config(store, tmp_path / "old", atoms=48, **settings)
    train_sae(old)
    export(ExportConfig(run=old.out, out=tmp_path / "dictionary"))
    wanted = fvu_of(tmp_path / "dictionary", store)
    capsys.readouterr()
    for name in ("dictionary", "old"):
        new = config(store, tmp_path / f"of-{name}", **settings, init_from=tmp_path / name)
        train_sae(new)
        assert first_fvu(new.out) == pytest.approx(wanted, rel=1e-4), name
        assert f"held-out FVU {wanted:.4f} raw before the first step" in capsys.readouterr().err
        kept = read_run(new.out)["init_from"]
        assert kept["path"] == str(tmp_path / name) and kept["m"] == 48 and kept["xxh3_128"]
    export(ExportConfig(run=new.out, out=tmp_path / "tuned"))
    assert json.loads((tmp_path / "tuned" / "card.json").read_text())["init_from"] == kept


def test_other_kinds_a_sweep_and_a_resume_without_the_dictionary(store, tmp_path):
    old = config(store, tmp_path / "old", atoms=48, kind="relu")
    train_sae(old)
    export(ExportConfig(run=old.out, out=tmp_path / "dictionary"))
    file = tmp_path / "dictionary" / "dictionary.safetensors"
    new = config(
        store, tmp_path / "new", kind="jumprelu", init_from=file, sweep=("lr=1e-3,2e-3",), k=2
    )
    train_sae(new)
    names = [f"lr={lr}" for lr in ("0.001", "0.002")]
    assert first_fvu(new.out / names[0]) == first_fvu(new.out / names[1])
    before = [raw(weights(new.out / name)[1]) for name in names]
    (tmp_path / "dictionary").rename(tmp_path / "gone")
    train_sae(new.replace(resume=True))
    assert [raw(weights(new.out / name)[1]) for name in names] == before


def test_what_does_not_fit_is_refused_in_a_line(store, tmp_path):
    old = config(store, tmp_path / "old", atoms=48, rows=64)
    train_sae(old)
    for wrong, message in (
        ({"atoms": 32}, r"--atoms: expected the 48 of .*old \(--init-from\), got 32"),
        ({"site": PARTNER}, r"--site: expected the width 16 of .*old \(--init-from\), got 12"),
        ({"target": PARTNER}, r"--target: expected no target, for the rows of .*'double"),
        ({"init": "rows"}, r"--init: expected no other start, got 'rows'"),
        ({"init_from": tmp_path / "nothing"}, r"dictionary folder at .*found nothing"),
    ):
        new = config(store, tmp_path / "new", **{"init_from": old.out, **wrong})
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            train_sae(new)
        assert not new.out.exists()
