"""JAX with numbers of 64 bits by default: everything trains and measures as without, to the same bits."""

from __future__ import annotations

import json
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from harvest.store import open_store
from jaxdict.dictionary import load_dictionary
from jaxdict.evaluate.config import EvalConfig
from jaxdict.evaluate.evaluate import evaluate
from jaxdict.export.config import ExportConfig, PruneConfig
from jaxdict.export.export import export
from jaxdict.export.prune import prune
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.train import train_itda
from jaxdict.rows import fit, floats, source_of, to_device
from jaxdict.runs.folder import read_run
from jaxdict.sae import Batch, kinds, make_train_step
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training.batches import Normalizations
from jaxdict.training.initialize import random_state
from jaxdict.training.saved_run import load_sae, read_sae
from jaxdict.training.sweep import Member, hyperparams_of, resolve, step_config_of
from jaxdict.training.train import train_sae
from tests.jaxdict.planted import SITE, write_planted_store

SMALL = {"site": SITE, "atoms": 32, "k": 4, "batch": 64, "rows": 64 * 3, "dead_rows": 100}
PARTNER = "double.1.img"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    place = tmp_path_factory.mktemp("x64") / "store"
    return write_planted_store(place, images=10, more={PARTNER: (16, 12)})


@contextmanager
def default_bits(bits):
    """What JAX_ENABLE_X64 sets, for every thread."""
    jax.config.update("jax_enable_x64", bits == 64)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


def both(made, place):
    """What `made` makes in a folder of its own, with 32 and with 64 bits by default."""
    found = []
    for bits in (32, 64):
        with default_bits(bits):
            found.append(made(place / str(bits)))
    return found


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def raw(tree):
    return [(np.asarray(leaf).dtype, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(tree)]


# Compiled twice, so that one of them stands for all kinds but in the slow run.
KINDS = [k if k == "jumprelu" else pytest.param(k, marks=pytest.mark.slow) for k in kinds.REGISTRY]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits(kind, store, tmp_path):
    def trained(out):
        settings = {**SMALL, "kind": kind, "resample": 2, "ema": 0.9, "eval_rows": 64}
        train_sae(TrainSAEConfig.of(store=store, out=out, **settings))
        return raw(read_sae(out, read_run(out)).params)

    without, with_64 = both(trained, tmp_path)
    assert with_64 == without


@pytest.mark.parametrize("kind", kinds.REGISTRY)
def test_a_step_of_every_kind(kind, store, tmp_path):
    site, d = source_of(open_store(store), SITE), 16
    config = TrainSAEConfig.of(store=store, out=tmp_path, **{**SMALL, "kind": kind, "dead_rows": 1})
    with default_bits(64):
        fitted = Normalizations(fit(lambda: [floats(site.read(site.images))], "whiten"))
        member = Member("", config, resolve(config, d))
        state = random_state(member, fitted)
        step = make_train_step(step_config_of(member))
        batch = Batch(jnp.zeros((64, d), jnp.uint16) + 16256, to_device(fitted.site))
        numbers = hyperparams_of(member, fitted.site.variance)
        before = dtypes(state)
        for _ in range(2):
            state, metrics = step(state, batch, jax.tree.map(jnp.float32, numbers))
    assert dtypes(state) == before
    assert set(dtypes(metrics)) == {np.dtype(np.float32)}


@pytest.mark.slow
def test_a_sweep_of_transcoders_from_training_rows(store, tmp_path):
    def trained(out):
        settings = {**SMALL, "target": PARTNER, "init": "rows", "kind": "jumprelu"}
        train_sae(TrainSAEConfig.of(store=store, out=out, sweep=("seed=0,1",), **settings))
        return raw(
            [read_sae(out / f"seed={i}", read_run(out / f"seed={i}")).params for i in (0, 1)]
        )

    without, with_64 = both(trained, tmp_path)
    assert with_64 == without


@pytest.mark.parametrize("target", ["", pytest.param(PARTNER, marks=pytest.mark.slow)])
def test_itda_and_its_export(target, store, tmp_path):
    def built(out):
        config = {"store": store, "site": SITE, "out": out / "run", "k": 3, "batch": 64}
        train_itda(TrainITDAConfig(**config, threshold=0.3, target=target))
        export(ExportConfig(run=out / "run", out=out / "dictionary"))
        return load_file(out / "dictionary" / "dictionary.safetensors")

    without, with_64 = both(built, tmp_path)
    assert raw(with_64) == raw(without)


@pytest.mark.slow
def test_export_eval_prune_and_the_flax_module(store, tmp_path):
    def measured(out):
        run, made, small = out / "run", out / "dictionary", out / "small"
        settings = {**SMALL, "kind": "batchtopk", "eval_rows": 64}
        train_sae(TrainSAEConfig.of(store=store, out=run, **settings))
        export(ExportConfig(run=run, out=made))
        evaluate(EvalConfig(made, store, out / "eval.json", encoder="pursuit", plots=False))
        prune(PruneConfig(made, store, small, keep=16))
        sae, numbers = load_sae(run), json.loads((out / "eval.json").read_text())
        x = np.ones((2, load_dictionary(made).d), np.float32)
        return raw(sae(x)), load_file(small / "dictionary.safetensors"), numbers

    without, with_64 = both(measured, tmp_path)
    assert with_64[0] == without[0]
    assert raw(with_64[1]) == raw(without[1])
    leaves = [
        [x for x in jax.tree.leaves(one[2]) if isinstance(x, float)] for one in (without, with_64)
    ]
    assert leaves[1] == pytest.approx(leaves[0], rel=1e-6)
