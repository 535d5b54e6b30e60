"""`jaxdict compare` on real ITDA runs and on dictionaries whose sources are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harvest.store import StoreSpec, create_store, open_store
from jaxdict import cli
from jaxdict.compare import rows as compare_rows
from jaxdict.compare.compare import compare
from jaxdict.compare.config import CompareConfig
from jaxdict.compare.sources import find_dictionaries
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.dictionary.files import load_dictionary, save_dictionary
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.saved_run import run_to_dictionary
from jaxdict.itda.train import train_itda
from jaxdict.runs.folder import plain
from tests.jaxdict.command import Command
from tests.jaxdict.compare.test_similarity import slow_cka, slow_svcca
from tests.jaxdict.planted import SITE, write_planted_store

LATER, TXT = "single.10.img", "double.2.txt"
SITES = (SITE, LATER)


def shifted_copy(path: Path, store, *, noise: float = 0.002, **changes):
    """A store of the same images whose rows are scaled and moved dimension by dimension, and a bit noisy."""
    rng = np.random.default_rng(7)
    spec = StoreSpec(
        sites={site: store.shape(site)[2:] for site in store.sites},
        images=store.images,
        steps=store.steps,
        prompts=store.prompts,
        seeds=store.seeds.tolist(),
        split=store.split.tolist(),
        sigmas=store.sigmas.tolist(),
        timesteps=store.timesteps.tolist(),
        grid=store.grid,
        images_per_shard=8,
        attrs={"model": {"name": "planted", "quantization": "nf4"}},
    )
    writer = create_store(path, replace(spec, **changes))
    for shard in writer.pending():
        rows = {}
        for site in store.sites:
            x = store.read(site, writer.images_of(shard))
            spread = x.std((0, 1, 2))
            x = x + noise * spread * rng.normal(size=x.shape)
            d = x.shape[-1]
            rows[site] = (x * np.linspace(0.5, 2, d) + np.arange(d)).astype(np.float32)
        writer.write(shard, rows)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Two stores of the same prompts; runs of two sites of each, and with another seed of the first."""
    root = tmp_path_factory.mktemp("compare")
    first = write_planted_store(root / "first", more={LATER: (16, 12), TXT: (5, 16)})
    second = shifted_copy(root / "second", open_store(first))
    for folder, store, seed in (("a", first, 0), ("b", second, 0), ("c", first, 1)):
        for site in SITES:
            settings = {"k": 3, "threshold": 0.3, "batch": 16, "eval_rows": 64, "seed": seed}
            out = root / folder / site
            train_itda(TrainITDAConfig(store=store, site=site, out=out, **settings))
    return root


def run(out, *paths, **settings):
    """The comparison, and its JSON read back."""
    result = compare(CompareConfig(paths=paths, out=out, **{"plots": False, **settings}))
    assert json.loads((out / "compare.json").read_text()) == result
    return result


def places(run):
    """Sources of a run as tuples."""
    return set(map(tuple, run_to_dictionary(run).source.tolist()))


def shared(a, b):
    return len(a & b) / len(a | b)


def test_the_command_compares_layers_of_two_models(made, tmp_path):
    words = [made / "a", made / "b", "--store", made / "first", made / "second"]
    done = Command("compare", *map(str, words), "--rows", "0", "--out", str(tmp_path / "out"))
    printed = done.end()
    result = json.loads((tmp_path / "out/compare.json").read_text())
    assert [one["site"] for one in result["dictionaries"]] == [*SITES, *SITES]
    assert result["groups"]["by"] == "store" and "planted nf4" in result["groups"]["names"][1]

    sets = [places(made / folder / site) for folder in "ab" for site in SITES]
    wanted = [[shared(a, b) for b in sets] for a in sets]
    np.testing.assert_allclose(result["measures"]["jaccard"], wanted)
    assert wanted[0][2] > 1.3 * wanted[0][3], "the same rows are hard for both models"
    rows = [
        open_store(made / store).read(site, open_store(made / store).indices())
        for store in ("first", "second")
        for site in SITES
    ]
    rows = [x.reshape(-1, x.shape[-1]).astype(float) for x in rows]
    for i, j in ((0, 1), (0, 2), (1, 2), (2, 3)):
        cka, svcca = (result["measures"][name][i][j] for name in ("cka", "svcca"))
        assert cka == pytest.approx(slow_cka(rows[i], rows[j]), rel=1e-6)
        assert svcca == pytest.approx(slow_svcca(rows[i], rows[j], 0.99), rel=1e-6)
    assert result["rows"]["rows"] == [1280] * 4

    there, back = result["matching"]
    assert there["from"] == back["to"] == result["groups"]["names"][0]
    assert there["accuracy"]["jaccard"] == back["accuracy"]["jaccard"] == 1
    assert there["chance"]["jaccard"] == 0.5 and there["counted"]["jaccard"] == 2
    own = [result["measures"]["jaccard"][i][i + 2] for i in range(2)]
    assert there["mean_same"]["jaccard"] == pytest.approx(np.mean(own))
    assert result["between"]["jaccard"][0][1] == pytest.approx(np.mean(own))
    assert there["sites"][1]["jaccard"] == {
        "best": LATER,
        "similarity": pytest.approx(own[1]),
        "same": pytest.approx(own[1]),
        "right": True,
    }
    assert result["plots"] == ["similarity.png", "matching.png"]
    assert all((tmp_path / "out" / name).stat().st_size for name in result["plots"])
    assert "Most similar layer of" in printed and "matched" in printed and "100%" in printed


def test_seeds_are_groups_and_exported_dictionaries_are_runs(made, tmp_path):
    for site in SITES:
        save_dictionary(run_to_dictionary(made / "c" / site), tmp_path / "c" / site)
    runs_of = [made / "a" / site for site in SITES]
    result = run(tmp_path / "out", *runs_of, tmp_path / "c")
    assert result["groups"] == {"by": "seed", "names": ["seed 0", "seed 1"]}
    sets = [places(made / folder / site) for folder in "ac" for site in SITES]
    wanted = [[shared(a, b) for b in sets] for a in sets]
    np.testing.assert_allclose(result["measures"]["jaccard"], wanted)
    assert 0 < wanted[0][2] < 1 and list(result["measures"]) == ["jaccard"]
    names = [one["name"] for one in result["dictionaries"]]
    assert names == [f"{site} seed {seed}" for seed in (0, 1) for site in SITES]

    again = run(tmp_path / "out", tmp_path / "c" / SITE, made / "c" / SITE)
    assert again["measures"]["jaccard"] == [[1, 1], [1, 1]]
    assert again["groups"]["by"] == "folder"


def test_three_groups_and_every_picture(made, tmp_path):
    folders = [made / name for name in "abc"]
    result = run(tmp_path, *folders, groups="folder", plots=True)
    assert result["groups"] == {"by": "folder", "names": ["a", "b", "c"]}
    assert [(one["from"], one["to"]) for one in result["matching"]][:3] == [
        *(("a", "b"), ("b", "a"), ("a", "c"))
    ]
    pairs = [f"matching-{pair}.png" for pair in ("1-2", "1-3", "2-3")]
    assert result["plots"] == ["similarity.png", *pairs, "groups.png"]
    assert np.array(result["between"]["jaccard"]).shape == (3, 3)


def test_rows_are_the_same_read_little_by_little(made, tmp_path, monkeypatch):
    settings = {"store": (str(made / "first"), str(made / "second")), "split": "train", "rows": 300}
    whole = run(tmp_path, made / "a", made / "b", **settings)
    assert whole["rows"]["rows"] == [9 * 32] * 4, "whole images"
    monkeypatch.setattr(compare_rows, "_BLOCK", 1)
    opened = {open_store(path).fingerprint: open_store(path) for path in settings["store"]}
    dictionaries, _ = find_dictionaries([made / "a", made / "b"])
    config = CompareConfig(paths=(made,), out=tmp_path, memory_mb=1, **settings)
    object.__setattr__(config, "memory_mb", 1e-4)  # a pair at a time
    found = compare_rows.measure_rows(dictionaries, opened, config)
    order = [
        [one.path for one in dictionaries].index(Path(d["path"])) for d in whole["dictionaries"]
    ]
    for name in ("cka", "svcca"):
        values = getattr(found, name)[np.ix_(order, order)]
        np.testing.assert_allclose(values, whole["measures"][name], rtol=1e-9)


def test_standardized_rows_do_not_depend_on_the_scale_of_a_dimension(made, tmp_path):
    stores = (str(made / "first"), str(made / "second"))
    settings = {"store": stores, "rows": 0, "standardize": True}
    result = run(tmp_path, made / "a" / SITE, made / "b" / SITE, **settings)
    x, y = (open_store(store).read(SITE).reshape(-1, 16).astype(float) for store in stores)
    wanted = slow_cka(x / x.std(0), y / y.std(0))
    assert result["measures"]["cka"][0][1] == pytest.approx(wanted, rel=1e-6)
    assert 1 > wanted > 0.999 and abs(slow_cka(x, y) - wanted) > 1e-4


# Dictionaries whose sources are known


def dictionary(
    path, source, *, site=SITE, store="x", prompts=None, seeds=None, steps=(0, 4), **more
):
    """An exported dictionary; `prompts` says which images are known, by number."""
    source = np.array(source, np.int32)
    atoms = np.eye(len(source), 8, dtype=np.float32)
    told = {"columns": ["image", "step", "token"], "prompts": {}, **more}
    if prompts is not None:
        told["prompts"] = {str(i): text for i, text in prompts.items()}
        told["seeds"] = {str(i): (seeds or {}).get(i, 0) for i in prompts}
        told["denoising_step"] = list(steps)
    card = {"site": site, "store_fingerprint": store, "sources": told, "model": {"name": store}}
    ones = np.ones(len(source), np.float32)
    return save_dictionary(
        Dictionary("itda", 2, atoms, typical=ones, source=source, card=card), path
    )


ABC = {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize(
    ("by", "wanted"),
    [
        (("image", "step", "token"), 2 / 6),
        (("image", "token"), 2 / 6),
        (("image", "step"), 3 / 5),
        (("image",), 1),
        (("step",), 1),
        (("token",), 2 / 6),
    ],
)
def test_sources_of_one_store_by_their_parts(tmp_path, by, wanted):
    a = dictionary(tmp_path / "a", [(0, 0, 1), (0, 1, 2), (1, 0, 3), (2, 0, 4)])
    b = dictionary(tmp_path / "b", [(0, 0, 1), (0, 1, 2), (1, 1, 5), (2, 0, 6)])
    result = run(tmp_path / "out", a, b, by=by)
    parts = [["image", "step", "token"].index(part) for part in by]
    sets = [
        {tuple(row[p] for p in parts) for row in load_dictionary(x).source.tolist()} for x in (a, b)
    ]
    assert result["measures"]["jaccard"][0][1] == pytest.approx(shared(*sets))
    assert shared(*sets) == pytest.approx(wanted)
    assert [one["places"] for one in result["dictionaries"]] == [len(own) for own in sets]


def test_images_of_two_stores_are_known_by_prompt_and_seed(tmp_path):
    a = dictionary(tmp_path / "a", [(0, 0, 1), (1, 1, 2), (2, 0, 3)], prompts=ABC)
    # the same three, in another order; its second captured step is the other's first
    turned = {0: "c", 1: "a", 2: "b"}
    b = dictionary(
        *(tmp_path / "b", [(1, 1, 1), (2, 0, 2), (0, 1, 3)]),
        **{"store": "y", "prompts": turned, "steps": (4, 0)},
    )
    assert run(tmp_path / "out", a, b)["measures"]["jaccard"][0][1] == 1
    seeds = {0: 0, 1: 0, 2: 9}  # one image of another seed
    c = dictionary(
        *(tmp_path / "c", [(1, 1, 1), (2, 0, 2), (0, 1, 3)]),
        **{"store": "y", "prompts": turned, "steps": (4, 0), "seeds": seeds},
    )
    assert run(tmp_path / "out", a, c)["measures"]["jaccard"][0][1] == pytest.approx(2 / 4)
    by = ("prompt", "step", "token")
    assert run(tmp_path / "out", a, c, by=by)["measures"]["jaccard"][0][1] == 1


def test_a_sampled_token_is_known_by_its_position(tmp_path):
    a = dictionary(tmp_path / "a", [(0, 0, 5), (1, 0, 7)], prompts=ABC)
    sampled = {"store": "y", "prompts": ABC, "position": [5, 6]}
    b = dictionary(tmp_path / "b", [(0, 0, 0), (1, 0, 1)], **sampled)
    assert run(tmp_path / "out", a, b)["measures"]["jaccard"][0][1] == pytest.approx(1 / 3)


def test_a_store_tells_what_a_card_does_not(made, tmp_path):
    store = open_store(made / "first")
    a = dictionary(tmp_path / "a", [(0, 0, 5), (3, 1, 7)], store=store.fingerprint)
    other = open_store(made / "second")
    b = dictionary(tmp_path / "b", [(0, 0, 5), (3, 0, 7)], store=other.fingerprint)
    with pytest.raises(ValueError, match=r"different stores, and the card of .*--store"):
        run(tmp_path / "out", a, b)
    both = (str(store.path), str(other.path))
    result = run(tmp_path / "out", a, b, store=both)
    assert result["measures"]["jaccard"][0][1] == pytest.approx(1 / 3)


def test_streams_are_apart_unless_tokens_do_not_count(tmp_path, capsys):
    a = dictionary(tmp_path / "a", [(0, 0, 1), (1, 0, 2)])
    b = dictionary(tmp_path / "b", [(0, 0, 1), (1, 0, 3)], site=LATER)
    t = dictionary(tmp_path / "t", [(0, 0, 1), (1, 0, 2)], site=TXT)
    values = run(tmp_path / "out", a, b, t)["measures"]["jaccard"]
    assert values == [[1, 1 / 3, None], [1 / 3, 1, None], [None, None, 1]]
    assert "such pairs are left out" in capsys.readouterr().out
    assert run(tmp_path / "out", a, t, by=("image", "step"))["measures"]["jaccard"][0][1] == 1
    with pytest.raises(
        ValueError, match=r"expected dictionaries of one stream, got .* --by image step"
    ):
        run(tmp_path / "out", a, t)


def test_sites_are_in_the_order_of_the_model(tmp_path):
    names = ("single.2.img", "double.10.img", "double.9.img", "single.11.img")
    paths = [dictionary(tmp_path / "in" / name, [(0, 0, 1)], site=name) for name in names]
    result = run(tmp_path / "out", *paths)
    assert [one["site"] for one in result["dictionaries"]] == [names[i] for i in (2, 1, 0, 3)]
    assert result["groups"] == {"by": "", "names": [""]} and result["matching"] == []


# What cannot be compared is one line


def one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", *map(str, words)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_what_is_no_itda_dictionary_is_named(made, tmp_path, capsys):
    a = dictionary(tmp_path / "a", [(0, 0, 1)])
    out = ("--out", tmp_path / "out", "--no-plots")
    eye, zero = np.eye(4, dtype=np.float32), np.zeros(4, np.float32)
    sae = Dictionary("topk", 2, eye, zero, eye, zero, typical=zero, card={"site": SITE})
    save_dictionary(sae, tmp_path / "sae/one")
    error = one_line([a, tmp_path / "sae/one", *out], capsys)
    assert "expected an ITDA dictionary (with sources), got kind topk" in error
    assert "found none" in one_line([a, tmp_path / "sae", *out], capsys)
    assert "nothing is there" in one_line([a, tmp_path / "nowhere", *out], capsys)
    assert "name it with --store" in one_line([made / "first", a, *out], capsys)
    assert "got a file" in one_line([a / "card.json", a, *out], capsys)
    assert "at least 2 ITDA dictionaries" in one_line([a, a, *out], capsys)
    assert "--groups seed: expected several groups" in one_line(
        [made / "a", *out, "--groups", "seed"], capsys
    )
    assert (
        "--groups store: expected several groups that have each site once, got double"
        in one_line([made / "a", made / "b", made / "c", *out, "--groups", "store"], capsys)
    )
    assert "--by: expected different ones" in one_line(
        [made / "a", *out, "--by", "step", "step"], capsys
    )
    assert not (tmp_path / "out").exists()


def test_other_prompts_are_refused(tmp_path, capsys):
    a = dictionary(tmp_path / "a", [(0, 0, 1)], prompts=ABC)
    b = dictionary(tmp_path / "b", [(0, 0, 1)], prompts={0: "d"}, store="y")
    error = one_line([a, b, "--out", tmp_path / "out"], capsys)
    assert "share no image (the same prompt and seed)" in error and "harvest both" in error


def test_a_folder_may_hold_other_things(tmp_path, capsys):
    for name in "ab":
        dictionary(tmp_path / "in" / name, [(0, 0, 1)])
    (tmp_path / "in/notes").mkdir()
    assert len(run(tmp_path / "out", tmp_path / "in")["dictionaries"]) == 2
    assert "left out, since not of kind itda: " in capsys.readouterr().out


def test_stores_have_to_belong_to_the_dictionaries(made, tmp_path, capsys):
    out = ("--out", tmp_path / "out", "--no-plots")
    error = one_line([made / "a", made / "b", "--store", made / "first", *out], capsys)
    assert "expected the store that" in error and "name that one" in error
    first = open_store(made / "first")
    lost = dictionary(tmp_path / "l", [(0, 0, 1)], site="single.9.img", store=first.fingerprint)
    error = one_line([made / "a", lost, "--store", made / "first", *out], capsys)
    assert "expected single.9.img in" in error
    beyond = dictionary(tmp_path / "x", [(40, 0, 1)], store=first.fingerprint)
    error = one_line([made / "a", beyond, "--store", made / "first", *out], capsys)
    assert "expected sources within the images" in error
    seeds = [*range(39), 99]
    third = open_store(shifted_copy(tmp_path / "third", first, seeds=seeds))
    other = dictionary(tmp_path / "o", [(0, 0, 1)], store=third.fingerprint)
    error = one_line([made / "a", other, "--store", made / "first", third.path, *out], capsys)
    assert "the seed of image 39" in error


def test_help_has_an_example_and_every_setting_is_kept(made, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Example: jaxdict compare" in text
    result = run(tmp_path, made / "a")
    config = CompareConfig(paths=(made / "a",), out=tmp_path, plots=False)
    assert result["config"] == plain(config)
