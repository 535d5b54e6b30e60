"""A further kind of autoencoder: a class and a line in a table, and every room knows it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from harvest.atomic import read_json
from harvest.store import open_store
from jaxdict import cli
from jaxdict.codes.codes import Codes
from jaxdict.dictionary import arrays, coder
from jaxdict.dictionary.files import load_dictionary
from jaxdict.rows.source import floats, source_of
from jaxdict.runs.folder import CONFIG
from jaxdict.sae import kinds, model
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.sae.step_config import Execution
from jaxdict.training import sweep
from steer.coder import Coder
from tests.jaxdict.command import words
from tests.jaxdict.planted import SITE, write_planted_store
from tests.reference import coder as slow


class MeanK(kinds.SAE):
    """Whatever exceeds the mean over a batch's rows of the k-th largest, with a small L1 penalty."""

    name = "meank"
    batch_threshold = True
    slots_per_k = 3
    sparsity = 0.01

    @classmethod
    def prefixes(cls, m):
        return (m // 2, m)

    @classmethod
    def own_settings(cls, config):
        return {"bandwidth": config.bandwidth}

    @classmethod
    def active(cls, params, z, step_config, hyperparams, *, dead=None, k_aux=0):
        codes, aux = model.encode(
            params, z, step_config.slots, dead=dead, k_aux=k_aux, execution=step_config.execution
        )
        largest = jax.lax.top_k(jax.lax.stop_gradient(codes.values), step_config.k)[0]
        tau = jnp.mean(jnp.min(largest, axis=1))
        kept = jnp.where(codes.values >= tau, codes.values, 0.0)
        penalty = (
            hyperparams.sparsity * jnp.mean(jnp.sum(kept, axis=1)) / jnp.sqrt(hyperparams.variance)
        )
        return kinds.Active(Codes(codes.indices, kept), aux, penalty, tau)


@pytest.fixture
def sixth(monkeypatch):
    """What a developer would write: the class in the one file, the line in the other."""
    monkeypatch.setitem(kinds.REGISTRY, MeanK.name, MeanK)
    line = arrays.Kind("one", "what exceeds the mean k-th largest of a batch")
    monkeypatch.setitem(arrays.ENCODER_KINDS, MeanK.name, line)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("kind") / "store")


SMALL = {"site": SITE, "kind": MeanK.name, "atoms": 48, "k": 3, "batch": 128, "warmup": 5}


def test_a_new_kind_is_trained_exported_encoded_and_measured(sixth, store, tmp_path):
    run, out = tmp_path / "run", tmp_path / "dictionary"
    flags = words(store=store, out=run, **SMALL, rows=128 * 120, dead_rows=1000)
    summary = cli.call(["train", "sae", *flags])
    assert summary["kind"] == MeanK.name and summary["heldout"]["fvu"] < 0.5
    resolved = read_json(run / CONFIG)["resolved"]
    assert (resolved["slots"], resolved["sparsity"], resolved["prefixes"]) == (9, 0.01, [24, 48])

    cli.call(["export", str(run), *words(out=out)])
    found = load_dictionary(out)
    assert (found.kind, found.k) == (MeanK.name, 9)
    assert found.threshold is not None and found.threshold.min() == found.threshold.max() > 0
    assert found.card["folding_error"]["relative"] < 1e-4

    rows = source_of(open_store(store), SITE, split="validation")
    x = floats(rows.read(rows.images[:4]))
    wanted = slow.encode(found, x)
    assert (wanted > 0).sum(1).max() > (wanted > 0).sum(1).min(), "rows should differ in L0"
    ours = np.asarray(coder.encode(found, x).dense(found.m))
    np.testing.assert_allclose(ours, wanted, atol=1e-3 * wanted.max())
    theirs = Coder(found).encode(torch.from_numpy(x)).dense(found.m).numpy()
    np.testing.assert_allclose(theirs, wanted, atol=1e-3 * wanted.max())

    measured = cli.call(
        ["eval", str(out), *words(store=store, out=tmp_path / "e.json"), "--no-plots"]
    )
    assert measured["metrics"]["fvu"] == pytest.approx(summary["heldout"]["fvu"], rel=1e-3)
    assert measured["active"] == max(1, round(measured["metrics"]["l0"]))


def test_members_of_a_new_kind_share_a_step_unless_it_reads_what_they_differ_in(
    sixth, store, tmp_path
):
    for swept, sizes in (("penalty=l0,tanh", [2]), ("bandwidth=0.2,0.5", [1, 1])):
        config = TrainSAEConfig(store=store, out=tmp_path, **SMALL, sweep=(swept,))
        groups = sweep.grouped(sweep.expand(config, open_store(store)), Execution())
        assert [len(group.members) for group in groups] == sizes


def test_a_new_kind_is_refused_where_nobody_added_it(store, tmp_path):
    with pytest.raises(ValueError, match=r"--kind: expected one of \('topk'.*got 'meank'"):
        TrainSAEConfig(store=store, out=tmp_path, **SMALL)


def test_what_a_kind_learns_is_what_its_dictionaries_hold():
    assert set(kinds.REGISTRY) == set(arrays.ENCODER_KINDS)
    for name, line in arrays.ENCODER_KINDS.items():
        kind = kinds.REGISTRY[name]
        assert kind.batch_threshold == (line.threshold == "one")
        assert kind.log_threshold == (line.threshold == "each")


def test_the_base_of_all_kinds_is_none_itself():
    params = model.initial_params(jax.random.key(0), 4, mean=jnp.zeros(3))
    with pytest.raises(TypeError, match="abstract"):
        kinds.SAE(params, 2)
