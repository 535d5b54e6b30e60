"""`jaxdict inspect` on a real store, run and dictionary, and on what is none of them."""

import json

import numpy as np
import pytest

from harvest.store import StoreSpec, create_store, open_store
from jaxdict import runs
from jaxdict.config import InspectConfig
from jaxdict.export import Dictionary, save_dictionary
from jaxdict.inspect import inspect


@pytest.fixture
def store(tmp_path):
    spec = StoreSpec(
        sites={"double.2.img": (6, 4), "double.2.txt": (3, 4)},
        images=5,
        steps=2,
        prompts=["a", "b", "c", "d", "e"],
        seeds=range(5),
        split=[0, 1, 0, 0, 0],
        sigmas=[1.0, 0.5],
        timesteps=[1000.0, 500.0],
        grid=(2, 3),
        words=[["x", "y", "z"]] * 5,
        picture=(4, 6),
        attrs={
            "model": {"name": "toy", "dtype": "bfloat16", "quantization": "nf4"},
            "guidance": 3.5,
            "config": {"seed": 7},
        },
        images_per_shard=2,
    )
    writer = create_store(tmp_path / "store", spec)
    rng = np.random.default_rng(0)
    for shard in (0, 1):
        values = {s: rng.normal(size=(2, 2, *shape)) for s, shape in spec.sites.items()}
        writer.write(shard, values, np.zeros((2, 4, 6, 3), np.uint8))
    return tmp_path / "store"


def test_a_store(store, capsys):
    facts = inspect(InspectConfig(store))
    text = capsys.readouterr().out
    assert "toy, bfloat16, nf4" in text and "4 of 5 done (3 train, 1 validation)" in text
    assert "2 x 3 image, 3 text" in text and "4 x 6 pixels" in text and "sigma 1 0.5" in text
    assert "unfinished" in text
    rows = open_store(store).read("double.2.img", [0, 1, 2, 3]).reshape(-1, 4)
    site = facts["sites"]["double.2.img"]
    assert (site["shape"], site["rows"], site["bytes"]) == ([5, 2, 6, 4], 48, 384)
    np.testing.assert_allclose(site["rms norm"], np.sqrt((rows.astype(float) ** 2).sum(1).mean()))
    line = next(line for line in text.splitlines() if line.startswith("  double.2.img"))
    assert "5 x 2 x 6 x 4" in line and "48" in line and "384 B" in line
    assert f"{site['rms norm']:.4g}" in line
    assert json.loads(json.dumps(facts))["what"] == "store"


def test_a_dictionary(tmp_path, capsys):
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(6, 4)).astype(np.float32)
    card = {
        "site": "double.2.img",
        "model": {"name": "toy"},
        "metrics": {"split": "validation", "fvu": 0.12345678, "by_step": {"0": 0.5}},
        "folding_error": {"relative": 1e-7},
    }
    zeros = np.zeros(6, np.float32)
    made = Dictionary("topk", 2, atoms, None, atoms, zeros, typical=zeros, card=card)
    save_dictionary(made, tmp_path / "dictionary")
    facts = inspect(InspectConfig(tmp_path / "dictionary"))
    text = capsys.readouterr().out
    assert (facts["what"], facts["kind"], facts["m"], facts["d"], facts["k"]) == (
        *("dictionary", "topk", 6, 4, 2),
    )
    assert facts["tensors"]["encoder"] == [6, 4] and facts["tensors"]["encoder_bias"] == [6]
    assert facts["metrics"]["by_step.0"] == 0.5
    assert "toy" in text and "0.123457" in text and "relative 1e-07" in text
    (tmp_path / "dictionary" / "dictionary.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"expected tensors in .*export it again"):
        inspect(InspectConfig(tmp_path / "dictionary"))


def test_a_run(tmp_path, capsys):
    out = tmp_path / "run"
    described = {
        "verb": "train sae",
        "kind": "topk",
        "config": {"k": 16, "store": "s"},
        "store": {},
    }
    runs.open_run(out, described, resume=False)
    log = runs.Log(out / runs.METRICS, step=0)
    log.write(kind="train", step=1, loss=0.5)
    log.write(kind="held-out", step=1, fvu=0.25)
    log.write(kind="train", step=2, loss=0.125)
    log.close()
    with (out / runs.METRICS).open("a") as file:
        file.write('{"kind": "train", "st')  # a kill may cut the last line
    facts = inspect(InspectConfig(out))
    text = capsys.readouterr().out
    assert facts["config"]["k"] == 16 and "train sae" in text and "unfinished" in text
    assert facts["metrics"]["train"]["loss"] == 0.125
    assert facts["metrics"]["held-out"]["fvu"] == 0.25 and "0.125" in text
    runs.write_json(out / runs.SUMMARY, {"heldout": {"fvu": 0.0625}})
    assert inspect(InspectConfig(out))["summary"] == {"heldout.fvu": 0.0625}
    assert "0.0625" in capsys.readouterr().out


def test_a_file_inside_stands_for_its_folder(store):
    assert inspect(InspectConfig(store / "zarr.json"))["what"] == "store"


def test_what_is_nothing_is_refused(tmp_path, store):
    with pytest.raises(ValueError, match="nothing is there"):
        inspect(InspectConfig(tmp_path / "missing"))
    with pytest.raises(ValueError, match=r"found none of zarr.json.*try one of its folders: store"):
        inspect(InspectConfig(tmp_path))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON in .*a damaged file"):
        inspect(InspectConfig(tmp_path / "bad"))
