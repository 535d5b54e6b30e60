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
from jaxdict.sae import kinds
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.sae.protocol import Active
from jaxdict.sae.step_config import Execution
from jaxdict.training import sweep
from steer.coder import Coder
from tests.jaxdict.command import words
from tests.jaxdict.planted import SITE, write_planted_store
from tests.reference import coder as slow


class MeanK:
    """Whatever exceeds the mean over a batch's rows of the k-th largest, with a small L1 penalty."""

    fixed_slots = False
    slots_per_k = 3
    sparsity = 0.01
    error = staticmethod(kinds.whole_error)

    @staticmethod
    def prefixes(m):
        return (m // 2, m)

    @staticmethod
    def own_settings(config):
        return {"bandwidth": config.sparsity_penalty.bandwidth}

    @staticmethod
    def active(params, z, step_config, hyperparams, *, dead=None):
        codes, aux = kinds.largest(params, z, step_config.slots, step_config, dead=dead)
        largest = jax.lax.top_k(jax.lax.stop_gradient(codes.values), step_config.k)[0]
        tau = jnp.mean(jnp.min(largest, axis=1))
        kept = jnp.where(codes.values >= tau, codes.values, 0.0)
        penalty = (
            hyperparams.sparsity * jnp.mean(jnp.sum(kept, axis=1)) / jnp.sqrt(hyperparams.variance)
        )
        return Active(Codes(codes.indices, kept), aux, penalty, tau)


NAME = "meank"


@pytest.fixture
def sixth(monkeypatch):
    """What a developer would write: the class in the one file, the line in the other."""
    monkeypatch.setitem(kinds.REGISTRY, NAME, MeanK)
    line = arrays.EncoderKind("one", "what exceeds the mean k-th largest of a batch")
    monkeypatch.setitem(arrays.ENCODER_KINDS, NAME, line)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("kind") / "store")


SMALL = {"site": SITE, "kind": NAME, "atoms": 48, "k": 3, "batch": 128, "warmup": 5}


def test_a_new_kind_is_trained_exported_encoded_and_measured(sixth, store, tmp_path):
    run, out = tmp_path / "run", tmp_path / "dictionary"
    flags = words(store=store, out=run, **SMALL, rows=128 * 120, dead_rows=1000)
    summary = cli.call(["train", "sae", *flags])
    assert summary["kind"] == NAME and summary["heldout"]["fvu"] < 0.5
    resolved = read_json(run / CONFIG)["resolved"]
    assert (resolved["slots"], resolved["sparsity"], resolved["prefixes"]) == (9, 0.01, [24, 48])

    cli.call(["export", str(run), *words(out=out)])
    found = load_dictionary(out)
    assert (found.kind, found.k) == (NAME, 9)
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
        config = TrainSAEConfig.of(store=store, out=tmp_path, **SMALL, sweep=(swept,))
        groups = sweep.grouped(sweep.expand(config, open_store(store)), Execution())
        assert [len(group.members) for group in groups] == sizes


def test_a_new_kind_is_refused_where_nobody_added_it(store, tmp_path):
    with pytest.raises(ValueError, match=r"--kind: expected one of \('topk'.*got 'meank'"):
        TrainSAEConfig.of(store=store, out=tmp_path, **SMALL)


def test_every_kind_has_a_class_and_a_line():
    assert set(kinds.REGISTRY) == set(arrays.ENCODER_KINDS)
