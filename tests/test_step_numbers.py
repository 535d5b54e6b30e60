"""One meaning of "step" wherever a user sees it: of a store that captured steps 2 and 6, all verbs say 2 and 6."""

from __future__ import annotations

import json
import re
from contextlib import redirect_stdout

import pytest

from harvest.store import open_store
from interp.index import load_index
from jaxdict import cli
from tests.jaxdict.planted import SITE, write_planted_store

STEPS = [2, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store, dictionaries of both kinds made of it, and what was printed meanwhile."""
    made = tmp_path_factory.mktemp("steps")
    store = write_planted_store(made / "store", images=20, numbers=tuple(STEPS))
    shared = ["--store", str(store), "--site", SITE, "--k", "3", "--batch", "64", "--rows", "256"]
    for kind, flags in (("sae", ["--steps", "0", "1"]), ("itda", [])):
        out = made / kind
        with (made / f"{kind}.txt").open("w") as told, redirect_stdout(told):
            cli.call(["train", kind, *shared, *flags, "--atoms", "24", "--out", str(out)])
            cli.call(["export", str(out), "--out", str(out / "dictionary")])
    return made


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def indexed(folder, kind, *flags):
    out = folder / f"index-{kind}{len(flags)}"
    words = ["--dictionary", str(folder / kind / "dictionary"), "--store", str(folder / "store")]
    cli.call(["interp", "index", *words, "--split", "all", "--out", str(out), *flags])
    return out


@pytest.mark.parametrize("kind", ["sae", "itda"])
def test_held_out_numbers_of_a_run(folder, kind):
    measured = [
        line for line in lines(folder / kind / "metrics.jsonl") if line["kind"] == "heldout"
    ]
    assert measured and all(list(line["fvu_per_step"]) == ["2", "6"] for line in measured)


def test_eval(folder):
    out = folder / "eval.json"
    words = [str(folder / "sae" / "dictionary"), "--store", str(folder / "store")]
    cli.call(["eval", *words, "--out", str(out)])
    found = json.loads(out.read_text())
    assert [(one["step"], one["captured"]) for one in found["steps"]] == [(2, 0), (6, 1)]
    for one in (found["metrics"], *found["baselines"].values()):
        assert list(one["fvu_per_step"]) == list(one["fvu_standardized_per_step"]) == ["2", "6"]


@pytest.mark.parametrize("kind", ["sae", "itda"])
def test_index_and_report(folder, kind):
    index = load_index(indexed(folder, kind))
    assert index.facts["steps"] == STEPS and index.facts["captured_steps"] == [0, 1]
    assert set(index.example_step[index.example_image >= 0]) == set(STEPS)
    if kind == "itda":
        source = index.source
        assert set(source[:, 1]) == set(STEPS)
        told = open_store(folder / "store").step_numbers
        captured = json.loads((folder / kind / "dictionary" / "card.json").read_text())["sources"]
        assert captured["denoising_step"] == told.tolist()
    cli.call(
        [
            "interp",
            "report",
            "--index",
            str(folder / f"index-{kind}0"),
            "--out",
            str(folder / kind / "page"),
        ]
    )
    pages = "".join(page.read_text() for page in (folder / kind / "page").rglob("*.html"))
    assert set(re.findall(r"\bstep (\d+)\b", pages)) == {"2", "6"}


def test_inspect(folder, capsys):
    cli.call(["inspect", str(folder / "store")])
    assert set(re.findall(r"\bstep (\d+)\b", capsys.readouterr().out)) == {"2", "6"}


def test_flags_that_take_a_captured_index_print_both(folder, capsys):
    index = load_index(indexed(folder, "sae", "--steps", "1"))
    assert index.facts["steps"] == [6] and index.facts["captured_steps"] == [1]
    assert set(index.example_step[index.example_image >= 0]) == {6}
    both = "--steps: captured 0, 1, which are the denoising steps 2, 6"
    assert both in (folder / "sae.txt").read_text()
    assert "captured" not in (folder / "itda.txt").read_text()
    words = ["--store", str(folder / "store"), "--site", SITE, "--k", "3", "--rows", "128"]
    words += ["--batch", "64", "--atoms", "16", "--out", str(folder / "one"), "--steps"]
    cli.call(["train", "itda", *words, "1"])
    assert capsys.readouterr().out.count("captured 1, which are the denoising steps 6") == 2
    measured = [line for line in lines(folder / "one/metrics.jsonl") if line["kind"] == "heldout"]
    assert measured and list(measured[-1]["fvu_per_step"]) == ["6"]
    for kind in ("sae", "itda"):
        none = r"captured indices below 2 \(of the denoising steps 2, 6\), got \[6\]"
        with pytest.raises(ValueError, match=none):
            cli.call(["train", kind, *words, "6"])
