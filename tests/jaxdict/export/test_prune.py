"""Pruning on planted dictionaries: what goes, what stays with its labels, and what is told of the cost."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from harvest.store import StoreSpec, create_store, open_store
from jaxdict.dictionary import coder
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.dictionary.files import load_dictionary, save_dictionary
from jaxdict.export.config import PruneConfig
from jaxdict.export.prune import merged, part, prune
from jaxdict.itda.labels import label
from jaxdict.metrics.usage import Usage, feature_usage
from jaxdict.rows.source import source_of

SITE, D, TRUE, TOKENS, IMAGES = "double.2.img", 10, 6, 8, 20
OFTEN = np.array([0.8, 0.6, 0.5, 0.4, 0.2, 0.02])
"""How often each of the planted directions is active in a row."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Rows that are sparse sums of 6 of 10 orthogonal directions."""
    path = tmp_path_factory.mktemp("prune") / "store"
    rng = np.random.default_rng(0)
    spec = StoreSpec(
        sites={SITE: (TOKENS, D)},
        images=IMAGES,
        steps=1,
        prompts=[f"prompt {i}" for i in range(IMAGES)],
        seeds=[50 + i for i in range(IMAGES)],
        split=[i % 2 for i in range(IMAGES)],
        sigmas=[1.0],
        timesteps=[1000.0],
        grid=(2, 4),
        attrs={"model": {"id": "planted"}},
        images_per_shard=IMAGES,
    )
    codes = rng.uniform(1, 2, (IMAGES * TOKENS, TRUE)) * (
        rng.random((IMAGES * TOKENS, TRUE)) < OFTEN
    )
    writer = create_store(path, spec)
    writer.write(0, {SITE: (codes @ np.eye(TRUE, D)).reshape(IMAGES, 1, TOKENS, D)})
    return path


def planted(store, **changes):
    """The 6 directions, two that no row has, and a near-duplicate of the first, in a shuffled order."""
    atoms = np.eye(8, D)
    twin = atoms[0] + 0.1 * np.eye(1, D, 8)[0]
    atoms = np.concatenate([atoms, twin[None] / np.linalg.norm(twin)])
    order = np.array([6, 3, 0, 8, 5, 7, 1, 2, 4])
    source = np.stack([2 * np.arange(9), np.zeros(9, int), np.arange(9) % TOKENS], axis=1)
    opened = open_store(store)
    prompts = {str(2 * i): f"prompt {2 * i}" for i in range(9)}
    given = {
        "typical": np.ones(9, np.float32),
        "source": source.astype(np.int32),
        "card": {
            "site": SITE,
            "store_fingerprint": opened.fingerprint,
            "sources": {"prompts": prompts, "position": (source[:, 2] + 100).tolist()},
        },
    }
    return Dictionary("itda", 6, atoms[order].astype(np.float32), **(given | changes)), order


@pytest.fixture
def saved(store, tmp_path):
    dictionary, order = planted(store)
    return save_dictionary(dictionary, tmp_path / "dictionary"), order


def run(path, store, out, **changes):
    return prune(PruneConfig(dictionary=path, store=store, out=out, **changes))


def test_usage_counts_what_the_codes_say(store):
    dictionary, order = planted(store)
    rows = source_of(open_store(store), SITE)
    used = feature_usage(dictionary, rows, batch=33)
    x = open_store(store).read(SITE, open_store(store).indices("train")).reshape(-1, D)
    dense = np.asarray(coder.encode(dictionary, x).dense(9))
    np.testing.assert_array_equal(used.fired, (dense > 0).sum(0))
    np.testing.assert_allclose(used.energy, (dense.astype(float) ** 2).sum(0), rtol=1e-5)
    assert used.rows == len(x) == rows.rows
    assert (used.fired[order >= 6] == 0)[[0, 2]].all()


def test_unused_atoms_go_and_cost_nothing(saved, store, tmp_path):
    path, order = saved
    before = load_dictionary(path)
    told = run(path, store, tmp_path / "small", unused=True)
    used = feature_usage(before, source_of(open_store(store), SITE))
    assert told["kept"] == np.flatnonzero(used.fired).tolist()
    assert told["unused"] == told["before"] - told["after"] == int((used.fired == 0).sum()) >= 2
    assert told["heldout_after"]["fvu"] == pytest.approx(told["heldout_before"]["fvu"], abs=1e-7)
    small = load_dictionary(tmp_path / "small")
    keep = np.array(told["kept"])
    assert not set(order[keep]) & {6, 7}
    np.testing.assert_array_equal(small.atoms, before.atoms[keep])
    np.testing.assert_array_equal(small.source, before.source[keep])
    # Each atom that stays still tells where it came from.
    for new, old in enumerate(keep):
        assert label(small, new) == label(before, old)
    assert len(small.card["sources"]["prompts"]) == small.m
    assert small.card["pruning"][0]["heldout_after"] == told["heldout_after"]
    assert small.card["metrics"]["fvu"] == told["heldout_after"]["fvu"]


def test_a_near_duplicate_is_merged_into_the_atom_used_more(saved, store, tmp_path):
    path, order = saved
    told = run(path, store, tmp_path / "small", merge=0.97)
    assert told["merged"] == 1 and told["after"] == 8
    kept = set(order[told["kept"]])
    assert 0 in kept and 8 not in kept
    told = run(path, store, tmp_path / "other", merge=0.999)
    assert told["merged"] == 0


def test_least_energy_goes_first_and_the_cost_is_that_of_the_rows(saved, store, tmp_path):
    path, order = saved
    told = run(path, store, tmp_path / "small", merge=0.97, keep=4)
    assert set(order[told["kept"]]) == {0, 1, 2, 3}
    assert (told["merged"], told["least energy"], told["after"]) == (1, 4, 4)
    small = load_dictionary(tmp_path / "small")
    opened = open_store(store)
    x = opened.read(SITE, opened.indices("validation")).reshape(-1, D).astype(np.float64)
    # What the dropped directions held is lost: dimensions 4 and 5.
    fvu = (x[:, 4:] ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert told["heldout_after"]["fvu"] == pytest.approx(fvu, abs=2e-3)
    assert fvu > 0.05 > told["heldout_before"]["fvu"]
    again = run(tmp_path / "small", store, tmp_path / "smaller", keep=2)
    assert [one["after"] for one in load_dictionary(tmp_path / "smaller").card["pruning"]] == [4, 2]
    assert again["before"] == small.m == 4
    assert json.loads((tmp_path / "smaller" / "card.json").read_text())["m"] == 2


def test_merging_in_blocks_is_greedy_by_energy(store, monkeypatch):
    rng = np.random.default_rng(1)
    centres = rng.normal(size=(7, D))
    atoms = np.repeat(centres, 5, axis=0) + 0.02 * rng.normal(size=(35, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    dictionary = Dictionary(
        "itda", 3, atoms.astype(np.float32), typical=np.ones(35, np.float32), card={}
    )
    energy = rng.random(35)
    used = Usage(np.ones(35, np.int64), energy, 1)
    expected = [5 * i + int(np.argmax(energy[5 * i : 5 * i + 5])) for i in range(7)]
    for block in (3, 2048):
        monkeypatch.setattr("jaxdict.export.prune._BLOCK", block)
        assert merged(dictionary, used, 0.9).tolist() == expected


def test_features_with_an_encoder_are_pruned_too(store, tmp_path):
    dictionary, order = planted(store)
    atoms = dictionary.atoms
    topk = Dictionary(
        "topk",
        6,
        atoms,
        np.zeros(D, np.float32),
        2 * atoms,
        np.zeros(9, np.float32),
        typical=np.ones(9, np.float32),
        card={"site": SITE},
    )
    half = part(topk, np.array([1, 4, 6, 7]))
    assert (half.m, half.k, half.d) == (4, 4, D)
    np.testing.assert_array_equal(half.encoder, 2 * atoms[[1, 4, 6, 7]])
    # The twin of atom 0 is none here: its encoder points elsewhere.
    encoder = 2 * atoms.copy()
    encoder[order == 8] = np.eye(1, D, 9)
    other = dataclasses.replace(topk, encoder=encoder)
    used = Usage(np.ones(9, np.int64), np.ones(9), 1)
    assert len(merged(topk, used, 0.97)) == 8
    assert len(merged(other, used, 0.97)) == 9
    path = save_dictionary(topk, tmp_path / "topk")
    assert run(path, store, tmp_path / "small", keep=5)["after"] == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--unused: expected --unused, --merge or --keep, got 'none of them'"),
        ({"merge": 1.0}, r"--merge: expected a cosine in \(0, 1\), got 1.0"),
        ({"keep": -1}, "--keep: expected a number of at least 0, got -1"),
        ({"keep": 10}, "--keep: expected at most the 9 atoms there are, got 10"),
        ({"keep": 2, "site": "double.9.img"}, "--site: expected a site of .* got 'double.9.img'"),
    ],
)
def test_bad_settings_are_refused_and_nothing_is_written(saved, store, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(saved[0], store, tmp_path / "small", **changes)
    assert not (tmp_path / "small").exists()


def test_places_that_are_taken_are_refused(saved, store, tmp_path):
    with pytest.raises(ValueError, match="--out: expected another folder than the dictionary's"):
        run(saved[0], store, saved[0], keep=2)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"found other things \(notes.txt\)"):
        run(saved[0], store, tmp_path / "taken", keep=2)
    with pytest.raises(ValueError, match="expected at least one atom that stays"):
        part(planted(store)[0], np.zeros(0, np.int64))
