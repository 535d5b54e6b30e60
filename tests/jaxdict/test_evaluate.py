"""`jaxdict eval` against NumPy on the same held-out rows."""

from __future__ import annotations

import json

import numpy as np
import pytest

from harvest.store import open_store
from jaxdict import coder
from jaxdict.config import EvalConfig
from jaxdict.data import floats, source_of
from jaxdict.evaluate import evaluate
from jaxdict.export import Dictionary, save_dictionary
from tests.jaxdict.planted import SITE, write_planted_store
from tests.reference import sae as reference


def random_dictionary(kind, d, site=SITE):
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(20, d)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    shared = {"typical": np.ones(20, np.float32), "card": {"site": site}}
    if kind == "topk":
        zero = np.zeros(20, np.float32)
        return Dictionary("topk", 3, atoms, np.ones(d, np.float32), atoms, zero, **shared)
    scale = np.full(d, 0.5, np.float32)
    mean = rng.normal(size=d).astype(np.float32)
    return Dictionary("itda", 3, atoms, mean=mean, transform=scale, inverse=1 / scale, **shared)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("eval") / "store")


@pytest.mark.parametrize("kind", ["topk", "itda"])
def test_numbers_are_numpys(store, tmp_path, kind):
    dictionary = random_dictionary(kind, 16)
    path = save_dictionary(dictionary, tmp_path / "dictionary")
    config = EvalConfig(dictionary=path, store=store, out=tmp_path / "eval.json", batch=100)
    result = evaluate(config)
    assert json.loads(config.out.read_text()) == result

    held = source_of(open_store(store), SITE, split="validation")
    x = floats(held.read(held.images)).astype(np.float64)
    codes = coder.encode(dictionary, x)
    x_hat = np.asarray(coder.decode(dictionary, codes), np.float64)
    dense = np.asarray(codes.dense(20))
    numbers = result["metrics"]
    assert numbers["rows"] == len(x)
    assert numbers["fvu"] == pytest.approx(reference.fvu(x, x_hat), rel=1e-4)
    assert numbers["ve"] == pytest.approx(reference.ve(x, x_hat), rel=1e-3)
    assert numbers["l0"] == pytest.approx((dense != 0).sum(1).mean())
    assert numbers["dead_share"] == pytest.approx((dense != 0).any(0).mean() * -1 + 1)
    step = np.arange(len(x)) // 16 % 2
    for name in (0, 1):
        wanted = reference.fvu(x[step == name], x_hat[step == name])
        assert numbers["fvu_per_step"][str(name)] == pytest.approx(wanted, rel=1e-4)

    train = source_of(open_store(store), SITE)
    t = floats(train.read(train.images)).astype(np.float64)
    _, _, vectors = np.linalg.svd(t - t.mean(0), full_matrices=False)
    top = vectors[:3].T
    pca = (x - t.mean(0)) @ top @ top.T + t.mean(0)
    assert result["baselines"]["pca"]["components"] == 3
    assert result["baselines"]["pca"]["fvu"] == pytest.approx(reference.fvu(x, pca), rel=1e-3)
    flat = np.broadcast_to(t.mean(0), x.shape)
    assert result["baselines"]["mean"]["fvu"] == pytest.approx(reference.fvu(x, flat), rel=1e-4)


def test_rows_limit_split_and_site(store, tmp_path):
    path = save_dictionary(random_dictionary("topk", 16, site="single.9.img"), tmp_path / "d")
    config = EvalConfig(
        dictionary=path, store=store, out=tmp_path / "e.json", site=SITE, split="train", rows=96
    )
    assert evaluate(config)["metrics"]["rows"] == 96
    with pytest.raises(ValueError, match=r"got 'single\.9\.img'"):
        evaluate(EvalConfig(dictionary=path, store=store, out=tmp_path / "e.json"))


def test_wrong_width_is_named(store, tmp_path):
    path = save_dictionary(random_dictionary("topk", 12), tmp_path / "d")
    with pytest.raises(ValueError, match="width 12 as in the dictionary, got 16"):
        evaluate(EvalConfig(dictionary=path, store=store, out=tmp_path / "e.json"))
