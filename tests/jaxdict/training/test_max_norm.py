"""`--max-norm`: massive rows are left out of what is fitted, and of nothing else."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

from harvest.store import StoreSpec, create_store, open_store
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.train import train_itda
from jaxdict.rows import Loader, SinglePass, floats, source_of
from jaxdict.rows.norms import NormLimit, limit_once
from jaxdict.runs.folder import NORM_LIMITS, read_run
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training.saved_run import read_sae
from jaxdict.training.train import train_sae
from tests.jaxdict.command import raw, weights

SITE = "double.2.img"
SMALL = {"site": SITE, "k": 4, "batch": 64, "max_norm": 5.0, "pool": 200}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Ordinary rows, and one in fifty a hundred times as long."""
    rng, n, tokens, d = np.random.default_rng(0), 30, 16, 16
    rows = rng.normal(size=(n, 1, tokens, d)) + 1
    rows[rng.random(rows.shape[:3]) < 0.02] *= 100
    spec = StoreSpec(
        sites={SITE: (tokens, d)},
        images=n,
        steps=1,
        prompts=[f"prompt {i}" for i in range(n)],
        seeds=list(range(n)),
        split=[int(i % 5 == 0) for i in range(n)],
        sigmas=[1.0],
        timesteps=[1000.0],
        grid=(4, 4),
        images_per_shard=10,
        attrs={"model": {"id": "planted"}},
    )
    path = tmp_path_factory.mktemp("norms") / "store"
    writer = create_store(path, spec)
    for shard in writer.pending():
        part = writer.images_of(shard)
        writer.write(shard, {SITE: rows[part].astype(np.float32)})
    return path


def sizes(bits):
    return np.linalg.norm(floats(bits), axis=1)


@pytest.fixture(scope="module")
def limit(store, tmp_path_factory):
    source = source_of(open_store(store), SITE)
    path = tmp_path_factory.mktemp("limit") / "limits.json"
    found = limit_once(path, [source], 5.0, resume=False)[SITE]
    every = np.concatenate([sizes(block.bits) for block in source.blocks()])
    assert found == (5 * found.median, np.median(every), len(every), (every > found.limit).sum())
    assert 0 < found.left_out < 0.1 * found.rows
    return found


@pytest.mark.parametrize("memory", [0, 2**32])
def test_a_loader_gives_every_other_row_and_none_above(memory, store, limit):
    source = source_of(open_store(store), SITE)
    loader = Loader(source, batch=32, seed=0, pool=100, memory=memory, limit=limit)
    batches = loader.batches()
    epoch = [next(batches) for _ in range(source.rows // 32)]
    assert max(sizes(batch).max() for batch in epoch) <= limit.limit
    seen = {row.tobytes() for row in np.concatenate(epoch)}
    wanted = np.concatenate([block.bits for block in source.blocks()])
    wanted = wanted[sizes(wanted) <= limit.limit]
    assert seen == {row.tobytes() for row in wanted}
    later = loader.batches(7)
    np.testing.assert_array_equal(next(later), epoch[7])
    batches.close(), later.close()


def test_both_ways_of_reading_give_the_same_batches(store, limit):
    source = source_of(open_store(store), SITE)
    settings = {"batch": 48, "seed": 3, "pool": 100, "limit": limit}
    both = [Loader(source, memory=memory, **settings).batches(2) for memory in (0, 2**32)]
    for _ in range(20):
        np.testing.assert_array_equal(*(next(one) for one in both))


def test_a_single_pass_too_with_the_places_of_its_rows(store, limit):
    opened = open_store(store)
    source = source_of(opened, SITE)
    one = SinglePass(source, batch=50, seed=0, pool=100, rows=0, limit=limit)
    for batch, again in zip(one.read(2), list(one.read())[2:], strict=True):
        assert sizes(batch.bits[: batch.count]).max() <= limit.limit
        np.testing.assert_array_equal(batch.bits, again.bits)
        image, step, token = batch.places[0]
        stored = opened.read_bits(SITE, images=np.array([image]), steps=None)[0, step, token]
        np.testing.assert_array_equal(stored, batch.bits[0])


def test_all_rows_above_is_told(store):
    loader = Loader(
        source_of(open_store(store), SITE), batch=8, seed=0, pool=64, limit=NormLimit(0, 0, 1, 1)
    )
    with pytest.raises(ValueError, match=r"^--max-norm: expected rows below it in each pool"):
        next(loader.batches())


def test_training_leaves_them_out_and_measures_all(store, limit, tmp_path, capsys):
    settings = {**SMALL, "atoms": 32, "rows": 64 * 8, "save_every": 3, "keep": 9}
    one = TrainSAEConfig.of(store=store, out=tmp_path / "run", **settings)
    summary = train_sae(one)
    assert f"{limit.left_out} of the {limit.rows} looked at" in capsys.readouterr().out
    assert summary["heldout"]["rows"] == 6 * 16
    kept = json.loads((one.out / NORM_LIMITS).read_text())["sites"][SITE]
    assert kept == limit._asdict() and read_run(one.out)["config"]["data"]["max_norm"] == 5
    fitted = read_sae(one.out, read_run(one.out)).normalizations.site
    assert fitted.rows == limit.rows - limit.left_out and 1 / fitted.transform.min() < 3
    whole = raw(weights(one.out)[1])
    for step in (6, 8):
        shutil.rmtree(one.out / "checkpoints" / str(step))
    train_sae(one.replace(resume=True))
    assert raw(weights(one.out)[1]) == whole
    with pytest.raises(ValueError, match=r"--max-norm: expected 0 or a number above 1, got 0\.5"):
        one.replace(max_norm=0.5)


def test_an_itda_has_no_atom_above(store, limit, tmp_path, capsys):
    settings = {**SMALL, "threshold": 0.5, "save_every": 1, "keep": 9}
    one = TrainITDAConfig(store=store, out=tmp_path / "run", **settings)
    train_itda(one)
    assert "are left out of fitting" in capsys.readouterr().out
    before = load_file(one.out / "atoms.safetensors")
    opened = open_store(store)
    for image, step, token in before["source"]:
        row = opened.read_bits(SITE, images=np.array([image]), steps=None)[0, step, token]
        assert sizes(row[None])[0] <= limit.limit
