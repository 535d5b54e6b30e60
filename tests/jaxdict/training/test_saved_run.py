"""Runs and settings as Flax modules."""

from __future__ import annotations

import numpy as np
import pytest
from flax import nnx

from harvest.store import open_store
from jaxdict import cli, decode, encode, load_dictionary, load_sae
from jaxdict.rows.source import floats, source_of
from jaxdict.runs.folder import CONFIG
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training.initialize import initial_sae
from tests.jaxdict.command import words
from tests.jaxdict.planted import SITE, write_planted_store

SMALL = {"site": SITE, "atoms": 48, "k": 4, "batch": 128, "rows": 128 * 60, "warmup": 5}


def test_a_run_is_a_module_on_raw_rows_that_encodes_as_its_dictionary(tmp_path):
    store = write_planted_store(tmp_path / "store")
    run = tmp_path / "run"
    flags = words(store=store, out=run, **SMALL, kind="batchtopk", normalize="whiten")
    cli.call(["train", "sae", *flags])
    cli.call(["export", str(run), *words(out=tmp_path / "dictionary")])
    sae, dictionary = load_sae(run), load_dictionary(tmp_path / "dictionary")
    assert (sae.kind, sae.k) == (dictionary.kind, dictionary.k)
    rows = source_of(open_store(store), SITE, split="validation")
    x = floats(rows.read(rows.images[:4]))
    codes, wanted = encode(dictionary, x).dense(48), sae.encode(x).dense(48)
    np.testing.assert_allclose(codes, wanted, atol=1e-3 * np.abs(wanted).max())
    rebuilt = decode(dictionary, encode(dictionary, x))
    np.testing.assert_allclose(sae(x), rebuilt, atol=1e-3 * np.abs(x).max())
    optimized = nnx.to_pure_dict(nnx.state(sae, nnx.Param))
    assert set(optimized) == {"encoder", "encoder_bias", "atoms", "bias", "threshold"}


def test_the_run_of_an_itda_is_refused(tmp_path):
    (tmp_path / CONFIG).write_text('{"config": {}, "store": {}, "kind": "itda"}')
    with pytest.raises(ValueError, match=r"expected a run of `jaxdict train sae`, got .* an ITDA"):
        load_sae(tmp_path)


def test_settings_give_kind_and_size(tmp_path):
    config = TrainSAEConfig.of(store=tmp_path, site=SITE, out=tmp_path, kind="matryoshka", k=3)
    sae = initial_sae(config, 10, rngs=nnx.Rngs(0))
    assert (sae.kind, sae.k, sae.encoder.shape) == ("matryoshka", 6, (80, 10))
    np.testing.assert_allclose(4 * sae.encoder[...], sae.atoms[...], rtol=1e-6)
