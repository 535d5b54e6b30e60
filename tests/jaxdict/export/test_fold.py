"""Export: the folded dictionary is the model behind its normalization; its card is true."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from harvest.store import StoreSpec, create_store, open_store
from jaxdict.dictionary import coder
from jaxdict.dictionary.arrays import ENCODER_KINDS
from jaxdict.dictionary.files import load_dictionary
from jaxdict.export.config import ExportConfig
from jaxdict.export.export import export
from jaxdict.export.fold import fold, folding_error
from jaxdict.flags import NORMALIZATIONS
from jaxdict.metrics.usage import typical_activations
from jaxdict.rows.normalization import fit
from jaxdict.rows.source import floats, source_of
from jaxdict.runs.folder import read_run
from jaxdict.sae import model
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.sae.model import SAEParams
from jaxdict.training.saved_run import read_sae
from jaxdict.training.train import train_sae
from tests.jaxdict.planted import SITE, write_planted_store
from tests.reference import coder as slow

TARGET = f"{SITE}.mlp"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("fold") / "store")


@pytest.fixture(scope="module")
def two_sites(tmp_path_factory):
    """Rows of a site of width 6 and of a wider one, of the same images, steps and tokens."""
    spec = StoreSpec(
        sites={SITE: (8, 6), TARGET: (8, 9)},
        images=12,
        steps=2,
        prompts=[f"prompt {i}" for i in range(12)],
        seeds=list(range(12)),
        split=[int(i % 4 == 0) for i in range(12)],
        sigmas=[1.0, 0.5],
        timesteps=[1000.0, 500.0],
        grid=(2, 4),
    )
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("fold") / "two"
    writer = create_store(path, spec)
    for shard in writer.pending():
        part = writer.images_of(shard)
        n = part.stop - part.start
        x = rng.normal(size=(n, 2, 8, 6)) * [1, 2, 0.5, 9, 1, 1] + [0, 3, 0, 40, 0, 1]
        y = x @ rng.normal(size=(6, 9)) + rng.normal(size=(n, 2, 8, 9)) + 5
        writer.write(shard, {SITE: x.astype(np.float32), TARGET: y.astype(np.float32)})
    opened = open_store(path)
    return source_of(opened, SITE), source_of(opened, TARGET)


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("fold") / "run"
    train_sae(
        TrainSAEConfig.of(
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


def random_params(normalization, kind, target=None, m=40):
    """Weights of a kind in normalized space, of a transcoder where there is a target."""
    d, out = len(normalization.mean), len((target or normalization).mean)
    keys = jax.random.split(jax.random.key(0), 5)
    thresholds = {
        "batchtopk": jnp.full(m, 0.8),
        "matryoshka": jnp.full(m, 2.0),
        "jumprelu": jax.random.uniform(keys[4], (m,), maxval=3.0),
    }
    params = SAEParams(
        jax.random.normal(keys[0], (m, d)),
        0.1 * jax.random.normal(keys[1], (m,)),
        jax.random.normal(keys[2], (m, out)),
        jnp.asarray(normalization.center + 0.1, jnp.float32),
        thresholds.get(kind),
        None if target is None else jax.random.normal(keys[3], (out,)),
    )
    return model.unit_norm(params)


def slow_model(params, z, k):
    """Dense codes and rows rebuilt, both in normalized space, float64, one row at a time."""
    encoder, encoder_bias, atoms, bias = (np.asarray(leaf, np.float64) for leaf in params[:4])
    threshold = 0 if params.threshold is None else np.asarray(params.threshold, np.float64)
    out_bias = bias if params.out_bias is None else np.asarray(params.out_bias, np.float64)
    codes = np.zeros((len(z), len(encoder)))
    for row, one in enumerate(z):
        pre = encoder @ (one - bias) + encoder_bias
        active = np.where(pre > threshold, np.maximum(pre, 0), 0)
        kept = np.argsort(-active)[:k]
        codes[row, kept] = active[kept]
    return codes, codes @ atoms + out_bias


def onto(rows, matrix):
    return rows @ (np.diag(matrix) if matrix.ndim == 1 else matrix)


def check_folded(params, normalization, x, k, kind, target=None):
    """The folded dictionary rebuilds what the slow model does, in raw space."""
    out = target or normalization
    z = onto(x.astype(np.float64) - normalization.mean, normalization.transform)
    codes, y_z = slow_model(params, z, k)
    y = onto(y_z, out.inverse) + out.mean
    named = {} if target is None else {"target": target, "target_site": TARGET}
    dictionary = fold(params, normalization, k, kind=kind, **named)
    assert dictionary.mean is None and dictionary.transform is None
    assert (dictionary.kind, dictionary.d, dictionary.d_out) == (kind, x.shape[1], y.shape[1])
    folded = coder.encode(dictionary, x)
    np.testing.assert_allclose(folded.dense(len(codes[0])), codes, atol=2e-4 * codes.max())
    y_hat = np.asarray(coder.decode(dictionary, folded))
    deviation = np.abs(y - y.mean(0)).max(0)
    np.testing.assert_allclose(y_hat / deviation, y / deviation, atol=2e-4)
    one = onto(np.asarray(params.atoms, np.float64), out.inverse)
    np.testing.assert_allclose(dictionary.raw_atoms, one, rtol=1e-5, atol=1e-5)
    return dictionary, codes


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_folded_dictionary_is_the_model_on_normalized_rows(store, kind):
    x = floats(open_store(store).read_bits(SITE, images=range(10)))
    normalization = fit(lambda: [x], kind)
    check_folded(random_params(normalization, "topk"), normalization, x, 5, "topk")


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_every_kind_is_folded_with_its_threshold(store, kind):
    x = floats(open_store(store).read_bits(SITE, images=range(10)))
    normalization = fit(lambda: [x], "standardize")
    params = random_params(normalization, kind)
    dictionary, codes = check_folded(params, normalization, x, 12, kind)
    if params.threshold is None:
        assert dictionary.threshold is None
    else:
        np.testing.assert_array_equal(dictionary.threshold, params.threshold)
        assert ((codes > 0).sum(1) < 12).any()
    assert ((codes > 0).sum(1) == 12).any()


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("normalizers", [("standardize", "whiten"), ("whiten", "standardize")])
def test_a_transcoder_is_folded_with_both_normalizations(two_sites, kind, normalizers):
    rows, _ = two_sites
    x, y = (floats(source.read(source.images)) for source in two_sites)
    normalization, target = fit(lambda: [x], normalizers[0]), fit(lambda: [y], normalizers[1])
    params = random_params(normalization, kind, target)
    dictionary, _ = check_folded(params, normalization, x, 6, kind, target)
    assert dictionary.transcoder and dictionary.card == {"target": TARGET}

    maps = {"normalization": normalization, "target": target}
    error = folding_error(dictionary, params, rows, **maps)
    assert error["rows"] == len(x)
    assert error["relative"] < 1e-4 and error["same_features"] > 0.99
    # A known error: every row of the target's space off by one in each dimension.
    assert dictionary.bias is not None
    moved = dataclasses.replace(dictionary, bias=dictionary.bias + np.float32(1))
    error = folding_error(moved, params, rows, **maps)
    spread = np.square(y - y.mean(0, dtype=np.float64)).sum()
    assert error["relative"] == pytest.approx(np.sqrt(y.size / spread), rel=1e-3)


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_folding_error_sees_a_wrong_fold_of_any_kind(store, kind):
    rows = source_of(open_store(store), SITE)
    normalization = fit(lambda: [floats(rows.read(rows.images))], "standardize")
    params = random_params(normalization, kind)
    dictionary = fold(params, normalization, 8, kind=kind)
    good = folding_error(dictionary, params, rows, normalization=normalization, batch=100)
    assert good["relative"] < 1e-4 and good["same_features"] > 0.99
    assert dictionary.encoder_bias is not None
    shifted = dictionary.encoder_bias + np.linspace(-0.5, 0.5, 40, dtype=np.float32)
    wrong = dataclasses.replace(dictionary, encoder_bias=shifted)
    bad = folding_error(wrong, params, rows, normalization=normalization, batch=100)
    assert bad["relative"] > 0.01 and bad["same_features"] < good["same_features"]


def test_half_a_target_is_refused(store):
    x = floats(open_store(store).read_bits(SITE, images=range(4)))
    normalization = fit(lambda: [x], "rms")
    params = random_params(normalization, "topk", normalization)
    with pytest.raises(ValueError, match="got no target_site; give both"):
        fold(params, normalization, 5, target=normalization)
    with pytest.raises(ValueError, match="got no target; give both"):
        fold(params, normalization, 5, target_site=TARGET)


def test_typical_of_a_transcoder_is_the_mean_where_active(two_sites):
    rows, _ = two_sites
    x, y = (floats(source.read(source.images)) for source in two_sites)
    normalization, target = fit(lambda: [x], "standardize"), fit(lambda: [y], "rms")
    params = random_params(normalization, "jumprelu", target)
    dictionary = fold(params, normalization, 12, kind="jumprelu", target=target, target_site=TARGET)
    dense = slow.encode(dictionary, x)
    times = (dense > 0).sum(0)
    assert (times > 0).all()
    found = typical_activations(dictionary, rows, batch=100)
    np.testing.assert_allclose(found, dense.sum(0) / times, rtol=1e-3)


def test_export_writes_what_the_run_learned(exported, run, store):
    card, dictionary = exported
    assert (dictionary.kind, dictionary.k, dictionary.m, dictionary.d) == ("topk", 4, 32, 16)
    trained = read_sae(run, read_run(run))
    assert trained.step == 40 and trained.config.model.k == trained.slots == 4
    again = fold(trained.params, trained.normalizations.site, 4)
    np.testing.assert_array_equal(dictionary.atoms, again.atoms)
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
    config = TrainSAEConfig.of(
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
    params = read_sae(config.out, read_run(config.out)).params
    export(ExportConfig(run=config.out, out=tmp_path / "d"))
    card = load_dictionary(tmp_path / "d").card
    assert card["metrics"]["fvu"] == pytest.approx(summary["heldout"]["fvu"], rel=1e-3)
    np.testing.assert_allclose(jnp.linalg.norm(params.atoms, axis=1), 1, atol=1e-5)


def test_mistakes_are_named(run, store, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a run"):
        export(ExportConfig(run=tmp_path, out=tmp_path / "d"))
    other = write_planted_store(tmp_path / "other", seed=5, images=24)
    with pytest.raises(ValueError, match="expected the store that the run in"):
        export(ExportConfig(run=run, out=tmp_path / "d", store=other))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"thesis\.txt"):
        export(ExportConfig(run=run, out=tmp_path / "full"))
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ValueError, match="--rows: expected at least 1"):
        dataclasses.replace(ExportConfig(run=run, out=tmp_path), rows=0)
