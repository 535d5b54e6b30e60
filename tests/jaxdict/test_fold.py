"""Export: the folded dictionary is the model behind its normalization; its card is true."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harvest.store import open_store
from jaxdict import coder, sae
from jaxdict.config import NORMALIZATIONS, ExportConfig, TrainSAEConfig
from jaxdict.data import floats, source_of
from jaxdict.export import load_dictionary
from jaxdict.fold import export, fold, read_run, read_sae
from jaxdict.normalize import denormalize, fit, normalize, to_device
from jaxdict.sae import SAEParams
from jaxdict.train import train_sae
from tests.jaxdict.planted import SITE, write_planted_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("fold") / "store")


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("fold") / "run"
    train_sae(
        TrainSAEConfig(
            store=store,
            site=SITE,
            out=out,
            atoms=32,
            k=4,
            batch=128,
            rows=128 * 40,
            warmup=5,
            aux=0,
        )
    )
    return out


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "dictionary"
    return export(ExportConfig(run=run, out=out)), load_dictionary(out)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_folded_dictionary_is_the_model_on_normalized_rows(store, kind):
    x = floats(open_store(store).read_bits(SITE, images=range(10)))
    normalization = fit(lambda: [x], kind)
    keys = jax.random.split(jax.random.key(0), 4)
    params = SAEParams(
        jax.random.normal(keys[0], (40, 16)),
        0.1 * jax.random.normal(keys[1], (40,)),
        jax.random.normal(keys[2], (40, 16)),
        jnp.asarray(normalization.center + 0.1, jnp.float32),
    )
    params = sae.unit_norm(params)
    space = to_device(normalization)
    codes, _ = sae.encode(params, normalize(space, jnp.asarray(x)), 5)
    x_hat = denormalize(space, sae.decode(codes, params.atoms, params.bias))

    dictionary = fold(params, normalization, 5)
    assert dictionary.mean is None and dictionary.transform is None
    folded = coder.encode(dictionary, x)
    scale = float(np.abs(codes.values).max())
    np.testing.assert_allclose(
        np.asarray(folded.dense(40)), np.asarray(codes.dense(40)), atol=2e-4 * scale
    )
    deviation = np.abs(x - x.mean(0)).max()
    np.testing.assert_allclose(
        coder.decode(dictionary, folded), x_hat, atol=2e-4 * float(deviation)
    )
    one = np.asarray(denormalize(space, params.atoms[:1]) - denormalize(space, jnp.zeros((1, 16))))
    np.testing.assert_allclose(dictionary.raw_atoms[:1], one, atol=1e-3)


def test_export_writes_what_the_run_learned(exported, run, store):
    card, dictionary = exported
    assert (dictionary.kind, dictionary.k, dictionary.m, dictionary.d) == ("topk", 4, 32, 16)
    params, normalization, config, step = read_sae(run, read_run(run))
    assert step == 40 and config.k == 4
    np.testing.assert_array_equal(dictionary.atoms, fold(params, normalization, 4).atoms)
    assert dictionary.card["store_fingerprint"] == open_store(store).fingerprint
    assert dictionary.card["site"] == SITE and dictionary.card["stream"] == "img"
    assert dictionary.card["normalization"]["kind"] == "standardize"
    assert dictionary.card["model"] == {"id": "planted"}
    assert dictionary.card["training"]["finished"] is True
    assert dictionary.card["folding_error"]["relative"] < 1e-4
    assert dictionary.card["folding_error"]["same_features"] > 0.99
    assert card["metrics"] == dictionary.card["metrics"]


def test_card_metrics_are_those_of_the_exported_file(exported, run, store):
    _, dictionary = exported
    held = source_of(open_store(store), SITE, split="validation")
    x = floats(held.read(held.images)).astype(np.float64)
    x_hat = np.asarray(coder.decode(dictionary, coder.encode(dictionary, x)), np.float64)
    fvu = np.square(x - x_hat).sum() / np.square(x - x.mean(0)).sum()
    assert dictionary.card["metrics"]["fvu"] == pytest.approx(fvu, rel=1e-4)
    assert dictionary.card["metrics"]["rows"] == len(x)


def test_typical_is_the_mean_where_active(exported, store):
    _, dictionary = exported
    train = source_of(open_store(store), SITE)
    x = floats(train.read(train.images))
    dense = np.asarray(coder.encode(dictionary, x).dense(32), np.float64)
    times = (dense > 0).sum(0)
    wanted = np.where(times, dense.sum(0) / np.maximum(times, 1), 0)
    assert (times > 0).sum() > 10
    np.testing.assert_allclose(dictionary.typical, wanted, rtol=1e-4, atol=1e-6)


def test_averaged_weights_are_exported_where_there_are_any(store, tmp_path):
    config = TrainSAEConfig(
        store=store,
        site=SITE,
        out=tmp_path / "run",
        atoms=32,
        k=4,
        batch=128,
        rows=1280,
        ema=0.9,
        aux=0,
    )
    summary = train_sae(config)
    params, *_ = read_sae(config.out, read_run(config.out))
    export(ExportConfig(run=config.out, out=tmp_path / "d"))
    card = load_dictionary(tmp_path / "d").card
    assert card["metrics"]["fvu"] == pytest.approx(summary["heldout"]["fvu"], rel=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(params.atoms, axis=1), 1, atol=1e-5)


def test_mistakes_are_named(run, store, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a run"):
        export(ExportConfig(run=tmp_path, out=tmp_path / "d"))
    other = write_planted_store(tmp_path / "other", seed=5, images=24)
    with pytest.raises(ValueError, match="expected the store the run was trained on"):
        export(ExportConfig(run=run, out=tmp_path / "d", store=other))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        export(ExportConfig(run=run, out=tmp_path / "full"))
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="--rows: expected at least 1"):
        dataclasses.replace(ExportConfig(run=run, out=tmp_path), rows=0)
