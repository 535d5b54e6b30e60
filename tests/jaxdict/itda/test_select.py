"""The rules by which rows join, and dictionaries that read one site and rebuild another."""

from __future__ import annotations

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from harvest.store import open_store
from jaxdict.dictionary import coder
from jaxdict.dictionary.files import load_dictionary
from jaxdict.evaluate.config import EvalConfig
from jaxdict.evaluate.evaluate import evaluate
from jaxdict.export.config import ExportConfig
from jaxdict.export.export import export
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.growing_atoms import append, empty_atoms
from jaxdict.itda.rules import join_all
from jaxdict.itda.saved_run import run_to_dictionary
from jaxdict.itda.select import select_rows
from jaxdict.itda.train import train_itda
from tests.jaxdict.planted import SITE, write_planted_store
from tests.reference import itda as reference

TARGET, WIDTH = "double.3.img.mlp", 9
SEVERAL = {TARGET: (16, WIDTH), "double.3.txt": (16, 5), "double.4.txt": (7, 5)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("rules") / "store", more=SEVERAL)


def config(store, out, **changes):
    given = {"k": 4, "batch": 64, "threshold": 0.2, "eval_every": 100, "save_every": 3, "keep": 99}
    return TrainITDAConfig(store=store, site=SITE, out=out, **(given | changes))


def pairs(n, seed, d=8, d_out=5, directions=14):
    """Rows of two sites: the same sparse codes of a few directions, noise, a bend at the target."""
    rng = np.random.default_rng(seed)
    codes = rng.exponential(size=(n, directions)) * (rng.random((n, directions)) < 0.25)
    codes[:, 0] += 0.01
    ours, theirs = (
        np.random.default_rng(i).normal(size=(directions, w)) for i, w in ((1, d), (2, d_out))
    )
    x = codes @ ours + 0.05 * rng.normal(size=(n, d))
    return x.astype(np.float32), np.abs(codes @ theirs).astype(np.float32)


def order_of(rank, joining):
    return np.argsort(np.where(rank >= 0, rank, len(rank)), kind="stable")[: int(joining)].tolist()


@pytest.mark.parametrize("threshold", [0.1, 0.5, 1.0])
def test_the_plain_rule_takes_every_bad_row_but_duplicates(threshold):
    rows, _ = pairs(60, seed=3)
    rows[9], rows[30] = rows[4] * 2, rows[4] * 0.5
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    fvu = np.random.default_rng(0).random(60).astype(np.float32)
    fvu[[4, 9, 30]] = 1
    found = order_of(*join_all(unit, fvu, threshold=threshold, duplicate=0.99))
    # At 1 those join that nothing explains; the reference compares strictly.
    expected = reference.plain(unit.astype(float), fvu, min(threshold, 0.9999), 0.99)
    assert found == expected
    assert 4 in found and 9 not in found and 30 not in found
    assert len(found) == 1 if threshold == 1 else len(found) > 5


def test_rules_that_skip_take_fewer_rows_for_the_same_bound():
    """Nearly all rows of a first batch end at or below the threshold, by each rule, with k to spare."""
    rows, _ = pairs(200, seed=5)
    z = jnp.asarray(rows)
    count = {}
    for rule in ("cover", "worst", "plain"):
        atoms = empty_atoms(256, rows.shape[1], gram=False)
        seen = select_rows(atoms, z, threshold=0.3, duplicate=0.99, k=6, rule=rule)
        atoms = append(atoms, 0, unit=seen.unit, rank=seen.rank)
        count[rule] = int(seen.joining)
        again = select_rows(atoms, z, threshold=0.3, duplicate=0.99, k=6, rule=rule)
        assert float(jnp.mean(again.fvu > 0.3)) < 0.05
    assert max(count["cover"], count["worst"]) < 0.5 * count["plain"]


def test_at_equal_error_cover_needs_fewer_atoms_than_the_plain_rule():
    """Thresholds are chosen so that the sizes are close; then the smaller one has the smaller error too."""
    rows, _ = pairs(4096, seed=11, d=24, directions=60)
    batches, held = rows[:3072].reshape(6, 512, -1), jnp.asarray(rows[3072:])
    found = {}
    for rule, threshold in (("cover", 0.15), ("plain", 0.25)):
        atoms, m = empty_atoms(2048, rows.shape[1], gram=False), 0
        for z in batches:
            seen = select_rows(atoms, z, threshold=threshold, duplicate=0.99, k=6, rule=rule)
            atoms = append(atoms, m, unit=seen.unit, rank=seen.rank)
            m += int(seen.joining)
        left = select_rows(atoms, held, threshold=threshold, duplicate=0.99, k=6, rule=rule).fvu
        found[rule] = (m, float(left.mean()))
    assert found["cover"][0] < found["plain"][0]
    assert found["cover"][1] < found["plain"][1]


def test_a_row_that_is_not_finite_neither_joins_nor_spoils_the_others():
    rows, _ = pairs(40, seed=2)
    atoms = empty_atoms(64, rows.shape[1], gram=False)
    for rule in ("cover", "worst", "plain"):
        sound = select_rows(atoms, rows[1:], threshold=0.3, duplicate=0.99, k=3, rule=rule)
        spoiled = rows.copy()
        spoiled[0, 3] = np.nan
        seen = select_rows(atoms, spoiled, threshold=0.3, duplicate=0.99, k=3, rule=rule)
        assert seen.rank[0] == -1
        np.testing.assert_array_equal(seen.rank[1:], sound.rank)


@pytest.mark.parametrize("rule", ["cover", "worst"])
def test_with_a_target_the_rows_of_the_slow_reference_join(rule):
    x, y = pairs(120, seed=7)
    batches, targets = x.reshape(4, 30, -1), y.reshape(4, 30, -1)
    xs, ys, source = reference.build_pairs(
        batches.astype(float), targets.astype(float), 0.3, 3, rule=rule
    )
    atoms, m, found = empty_atoms(128, x.shape[1], d_out=5, gram=True), 0, []
    for number, (z, t) in enumerate(zip(batches, targets, strict=True)):
        seen = select_rows(atoms, z, t, threshold=0.3, duplicate=0.99, k=3, rule=rule)
        atoms = append(atoms, m, unit=seen.unit, rank=seen.rank, target=seen.target)
        found += [(number, row) for row in order_of(seen.rank, seen.joining)]
        m += int(seen.joining)
    assert found == source and 10 < m < 128
    np.testing.assert_allclose(atoms.prepared.unit[:m], xs, atol=1e-6)
    np.testing.assert_allclose(atoms.target[:m], ys, rtol=1e-5, atol=1e-6)


def test_a_threshold_of_one_takes_what_nothing_explains(store, tmp_path):
    summary = train_itda(config(store, tmp_path / "run", threshold=1.0))
    dictionary = run_to_dictionary(tmp_path / "run")
    products = dictionary.atoms @ dictionary.atoms.T
    assert summary["m"] == dictionary.m >= 2
    # No earlier atom had a positive inner product with a row that joined.
    assert products[~np.eye(dictionary.m, dtype=bool)].max() < 1e-3


@pytest.fixture(scope="module")
def transcoder(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("transcoder") / "run"
    return out, train_itda(config(store, out, target=TARGET))


def test_a_target_is_rebuilt_through_save_load_export_and_eval(transcoder, store, tmp_path):
    out, summary = transcoder
    assert (summary["target"], summary["site"]) == (TARGET, SITE)
    card = export(ExportConfig(run=out, out=tmp_path / "dictionary"))
    dictionary = load_dictionary(tmp_path / "dictionary")
    assert dictionary.transcoder and card["target"] == TARGET
    assert (dictionary.d, dictionary.d_out) == (16, WIDTH)
    opened = open_store(store)
    held = opened.indices("validation")
    x, y = (opened.read(site, held).reshape(-1, w) for site, w in ((SITE, 16), (TARGET, WIDTH)))
    y_hat = np.asarray(coder.decode(dictionary, coder.encode(dictionary, x)), np.float64)
    fvu = ((y - y_hat) ** 2).sum() / ((y - y.mean(0, dtype=float)) ** 2).sum()
    assert summary["heldout"]["fvu"] == pytest.approx(fvu, rel=1e-3)
    assert card["metrics"]["fvu"] == pytest.approx(fvu, rel=1e-3)
    assert fvu < 0.35
    settings = {"dictionary": tmp_path / "dictionary", "store": store, "plots": False}
    found = evaluate(EvalConfig(**settings, out=tmp_path / "eval.json"))
    assert found["target"] == TARGET
    assert found["metrics"]["fvu"] == pytest.approx(fvu, rel=1e-3)
    # Pairs: a training row of the source at unit norm, and its target over the same norm.
    rows, others = (opened.read(site)[tuple(dictionary.source.T)] for site in (SITE, TARGET))
    z = (rows - dictionary.mean) * dictionary.transform
    norms = np.linalg.norm(z, axis=1, keepdims=True)
    np.testing.assert_allclose(dictionary.encoder, z / norms, atol=1e-5)
    own = (others - dictionary.bias) / dictionary.inverse
    np.testing.assert_allclose(dictionary.atoms, own / norms, rtol=1e-3, atol=1e-4)


def test_a_build_with_a_target_resumes_to_the_same_bits(transcoder, store, tmp_path):
    out, summary = transcoder
    copy = shutil.copytree(out, tmp_path / "cut")
    for name in ("summary.json", "atoms.safetensors", "sources.json"):
        (copy / name).unlink()
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > 6:
            shutil.rmtree(folder)
    early = run_to_dictionary(copy)
    assert early.transcoder and early.m <= summary["m"]
    resumed = train_itda(config(store, copy, target=TARGET, resume=True))
    assert resumed["heldout"] == summary["heldout"]
    one, other = run_to_dictionary(out), run_to_dictionary(copy)
    for name in ("atoms", "encoder", "source", "typical"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("double.9.img", "--target: expected a site of .* got 'double.9.img'"),
        ("double.4.txt", r"expected a target of the stream .*16 tokens.*double.4.txt \(7\)"),
        ("double.3.txt", "expected a target of the stream of double.2.img"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(store, tmp_path, target, message):
    with pytest.raises(ValueError, match=message):
        train_itda(config(store, tmp_path / "out", target=target))
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_rule_is_not_resumed(transcoder, store):
    given = config(store, transcoder[0], target=TARGET, resume=True)
    with pytest.raises(ValueError, match=r"expected --rule = 'cover' .* got 'plain'"):
        train_itda(dataclasses.replace(given, rule="plain"))
