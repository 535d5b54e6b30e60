"""`jaxdict inspect` on a real store, run and dictionary, and on what is none of them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harvest.store import StoreSpec, create_store, open_store
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.dictionary.files import save_dictionary
from jaxdict.inspect.config import InspectConfig
from jaxdict.inspect.inspect import inspect
from jaxdict.runs.folder import METRICS, SUMMARY, Log, open_run, write_json


def make_store(path, *, shards=(0, 1, 2), change=lambda x: x, **spec):
    """Two sites of 5 images; `change` maps the rows of the image stream."""
    given = {
        "sites": {"double.2.img": (6, 4), "double.2.txt": (3, 4)},
        "images": 5,
        "steps": 2,
        "prompts": ["a", "b", "c", "d", "e"],
        "seeds": range(5),
        "split": [0, 1, 0, 0, 0],
        "sigmas": [1.0, 0.5],
        "timesteps": [1000.0, 500.0],
        "grid": (2, 3),
        "words": [["x", "y", "z"]] * 5,
        "picture": (4, 6),
        "attrs": {
            "model": {"name": "toy", "dtype": "bfloat16", "quantization": "nf4"},
            "guidance": 3.5,
            "config": {"seed": 7},
        },
        "images_per_shard": 2,
    }
    made = StoreSpec(**given | spec)
    writer = create_store(path, made)
    for shard in shards:
        where = writer.images_of(shard)
        count = where.stop - where.start
        rng = np.random.default_rng(shard)
        values = {
            site: rng.uniform(1, 2, size=(count, made.steps, *shape))
            for site, shape in made.sites.items()
        }
        values["double.2.img"] = change(values["double.2.img"])
        writer.write(shard, values, np.ones((count, 4, 6, 3), np.uint8))
    return path


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store", shards=(0, 1))


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
    norms = np.linalg.norm(rows.astype(float), axis=1)
    np.testing.assert_allclose(site["mean norm"], norms.mean(), rtol=0.02)  # bins are 9% wide
    by_step = norms.reshape(4, 2, 6).mean((0, 2))
    np.testing.assert_allclose(site["mean norm by step"], by_step, rtol=0.03)
    assert site["max"] == np.abs(rows).max() and site["massive"] == 0
    stored = sum(p.stat().st_size for p in (store / "sites/double.2.img").rglob("*") if p.is_file())
    assert site["disk"] == stored
    first, second = (line for line in text.splitlines() if line.startswith("  double.2.img"))
    assert "5 x 2 x 6 x 4" in first and "48" in first and "384 B" in first
    assert f"{site['rms norm']:.4g}" in first and f"{site['mean norm']:.4g}" in first
    assert second.split()[1:] == [f"{x:.4g}" for x in site["mean norm by step"]]
    assert "step 0 (1)  step 1 (0.5)" in text
    assert json.loads(json.dumps(facts))["what"] == "store"


def test_massive_rows_are_told(tmp_path):
    path = make_store(tmp_path / "s", change=lambda x: x * (1 + 99 * (np.arange(6) == 2))[:, None])
    site = inspect(InspectConfig(str(path)))["sites"]["double.2.img"]
    assert (
        site["massive"] == pytest.approx(1 / 6) and site["massive by step"] == [site["massive"]] * 2
    )


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
    open_run(out, described, resume=False)
    log = Log(out / METRICS, step=0)
    log.write(kind="train", step=1, loss=0.5)
    log.write(kind="held-out", step=1, fvu=0.25)
    log.write(kind="train", step=2, loss=0.125)
    log.close()
    with (out / METRICS).open("a") as file:
        file.write('{"kind": "train", "st')  # a kill may cut the last line
    facts = inspect(InspectConfig(out))
    text = capsys.readouterr().out
    assert facts["config"]["k"] == 16 and "train sae" in text and "unfinished" in text
    assert facts["metrics"]["train"]["loss"] == 0.125
    assert facts["metrics"]["held-out"]["fvu"] == 0.25 and "0.125" in text
    write_json(out / SUMMARY, {"heldout": {"fvu": 0.0625}})
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


def test_a_store_before_its_first_image(tmp_path, capsys):
    path = make_store(tmp_path / "s", shards=())
    site = inspect(InspectConfig(str(path)))["sites"]["double.2.txt"]
    assert (
        site["rms norm"] is None and site["rows"] == 0 and "0 of 5 done" in capsys.readouterr().out
    )
    with pytest.raises(ValueError, match="no finished image yet; run its harvest again"):
        inspect(InspectConfig(str(path), spectrum=True))
    assert inspect(InspectConfig(str(path), verify=True))["problems"] == []


def test_steps_and_tokens_that_were_chosen_are_told(tmp_path, capsys):
    path = make_store(
        tmp_path / "s",
        sites={"double.2.img": (4, 4), "double.2.txt": (3, 4)},
        denoising_steps=9,
        step_numbers=(2, 7),
        positions={"img": np.tile([0, 2, 3, 5], (5, 1))},
        compress="zstd",
    )
    inspect(InspectConfig(str(path)))
    text = capsys.readouterr().out
    assert "2 of 9 (2 7), sigma 1 0.5" in text and "a sample is kept of each image" in text
    assert "step 2 (1)  step 7 (0.5)" in text and "zstd" in text


def test_sites_are_chosen_by_name_or_glob(store):
    chosen = inspect(InspectConfig(str(store), sites=("*.*.txt",)))["sites"]
    assert list(chosen) == ["double.2.txt"]
    both = inspect(InspectConfig(str(store), sites=("double.2.txt, double.2.img",)))["sites"]
    assert list(both) == ["double.2.img", "double.2.txt"]
    with pytest.raises(
        ValueError, match=r"--sites: .* holds no site 'double.\*'; it holds double.2.i"
    ):
        inspect(InspectConfig(str(store), sites=("double.*",)))


def test_the_spectrum_is_shown_where_asked(store, tmp_path, capsys):
    assert "spectrum" not in inspect(InspectConfig(str(store)))["sites"]["double.2.img"]
    capsys.readouterr()
    facts = inspect(
        InspectConfig(str(store), spectrum=True, rows=20, out=tmp_path / "x" / "o.json")
    )
    found = facts["sites"]["double.2.img"]["spectrum"]
    assert 20 <= found["rows"] < 48 and list(found["shares"]) == ["1", "2", "4"]
    assert found["shares"]["4"] == pytest.approx(1)
    text = capsys.readouterr().out
    assert "share of variance" in text and f"{100 * found['shares']['1']:.3g}%" in text
    assert json.loads((tmp_path / "x" / "o.json").read_text()) == json.loads(json.dumps(facts))
    assert "o.json" in text


def test_a_sound_store_is_verified(store, capsys):
    assert inspect(InspectConfig(str(store), verify=True))["problems"] == []
    assert "every chunk is sound" in capsys.readouterr().out


def jaxdict(*words):
    return subprocess.run([sys.executable, "-m", "jaxdict", *words], capture_output=True, text=True)


def test_a_damaged_store_is_one_line_and_an_exit_status(store, tmp_path):
    for name in ("sites/double.2.img/c/1/0/0/0", "norms/double.2.txt/c/0/0/0"):
        data = bytearray((store / name).read_bytes())
        data[40] ^= 1
        (store / name).write_bytes(data)
    done = jaxdict("inspect", str(store), "--verify", "--out", str(tmp_path / "o.json"))
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"jaxdict: found 2 problems in {store}; the first: ")
    assert "Traceback" not in done.stderr
    for name in ("sites/double.2.img/c/1/0/0/0", "norms/double.2.txt/c/0/0/0"):
        assert f"{name} is damaged" in done.stdout
    assert "delete its file images/done/c/<shard>" in done.stdout
    assert len(json.loads((tmp_path / "o.json").read_text())["problems"]) == 2


def test_a_damaged_shard_is_made_again_as_the_hint_says(store):
    data = bytearray((store / "sites/double.2.img/c/1/0/0/0").read_bytes())
    data[40] ^= 1
    (store / "sites/double.2.img/c/1/0/0/0").write_bytes(data)
    (store / "images/done/c/1").unlink()
    assert make_store(store) == store
    assert inspect(InspectConfig(str(store), verify=True))["done"] == 5


def test_two_stores_are_compared(tmp_path, capsys):
    first = make_store(tmp_path / "a")
    second = make_store(tmp_path / "b", shards=(0, 2), change=lambda x: x * [1.0, 0.0, 1.0, 1.0])
    facts = inspect(InspectConfig(str(first), compare=str(second)))["compare"]
    assert facts["images"] == 3 and set(facts["sites"]) == {"double.2.img", "double.2.txt"}
    same, other = facts["sites"]["double.2.txt"], facts["sites"]["double.2.img"]
    assert (same["rows"], same["relative error"], same["cosine"]) == (18, 0, pytest.approx(1))
    rows = open_store(first).read("double.2.img", [0, 1, 4]).astype(float)
    error = np.sqrt((rows[..., 1] ** 2).sum() / (rows**2).sum())
    assert other["relative error"] == pytest.approx(error)
    text = capsys.readouterr().out
    assert "on 3 images finished in both" in text and "cosine by step" in text
    assert f"{error:.4g}" in text
    few = inspect(InspectConfig(str(first), compare=str(second), images=2, sites=("*.*.img",)))
    assert few["compare"]["images"] == 2 and list(few["compare"]["sites"]) == ["double.2.img"]


def test_plots_are_drawn(store, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    facts = inspect(InspectConfig(str(store), plot=tmp_path / "new" / "plots"))
    assert [Path(p).name for p in facts["plots"]] == ["norms.png", "spectrum.png"]
    assert all(Path(p).parent == tmp_path / "new" / "plots" for p in facts["plots"])
    assert sorted(p.name for p in (tmp_path / "new" / "plots").iterdir()) == [
        "norms.png",
        "spectrum.png",
    ]
    assert "norms.png" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["sites", "spectrum", "verify", "compare", "plot"])
def test_what_only_a_store_has_is_refused_elsewhere(tmp_path, flag):
    (tmp_path / "config.json").write_text("{}")
    value = {"sites": ("a",), "compare": "x", "plot": tmp_path}.get(flag, True)
    with pytest.raises(ValueError, match=f"--{flag}: expected an activation store, but .* is none"):
        inspect(InspectConfig(str(tmp_path), **{flag: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": ""}, "--path: expected a folder or a URL, got ''"),
        ({"rows": 1}, "--rows: expected at least 2 rows, got 1"),
        ({"images": -1}, "--images: expected a number of at least 0, got -1"),
        ({"sites": ("",)}, "--sites: expected names or globs of sites"),
    ],
)
def test_a_wrong_setting_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        InspectConfig(**{"path": "x", **change})
