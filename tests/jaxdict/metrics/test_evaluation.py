"""What a measurement may not depend on or do: the batch size, the origin of the rows, further batch dimensions."""

from __future__ import annotations

import itertools
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from harvest.store import open_store
from jaxdict.dictionary import Dictionary, encode
from jaxdict.metrics import measure_dictionary
from jaxdict.pursuit import gradient_pursuit
from jaxdict.rows import Loader, source_of
from jaxdict.sae import SAE
from tests.jaxdict.planted import SITE, write_planted_store

D, M = 16, 24


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return source_of(open_store(write_planted_store(tmp_path_factory.mktemp("s") / "store")), SITE)


def dictionary(kind, **more):
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((M, D)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    typical = np.zeros(M, np.float32)
    if kind == "itda":
        return Dictionary(kind, 3, atoms, typical=typical, **more)
    bias = rng.standard_normal(D).astype(np.float32)
    own = {"encoder": atoms.copy(), "encoder_bias": np.full(M, -1, np.float32), "bias": bias}
    threshold = {"batchtopk": 0.7, "matryoshka": 0.7, "jumprelu": 0.4}.get(kind)
    if threshold:
        own["threshold"] = np.full(M, threshold, np.float32)
    return Dictionary(kind, 3, atoms, typical=typical, **{**own, **more})


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "jumprelu", "matryoshka", "relu", "itda"])
def test_no_number_depends_on_the_batch_size(kind, source):
    one, wanted = dictionary(kind), None
    for batch in (37, 1024):
        found = measure_dictionary(one, source, batch=batch)
        wanted = wanted or found
        np.testing.assert_array_equal(found.fired, wanted.fired)
        np.testing.assert_array_equal(found.active, wanted.active)
        numbers, others = found.summary(), wanted.summary()
        for name in ("rows", "l0", "dead_share"):
            assert numbers[name] == others[name]
        for name in ("fvu", "fvu_standardized", "ve"):
            assert numbers[name] == pytest.approx(others[name], rel=1e-4)


def test_variance_is_taken_around_the_mean_not_around_zero(source):
    """To rebuild every row as the mean leaves all of the variance, however far the mean is from zero."""
    rows = source.store.read(SITE, images=source.images).reshape(-1, D).astype(np.float64)
    mean = rows.mean(0)
    assert np.square(mean).sum() > 5 * rows.var(0).sum(), "about zero it would be below a fifth"
    never = dictionary("topk", bias=mean.astype(np.float32), encoder_bias=np.full(M, -1e6, "f4"))
    found = measure_dictionary(never, source)
    assert found.summary()["l0"] == 0
    assert found.raw.fvu == pytest.approx(1, rel=1e-3)
    assert found.raw.fvu_standardized == pytest.approx(1, rel=1e-3)


def test_encode_takes_rows_alone_and_says_so(source):
    x = jnp.ones((2, 3, D))
    sae = SAE(d=D, m=M, k=3, rngs=nnx.Rngs(0))
    atoms = jnp.eye(D)
    for call in (
        lambda: encode(dictionary("topk"), x),
        lambda: encode(dictionary("itda"), x),
        lambda: sae.encode(x),
        lambda: gradient_pursuit(x, atoms, 2),
    ):
        with pytest.raises(ValueError, match=rf"expected .*\[n, .*got \[2, 3, {D}\]"):
            call()


@pytest.mark.parametrize("memory", [0, 2**30])
def test_the_loader_holds_no_more_after_many_epochs_than_after_two(tmp_path, memory):
    source = source_of(open_store(write_planted_store(tmp_path / "wide", d=128)), SITE)
    batches = Loader(source, batch=64, seed=0, pool=source.rows // 4, memory=memory).batches()
    epoch = source.rows // 64

    def peak(epochs):
        tracemalloc.reset_peak()
        for _ in itertools.islice(batches, epochs * epoch):
            pass
        return tracemalloc.get_traced_memory()[1]

    tracemalloc.start()
    try:
        first, later = peak(2), peak(12)
    finally:
        tracemalloc.stop()
        batches.close()
    assert later < first + 2 * source.bytes
