"""What was made from a store goes on working when the store has grown since."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harvest.config import HarvestConfig
from harvest.run import harvest
from harvest.store import as_it_was, before, expect_from, made_again, open_store
from interp.config import IndexConfig, ReportConfig
from interp.index.build import build_index
from interp.report.report import write_report
from jaxdict.compare.compare import compare
from jaxdict.compare.config import CompareConfig
from jaxdict.dictionary.files import load_dictionary, save_dictionary
from jaxdict.evaluate.config import EvalConfig
from jaxdict.evaluate.evaluate import evaluate
from jaxdict.export.config import ExportConfig
from jaxdict.export.export import export
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.labels import pictures
from jaxdict.itda.train import train_itda
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training.train import train_sae

IMG, TXT = "double.2.img", "double.1.txt"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A store of 4 images and what was made from it; then one of 5, and a run; then one of 6 with one more site."""
    root = tmp_path_factory.mktemp("grown")
    config = HarvestConfig(
        out=root / "store",
        sites=(IMG,),
        images=4,
        steps=1,
        batch=2,
        images_per_shard=8,
        max_sequence_length=16,
        validation=0.5,
        device="cpu",
    )
    harvest(config)
    store = open_store(config.out)
    assert len(store.indices("train")) and len(store.indices("validation"))
    train_sae(sae(root))
    train_itda(itda(root))
    for name in ("sae", "itda"):
        export(ExportConfig(run=root / name, out=root / f"{name}-dictionary"))
    index = IndexConfig(root / "itda-dictionary", config.out, root / "index", split="all")
    build_index(replace(index, device="cpu"))
    harvest(replace(config, images=5))
    train_sae(sae(root, out=root / "five"))
    harvest(replace(config, images=6, sites=(IMG, TXT)))
    return root


def sae(root, **changes):
    small = {"atoms": 32, "k": 4, "batch": 64, "rows": 64 * 12, "warmup": 2, "save_every": 4}
    usual = {"store": root / "store", "out": root / "sae", "site": IMG, "precision": "float32"}
    return TrainSAEConfig.of(**{**usual, **small, **changes})


def itda(root, **changes):
    config = TrainITDAConfig(root / "store", IMG, root / "itda", k=4, threshold=0.3, batch=32)
    return replace(config, save_every=2, eval_every=2, **changes)


def cut(run, to):
    """A copy of a finished run as a kill before its last checkpoint leaves it."""
    shutil.copytree(run, to)
    steps = sorted(int(path.name) for path in (to / "checkpoints").glob("[0-9]*"))
    assert len(steps) > 1
    shutil.rmtree(to / "checkpoints" / str(steps[-1]))
    for name in ("summary.json", "atoms.safetensors", "sources.json"):
        (to / name).unlink(missing_ok=True)
    return to


def arrays(folder):
    found = load_dictionary(folder)
    names = ("atoms", "bias", "encoder", "typical", "source", "mean")
    return {
        name: np.asarray(value) for name in names if (value := getattr(found, name)) is not None
    }


def test_a_store_tells_what_it_held_before(root):
    store = open_store(root / "store")
    first, five = (
        json.loads((root / name / "config.json").read_text()) for name in ("sae", "five")
    )
    held = before(store, first["store"]["fingerprint"])
    assert held is not None and (held.images, held.sites) == (4, (IMG,))
    assert list(made_again(store, held)) == []
    fifth = before(store, five["store"]["fingerprint"])
    assert fifth is not None and list(made_again(store, fifth)) == [4]
    assert before(store, "f" * 64) is None
    then = as_it_was(store, held)
    assert then.sites == (IMG,) and then.read(IMG).shape[0] == len(then.prompts) == 4
    assert then.fingerprint == held.fingerprint
    np.testing.assert_array_equal(then.split, store.split[:4])
    with pytest.raises(ValueError, match="image"):
        then.read(IMG, [4])


@pytest.mark.parametrize("name", ["sae", "itda"])
def test_export_is_to_the_bit_what_it_was(root, tmp_path, capsys, name):
    export(ExportConfig(run=root / name, out=tmp_path / "again"))
    line = rf"store has grown since the run in \S+{name} was made: 2 of its 6 images are newer; {TXT} added"
    assert re.search(line, capsys.readouterr().out)
    one, two = arrays(root / f"{name}-dictionary"), arrays(tmp_path / "again")
    assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)
    cards = [
        load_dictionary(path).card for path in (root / f"{name}-dictionary", tmp_path / "again")
    ]
    assert cards[0]["store_fingerprint"] == cards[1]["store_fingerprint"]


@pytest.mark.parametrize(
    ("name", "train", "config"), [("sae", train_sae, sae), ("itda", train_itda, itda)]
)
def test_a_run_that_was_cut_goes_on_to_the_same_bits(root, tmp_path, capsys, name, train, config):
    out = cut(root / name, tmp_path / "run")
    train(config(root, out=out, resume=True))
    assert "2 of its 6 images are newer" in capsys.readouterr().out
    export(ExportConfig(run=out, out=tmp_path / "d"))
    one, two = arrays(root / f"{name}-dictionary"), arrays(tmp_path / "d")
    assert one.keys() == two.keys() and all((one[key] == two[key]).all() for key in one)


def test_a_run_whose_rows_were_made_again_is_not_resumed(root, tmp_path):
    out = cut(root / "five", tmp_path / "run")
    again = r"cannot resume \S+run: \S+ has grown from 5 to 6 images, and the rows of images 4 to 4 were made again"
    with pytest.raises(
        ValueError, match=again + r".*\(--images 5\), or begin a new run"
    ) as refused:
        train_sae(sae(root, out=out, resume=True))
    assert "\n" not in str(refused.value)


def test_eval_compare_index_report_and_labels_take_it(root, tmp_path, capsys):
    store, dictionary = root / "store", root / "itda-dictionary"
    found = evaluate(
        EvalConfig(dictionary, store, tmp_path / "eval.json", random=False, plots=False)
    )
    assert "2 of its 6 images are newer" in capsys.readouterr().out
    assert (found["same_store"], found["newer_images"]) == (True, 2)
    newer = load_dictionary(dictionary)
    card = newer.card | {"store_fingerprint": open_store(store).fingerprint}
    save_dictionary(replace(newer, card=card), tmp_path / "newer")
    shutil.copytree(dictionary, tmp_path / "copy")
    for other, line in (("copy", "2 of its 6 images are newer"), ("newer", "")):
        paths = (dictionary, tmp_path / other)
        made = compare(
            CompareConfig(paths, tmp_path / f"c-{other}", store=(str(store),), plots=False)
        )
        assert line in capsys.readouterr().out
        np.testing.assert_allclose(np.array(list(made["measures"].values()), float), 1, atol=1e-6)
    config = ReportConfig(index=root / "index", out=tmp_path / "report", features=2)
    write_report(config)
    assert re.search(r"since the index \S+ was made: 2 of its 6 images", capsys.readouterr().out)
    build_index(IndexConfig(dictionary, store, tmp_path / "index", split="all", device="cpu"))
    facts = json.loads(next((tmp_path / "index").glob("index.json")).read_text())
    assert facts["store"]["trained_on"] and facts["source_prompts"]
    held = load_dictionary(dictionary)
    assert held.source is not None
    drawn = pictures(held, open_store(store), [0])
    np.testing.assert_array_equal(drawn[0], open_store(store).pictures([held.source[0, 0]])[0])


def test_a_copy_without_the_file_beside_it_is_told_in_one_line(root, tmp_path):
    shutil.copytree(root / "store", tmp_path / "copy")
    config = ExportConfig(run=root / "sae", out=tmp_path / "d", store=tmp_path / "copy")
    for beside in (None, '{"passes": [{"fingerprint": "other"}]}', "torn {"):
        if beside is not None:
            (tmp_path / "copy.passes.json").write_text(beside)
        with pytest.raises(
            ValueError, match=r"no \S+copy.passes.json that says what it grew"
        ) as refused:
            export(config)
        assert "\n" not in str(refused.value)
    shutil.copy(root / "store.passes.json", tmp_path / "copy.passes.json")
    export(config)
    known = json.loads((root / "sae" / "config.json").read_text())["store"]["fingerprint"]
    assert expect_from(open_store(tmp_path / "copy"), known, "it").images == 4


def test_a_copy_that_grows_further_tells_what_it_grew_from(root, tmp_path):
    out: Path = tmp_path / "copy"
    shutil.copytree(root / "store", out)
    was = open_store(out).fingerprint
    (tmp_path / "copy.passes.json").write_text('{"passes": [{"fingerprint": "other"}]}')
    harvest(
        HarvestConfig(
            out=out,
            sites=(IMG, TXT),
            images=7,
            steps=1,
            max_sequence_length=16,
            validation=0.5,
            device="cpu",
        )
    )
    store = open_store(out)
    held = before(store, was)
    assert held is not None and held.images == 6
    assert before(store, "other") is None, "of another store"
