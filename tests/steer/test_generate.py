"""The verb `steer` on the embedded model, and the settings of the room."""

from __future__ import annotations

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import steer.config
from harvest.models.files import EMBEDDED
from harvest.models.pipelines import load_model
from jaxdict import cli
from jaxdict.dictionary.files import save_dictionary
from steer.config import SteerConfig, SteerEvalConfig, parse_region, parse_steps, parse_tag
from steer.generate import steer as run_steer

PROMPT = "a large red solid circle in the centre, white background"


@pytest.fixture
def dictionary(tmp_path, random_dictionary):
    made = random_dictionary("topk", d=128, site="double.2.img")
    made.card["model"] = {"name": "shapes"}
    return save_dictionary(made, tmp_path / "dictionary")


@pytest.fixture
def config(tmp_path, dictionary):
    def make(**fields):
        base = {"dictionary": dictionary, "feature": 3, "value": 40.0, "prompt": PROMPT}
        base |= {"out": tmp_path / "out", "num_steps": 2, "region": "2,2,6,6"}
        return SteerConfig(**(base | fields))

    return make


def picture(folder, name):
    return np.asarray(Image.open(folder / f"{name}.png"))


def test_steer_writes_before_after_difference_sheet_and_config(config, capsys):
    made = config()
    summary = run_steer(made)
    before, after = picture(made.out, "before"), picture(made.out, "after")
    expected = load_model("shapes").generate([PROMPT], [0], steps=2)[0]
    np.testing.assert_array_equal(before, expected)
    assert (before != after).any() and summary["largest_change"] > 0
    change = np.abs(before.astype(int) - after)
    assert summary["largest_change"] == change.max()
    white = (picture(made.out, "difference") == 255).all(-1)
    np.testing.assert_array_equal(white, (change == 0).all(-1))
    assert picture(made.out, "sheet").shape[1] > 3 * 384
    saved = json.loads((made.out / "config.json").read_text())
    assert saved["feature"] == 3 and saved["region"] == "2,2,6,6" and saved["num_steps"] == 2
    out = capsys.readouterr().out
    assert all(path in out for path in summary["files"].values())
    assert not [path.name for path in made.out.iterdir() if path.name.startswith(".")]


def test_a_value_of_zero_changes_nothing_and_an_ablation_something(config):
    made = config(value=0.0)
    assert run_steer(made)["changed_pixels"] == 0
    np.testing.assert_array_equal(picture(made.out, "before"), picture(made.out, "after"))
    everything = tuple(range(48))
    assert run_steer(config(value=0.0, ablate=everything, region="all"))["changed_pixels"] > 0


def test_a_folder_is_a_model_but_cannot_be_read_for_objects(config, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(EMBEDDED, folder)
    with pytest.raises(ValueError, match=r"--region: .* got object"):
        run_steer(config(model=str(folder), region="object"))
    summary = run_steer(config(model=str(folder), steps="1:", quantize="none"))
    assert summary["edit"] == "feature 3 + 40 typical, tokens 2,2,6,6, steps 1:"


def test_mistakes_show_before_the_model_loads(config, tmp_path, random_dictionary):
    with pytest.raises(FileNotFoundError, match="dictionary"):
        run_steer(config(dictionary=tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="feature from 0 to 47"):
        run_steer(config(feature=48, model="/no/such/model"))
    with pytest.raises(ValueError, match="no place in the picture"):
        run_steer(config(stream="txt", model="/no/such/model"))
    nameless = save_dictionary(random_dictionary("topk", d=128), tmp_path / "nameless")
    with pytest.raises(ValueError, match="--model: expected one"):
        run_steer(config(dictionary=nameless))


def test_steps_that_never_come_are_refused(config, capsys):
    never = r"--steps: expected some of the steps 0 to 1 of a picture, got '2:8'"
    with pytest.raises(ValueError, match=never):
        config(steps="2:8")
    with pytest.raises(ValueError, match=r"the steps 0 to 7 of a picture, got '8:'"):
        run_steer(config(steps="8:", num_steps=0))  # of the model's own eight
    assert not config().out.exists()
    run_steer(config(steps="1:8"))
    assert "note: --steps 1:8 goes beyond the 2 steps of a picture" in capsys.readouterr().err
    run_steer(config(steps="1:"))
    assert "note" not in capsys.readouterr().err


def test_a_picture_that_is_not_finite_is_refused(config):
    too_much = (
        r"NaN in 1 of 1 made in float16, the first of seed 0 and prompt 'a large red.*"
        r"give --dtype bfloat16 or float32, or steer by less than feature 3 \+ 1e\+06"
    )
    with pytest.raises(ValueError, match=too_much):
        run_steer(config(dtype="float16", value=1e6, units="raw"))
    assert not config().out.exists()


def test_a_site_that_the_dictionary_was_not_trained_on_is_noted(config, capsys):
    made = config(site="double.1.img")
    words = ["--dictionary", str(made.dictionary), "--feature", "3", "--site", "double.1.img"]
    words += ["--prompt", "circle", "--num-steps", "1", "--out", str(made.out)]
    cli.main(["steer", *words])
    told = capsys.readouterr().err.splitlines()
    assert (
        len([line for line in told if line.startswith("note: the dictionary was trained at")]) == 1
    )
    assert "double.2.img, but acts at double.1.img" in "".join(told)
    assert not any("UserWarning" in line for line in told)


def test_steps_regions_and_tags_as_written():
    texts = ("all", "3", "0:5", ":5", "2:")
    assert [parse_steps(text) for text in texts[:4]] == [None, (3, 4), (0, 5), (0, 5)]
    assert parse_steps("2:")[0] == 2
    assert parse_region("1, 2,3,4") == (1, 2, 3, 4)
    assert parse_region("object") == "object"
    assert parse_tag("colour = blue", "--wanted") == ("colour", "blue")
    for text in ("", ":", "5:5", "-1:3", "1:2:3", "x"):
        if text != ":":
            with pytest.raises(ValueError, match="--steps: expected"):
                parse_steps(text)
    for text in ("", "1,2,3", "3,0,3,4", "a,b,c,d", "-1,0,2,2"):
        with pytest.raises(ValueError, match="--region: expected"):
            parse_region(text)
    for text in ("blue", "colour=", "taste=sweet"):
        with pytest.raises(ValueError, match="--wanted: expected"):
            parse_tag(text, "--wanted")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feature": -1}, "--feature"),
        ({"value": float("inf")}, "--value"),
        ({"steps": "5:2"}, "--steps"),
        ({"region": "square"}, "--region"),
        ({"coverage": 0.0}, "--coverage"),
        ({"num_steps": -1}, "--num-steps"),
        ({"prompt": " "}, "--prompt"),
        ({"ablate": (-3,)}, "--ablate"),
    ],
)
def test_bad_settings_are_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_settings_and_edits_import_no_torch():
    code = "import sys, steer, steer.config, steer.edits; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_setting_is_read_and_explained():
    folder = Path(steer.config.__file__).parent
    read = {
        node.attr
        for name in ("generate", "evaluate", "pictures", "config")
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text()))
        if isinstance(node, ast.Attribute) and name != "config"
    }
    for kind in (SteerConfig, SteerEvalConfig):
        names = {field.name for field in dataclasses.fields(kind)}
        assert names <= read, names - read
    tree = ast.parse((folder / "config.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for place, item in enumerate(node.body):
                if isinstance(item, ast.AnnAssign) and item.target.id != "EXAMPLE":
                    after = node.body[place + 1]
                    assert isinstance(after, ast.Expr), item.target.id
                    assert isinstance(after.value, ast.Constant), item.target.id


def test_a_cut_prompt_is_told_once(config, capfd):
    run_steer(config(prompt="a large red circle " * 20, num_steps=1))
    told = capfd.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("note: 1 of 1 prompts are longer than 77 tokens")
