"""ITDA: which rows join, the search for a threshold, and whole runs on a small store on disk."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvest.atomic import read_json
from harvest.store import StoreSpec, create_store, open_store
from jaxdict.dictionary import coder
from jaxdict.dictionary.files import load_dictionary, save_dictionary
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.growing_atoms import append, empty_atoms, enlarge, power_of_two
from jaxdict.itda.rules import Reconstruction, join_one_by_one
from jaxdict.itda.saved_run import run_to_dictionary
from jaxdict.itda.select import select_rows
from jaxdict.itda.train import train_itda
from jaxdict.rows.single_pass import SinglePass
from jaxdict.rows.source import source_of
from tests.damage import flipped
from tests.reference import itda as reference

D, TOKENS, STEPS, IMAGES, SITE = 12, 8, 2, 40, "double.2.img"


def sparse_rows(n, seed=0, d=D, directions=30):
    """Non-negative mixtures of a few directions, with a little noise."""
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=(n, directions)) * (rng.random((n, directions)) < 0.12)
    rows = weights @ rng.normal(size=(directions, d)) + 0.05 * rng.normal(size=(n, d))
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """40 images, every fourth held out, dimensions of very different scale and mean."""
    path = tmp_path_factory.mktemp("itda") / "store"
    spec = StoreSpec(
        sites={SITE: (TOKENS, D)},
        images=IMAGES,
        steps=STEPS,
        prompts=[f"prompt {i}" for i in range(IMAGES)],
        seeds=[100 + i for i in range(IMAGES)],
        split=[int(i % 4 == 0) for i in range(IMAGES)],
        labels=[{} for _ in range(IMAGES)],
        sigmas=[1.0, 0.5],
        timesteps=[1000.0, 500.0],
        grid=(2, 4),
        words=None,
        picture=None,
        attrs={},
        images_per_shard=IMAGES,
    )
    scale = np.logspace(-0.5, 1, D, dtype=np.float32)
    rows = sparse_rows(IMAGES * STEPS * TOKENS) * scale + 3 * scale
    writer = create_store(path, spec)
    writer.write(0, {SITE: rows.reshape(IMAGES, STEPS, TOKENS, D)})
    return path


def config(store, out, **changes):
    given = {"k": 4, "batch": 64, "threshold": 0.3, "log_every": 1, "eval_every": 3}
    given |= {"save_every": 2, "keep": 100} | changes
    return TrainITDAConfig(store=store, site=SITE, out=out, **given)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    """A finished run and its summary."""
    out = tmp_path_factory.mktemp("runs") / "itda"
    return out, train_itda(config(store, out))


# Which rows join


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    threshold=st.floats(0.02, 0.9),
    empty=st.booleans(),
    zeros=st.booleans(),
    rule=st.sampled_from(["cover", "worst"]),
)
def test_selection_is_that_of_the_slow_reference(seed, threshold, empty, zeros, rule):
    rng = np.random.default_rng(seed)
    unit = sparse_rows(24, seed)
    unit[3] = unit[5] * 2
    if zeros:
        unit[7:9] = 0
    norms = np.linalg.norm(unit, axis=1, keepdims=True)
    unit = (unit / np.where(norms > 0, norms, 1)).astype(np.float32)
    atoms = sparse_rows(6, seed + 1)
    rebuilt = (np.maximum(rng.normal(size=(24, 6)), 0) * 0.1 * (not empty)) @ atoms
    rebuilt = rebuilt.astype(np.float32)
    # Least squares first: a reconstruction is never worse than none.
    scale = np.maximum((rebuilt * unit).sum(1), 0) / np.maximum((rebuilt**2).sum(1), 1e-9)
    rebuilt *= scale[:, None]
    fvu = np.where(rebuilt.any(1), ((unit - rebuilt) ** 2).sum(1), unit.any(1)).astype(np.float32)
    rank, count = join_one_by_one(
        Reconstruction(unit, rebuilt), fvu, threshold=threshold, duplicate=0.99, by=rule
    )
    chosen = np.argsort(np.where(rank >= 0, rank, 99), kind="stable")[: int(count)].tolist()
    expected = reference.select(
        unit.astype(float), rebuilt.astype(float), fvu, threshold, 0.99, rule
    )
    # Rows 3 and 5 are the same but for rounding: either may stand for both.
    assert [{5: 3}.get(row, row) for row in chosen] == [{5: 3}.get(row, row) for row in expected]
    assert all(fvu[row] > threshold for row in chosen)
    assert not {3, 5} <= set(chosen)


@pytest.mark.parametrize(("gram", "rule"), [(True, "cover"), (True, "worst"), (False, "cover")])
def test_a_build_keeps_the_rows_of_the_slow_reference(gram, rule):
    batches = sparse_rows(160, seed=4).reshape(5, 32, D)
    expected, source = reference.build(batches.astype(float), 0.25, 3, rule=rule)
    atoms, m, found = empty_atoms(64, D, gram=gram), 0, []
    for number, z in enumerate(batches):
        seen = select_rows(atoms, z, threshold=0.25, duplicate=0.99, k=3, rule=rule)
        atoms = append(atoms, m, unit=seen.unit, rank=seen.rank)
        m += int(seen.joining)
        order = np.argsort(np.where(seen.rank >= 0, seen.rank, 99), kind="stable")
        found += [(number, int(row)) for row in order[: int(seen.joining)]]
    assert found == source
    assert 10 < m < 64
    np.testing.assert_allclose(atoms.prepared.unit[:m], expected, atol=1e-6)
    assert not np.asarray(atoms.prepared.unit[m:]).any()
    if gram:
        unit = atoms.prepared.unit
        np.testing.assert_allclose(atoms.prepared.gram, unit @ unit.T, atol=1e-6)


def test_growing_compiles_once_for_each_power_of_two():
    rows = np.random.default_rng(0).normal(size=(512, 24)).astype(np.float32)
    atoms, m, capacities = empty_atoms(64, 24, gram=False), 0, set()
    before = select_rows._cache_size()
    for z in rows.reshape(-1, 64, 24):
        seen = select_rows(atoms, z, threshold=0.2, duplicate=0.99, k=1)
        capacities.add(atoms.capacity)
        if m + int(seen.joining) > atoms.capacity:
            atoms = enlarge(atoms, power_of_two(m + int(seen.joining)))
        atoms = append(atoms, m, unit=seen.unit, rank=seen.rank)
        m += int(seen.joining)
    assert m > 128
    assert all(c & (c - 1) == 0 for c in capacities)
    assert select_rows._cache_size() - before == len(capacities) <= np.log2(m)


# Rows, each once


def test_every_training_row_comes_once_with_its_place(store):
    opened = open_store(store)
    source = source_of(opened, SITE, steps=(1,))
    single_pass = SinglePass(source, batch=37, seed=3, pool=60, rows=0)
    batches = list(single_pass.read())
    assert len(batches) == single_pass.batches
    places = np.concatenate([b.places[: b.count] for b in batches])
    bits = np.concatenate([b.bits[: b.count] for b in batches])
    assert len({tuple(p) for p in places}) == len(places) == source.rows == 30 * TOKENS
    assert set(places[:, 1]) == {1}
    assert set(places[:, 0]) == set(opened.indices("train"))
    np.testing.assert_array_equal(bits, opened.read_bits(SITE)[tuple(places.T)])
    assert not batches[-1].bits[batches[-1].count :].any()
    for start in (1, 2, 5, single_pass.batches):
        for one, other in zip(single_pass.read(start), batches[start:], strict=True):
            np.testing.assert_array_equal(one.bits, other.bits)
            np.testing.assert_array_equal(one.places, other.places)
    some = SinglePass(source, batch=37, seed=3, pool=60, rows=100)
    assert [b.count for b in some.read()] == [37, 37, 26]
    for one, other in zip(some.read(), batches, strict=False):
        np.testing.assert_array_equal(one.places[: one.count], other.places[: one.count])


# Whole runs


def test_a_run_leaves_what_it_says(run):
    out, summary = run
    names = {p.name for p in out.iterdir()}
    assert {"config.json", "metrics.jsonl", "loss.png", "atoms.safetensors"} <= names
    assert read_json(out / "summary.json") == summary
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert [line["rows"] for line in train] == [*range(64, 480, 64), 480]
    assert (np.diff([line["atoms"] for line in train]) >= 0).all()
    assert train[0]["fvu"] == train[0]["over"] == 1.0
    assert train[-1]["fvu"] < 0.3
    assert train[-1]["atoms"] == summary["m"] > 10
    held = [line for line in lines if line["kind"] == "heldout"]
    assert [line["step"] for line in held] == [3, 6, 8]
    assert held[-1]["fvu"] == summary["heldout"]["fvu"] < 0.3


def test_every_atom_is_a_training_row_of_unit_norm(run, store):
    dictionary = run_to_dictionary(run[0])
    opened = open_store(store)
    rows = opened.read(SITE)[tuple(dictionary.source.T)]
    z = (rows - dictionary.mean) * dictionary.transform
    np.testing.assert_allclose(
        dictionary.atoms, z / np.linalg.norm(z, axis=1, keepdims=True), atol=1e-5
    )
    assert set(dictionary.source[:, 0]) <= set(opened.indices("train"))
    assert len(np.unique(dictionary.source, axis=0)) == dictionary.m
    train = opened.read(SITE, opened.indices("train")).reshape(-1, D).astype(np.float64)
    np.testing.assert_allclose(dictionary.mean, train.mean(0), rtol=1e-5)
    np.testing.assert_allclose(dictionary.inverse, train.std(0), rtol=1e-4)


def test_held_out_numbers_and_typical_values_are_those_of_the_exported_file(run, store, tmp_path):
    out, summary = run
    path = save_dictionary(run_to_dictionary(out), tmp_path / "dictionary")
    dictionary = load_dictionary(path)
    opened = open_store(store)
    x = opened.read(SITE, opened.indices("validation")).reshape(-1, D)
    codes = coder.encode(dictionary, x)
    left = x - np.asarray(coder.decode(dictionary, codes))
    fvu = (left.astype(float) ** 2).sum() / ((x - x.mean(0, dtype=float)) ** 2).sum()
    held = summary["heldout"]
    assert held["fvu"] == pytest.approx(fvu, rel=1e-4)
    z, own = x * dictionary.transform, left * dictionary.transform
    normalized = (own.astype(float) ** 2).sum() / ((z - z.mean(0, dtype=float)) ** 2).sum()
    assert held["fvu_normalized"] == pytest.approx(normalized, rel=1e-4)
    assert held["l0"] == pytest.approx(float(np.mean(codes.l0)), rel=1e-6)
    dense = np.asarray(
        coder.encode(dictionary, opened.read(SITE, opened.indices("train")).reshape(-1, D)).dense(
            dictionary.m
        )
    )
    typical = dense.sum(0) / np.maximum((dense != 0).sum(0), 1)
    np.testing.assert_allclose(dictionary.typical, typical, rtol=1e-3)
    card = dictionary.card
    assert card["store_fingerprint"] == opened.fingerprint
    assert (card["site"], card["stream"], card["threshold"]) == (SITE, "img", 0.3)
    for image in np.unique(dictionary.source[:, 0]):
        assert card["sources"]["prompts"][str(image)] == f"prompt {image}"


def same(one, other):
    """Two dictionaries, bit for bit."""
    np.testing.assert_array_equal(one.atoms, other.atoms)
    np.testing.assert_array_equal(one.source, other.source)
    np.testing.assert_array_equal(one.typical, other.typical)


def cut(out, copy, step):
    """A copy of a run as a kill right after the checkpoint of a step would leave it."""
    shutil.copytree(out, copy)
    for name in ("summary.json", "atoms.safetensors", "loss.png"):
        (copy / name).unlink()
    for folder in (copy / "checkpoints").iterdir():
        if int(folder.name) > step:
            shutil.rmtree(folder)


def test_a_cut_run_resumes_to_the_same_dictionary(run, store, tmp_path):
    out, summary = run
    cut(out, tmp_path / "cut", step=4)
    early = run_to_dictionary(tmp_path / "cut")
    assert early.m < summary["m"]
    assert not early.typical.any()
    assert early.card["training"]["finished"] is False
    resumed = train_itda(config(store, tmp_path / "cut", resume=True))
    assert resumed["heldout"] == summary["heldout"]
    same(run_to_dictionary(out), run_to_dictionary(tmp_path / "cut"))
    one, other = ((p / "metrics.jsonl").read_text() for p in (out, tmp_path / "cut"))
    assert one == other


def test_a_number_of_atoms_is_reached_and_never_passed(store, tmp_path):
    wanted = {"threshold": 0.0, "atoms": 40, "save_every": 5, "eval_every": 50}
    summary = train_itda(config(store, tmp_path / "n", **wanted))
    assert 0.93 * 40 <= summary["m"] <= 40
    assert summary["training"]["trials"][-1]["threshold"] == summary["threshold"]
    direct = train_itda(config(store, tmp_path / "t", threshold=summary["threshold"]))
    assert direct["m"] == summary["m"]
    one, other = run_to_dictionary(tmp_path / "n"), run_to_dictionary(tmp_path / "t")
    np.testing.assert_array_equal(one.source, other.source)

    cut(tmp_path / "n", tmp_path / "cut", step=9)
    train_itda(config(store, tmp_path / "cut", **wanted, resume=True))
    same(one, run_to_dictionary(tmp_path / "cut"))


@pytest.mark.parametrize("normalize", ["none", "whiten"])
def test_other_normalizations_decode_to_raw_rows(store, tmp_path, normalize):
    changes = {"normalize": normalize, "rows": 200, "steps": (1,)}
    summary = train_itda(config(store, tmp_path / "run", **changes))
    dictionary = run_to_dictionary(tmp_path / "run")
    assert dictionary.transform.ndim == (2 if normalize == "whiten" else 1)
    assert set(dictionary.source[:, 1]) == {1}
    x = open_store(store).read(SITE, steps=[1]).reshape(-1, D)
    x_hat = coder.decode(dictionary, coder.encode(dictionary, x))
    fvu = float(jnp.sum((x - x_hat) ** 2) / jnp.sum((x - x.mean(0)) ** 2))
    assert fvu == pytest.approx(summary["heldout"]["fvu"], abs=0.15)
    assert fvu < 0.4


# Bad input


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"threshold": 0.0}, "expected --threshold or --atoms, just one of the two"),
        ({"atoms": 5}, "expected --threshold or --atoms, just one of the two"),
        ({"threshold": 1.5}, r"--threshold: expected a share in \(0, 1\], got 1.5"),
        ({"threshold": -0.1}, r"--threshold: expected a share in \(0, 1\], got -0.1"),
        ({"rule": "best"}, "--rule: expected one of"),
        ({"k": 0}, "--k: expected a whole number of at least 1"),
        ({"duplicate": 1.0}, "--duplicate: expected a share"),
        ({"steps": (1, 1)}, "--steps: expected different indices"),
        ({"normalize": "pca"}, "--normalize: expected one of"),
    ],
)
def test_bad_settings_are_refused_at_once(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, tmp_path / "out", **changes)


def test_bad_places_are_refused_and_nothing_is_written(run, store, tmp_path):
    out, _ = run
    bad = dataclasses.replace(config(store, tmp_path / "out"), site="double.9.img")
    with pytest.raises(ValueError, match=r"expected a site of .*double\.2\.img"):
        train_itda(bad)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="expected --out to be new or empty"):
        train_itda(config(store, out))
    with pytest.raises(ValueError, match=r"expected --k = 4 .* got 5"):
        train_itda(config(store, out, k=5, resume=True))
    with pytest.raises(FileNotFoundError, match="expected a run"):
        run_to_dictionary(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "normalization.safetensors",
        "atoms.safetensors",
        "sources.json",
        "summary.json",
    ],
)
def test_a_turned_bit_in_a_runs_files_is_told(run, tmp_path, name):
    copy = tmp_path / "run"
    shutil.copytree(run[0], copy)
    whole, quiet = run_to_dictionary(copy), 0
    for where in flipped(copy / name, 25):
        try:
            again = run_to_dictionary(copy)
        except (ValueError, FileNotFoundError) as error:
            assert name in str(error) or "config" in str(error), where
        else:  # the name of a hash itself was hit
            quiet += 1
            np.testing.assert_array_equal(again.atoms, whole.atoms)
    assert quiet <= 2
    content = bytearray((copy / name).read_bytes())
    at = content.index(b"\n ") if name.endswith("json") else len(content) - 1
    content[at : at + 1] = b'\n"note": 1,' if name.endswith("json") else bytes([content[at] ^ 1])
    (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        run_to_dictionary(copy)
    assert run_to_dictionary(copy, verify=False).m == whole.m
