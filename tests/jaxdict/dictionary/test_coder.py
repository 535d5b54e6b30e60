"""Encode and decode of an exported dictionary, one list of properties for all kinds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.codes.codes import Codes
from jaxdict.dictionary import coder
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.dictionary.files import load_dictionary, save_dictionary
from tests.reference import coder as slow

D, M, K = 12, 40, 5


def linear(kind: str, *, k: int = K, m: int = M, d_out: int = D) -> Dictionary:
    """A dictionary with an encoder; one of another width than D is a transcoder."""
    rng = np.random.default_rng(0)
    encoder, atoms = (rng.normal(size=(m, d)).astype(np.float32) for d in (D, d_out))
    bias, encoder_bias = rng.normal(size=d_out), rng.normal(size=m)
    thresholds = {
        "batchtopk": np.full(m, 4, np.float32),
        "matryoshka": np.full(m, 9, np.float32),
        "jumprelu": rng.uniform(0, 15, m).astype(np.float32),
    }
    return Dictionary(
        kind,
        k,
        atoms,
        bias.astype(np.float32),
        encoder,
        encoder_bias.astype(np.float32),
        threshold=thresholds.get(kind),
        typical=np.ones(m, np.float32),
        card={} if d_out == D else {"site": "double.2.img", "target": "double.2.img.mlp"},
    )


def itda(square: bool, d_out: int = D) -> Dictionary:
    """Of another width than D, with a target."""
    rng = np.random.default_rng(1)
    atoms = rng.normal(size=(M, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    inverse = rng.normal(size=(D, D)) if square else np.exp(rng.normal(size=D))
    transform = np.linalg.inv(inverse) if square else 1 / inverse
    space = rng.normal(size=D), transform, inverse
    mean, transform, inverse = (a.astype(np.float32) for a in space)
    shared = {"mean": mean, "transform": transform, "typical": np.ones(M, np.float32)}
    if d_out == D:
        return Dictionary("itda", K, atoms.astype(np.float32), inverse=inverse, **shared)
    ys, bias = (rng.normal(size=s).astype(np.float32) for s in ((M, d_out), d_out))
    inverse = rng.normal(size=(d_out, d_out) if square else d_out).astype(np.float32)
    card = {"site": "double.2.img", "target": "double.2.img.mlp"}
    shared |= {"inverse": inverse, "encoder": atoms.astype(np.float32), "bias": bias}
    return Dictionary("itda", K, ys, card=card, **shared)


KINDS = {
    "topk": linear("topk"),
    "batchtopk": linear("batchtopk", k=20),
    "jumprelu": linear("jumprelu", k=12),
    "matryoshka": linear("matryoshka"),
    "relu": linear("relu", k=M),
    "relu, cut": linear("relu", k=15),
    "topk, wide": linear("topk", m=4096),
    "jumprelu, wide": linear("jumprelu", m=4096, k=30),
    "transcoder": linear("topk", d_out=19),
    "jumprelu transcoder": linear("jumprelu", k=30, d_out=7),
    "itda": itda(False),
    "itda whitened": itda(True),
    "itda transcoder": itda(False, 19),
    "itda transcoder, whitened": itda(True, 7),
}
every = pytest.mark.parametrize("dictionary", KINDS.values(), ids=KINDS)
small = {name: dictionary for name, dictionary in KINDS.items() if dictionary.m == M}


def rows(n=9, seed=7):
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32) * 3


@every
def test_codes_are_what_the_formulas_say(dictionary):
    x = rows()
    codes = coder.encode(dictionary, x)
    wanted = slow.encode(dictionary, x)
    np.testing.assert_allclose(codes.dense(dictionary.m), wanted, rtol=1e-4, atol=1e-4)
    assert codes.indices.dtype == jnp.int32
    assert codes.indices.shape == codes.values.shape == (len(x), dictionary.k)
    assert (codes.l0 == (wanted > 0).sum(1)).all()
    assert (np.diff(codes.values, axis=1) <= 0).all()
    assert (np.asarray(codes.indices)[np.asarray(codes.values) == 0] == 0).all()
    x_hat = coder.decode(dictionary, codes)
    assert x_hat.shape == (len(x), dictionary.d_out)
    np.testing.assert_allclose(x_hat, slow.decode(dictionary, wanted), rtol=1e-4, atol=1e-3)


def test_thresholds_and_slots_both_cut():
    """The cases above are worth their name: each of the two decides in some row."""
    x = rows()
    for kind in ("batchtopk", "matryoshka", "jumprelu"):
        dictionary = linear(kind)
        plain = slow.encode(linear("relu", k=M), x)
        above = plain > dictionary.threshold
        l0 = np.asarray(coder.encode(dictionary, x).l0)
        assert (above.sum(1) < (plain > 0).sum(1)).all()
        np.testing.assert_array_equal(l0, np.minimum(above.sum(1), K))
        assert (l0 == K).any()
    assert (np.asarray(coder.encode(linear("matryoshka"), x).l0) < K).any()


def test_a_pre_activation_at_its_threshold_is_not_active():
    one = np.ones((2, 1), np.float32)
    bias, at = np.zeros(1, np.float32), np.array([0.5, 2.0], np.float32)
    zeros = np.zeros(2, np.float32)
    dictionary = Dictionary("jumprelu", 2, one, bias, one, zeros, threshold=at, typical=zeros)
    x = np.array([[-3], [0.5], [0.75], [2], [2.25]], np.float32)
    dense = coder.encode(dictionary, x).dense(2)
    wanted = [[0, 0], [0, 0], [0.75, 0], [2, 0], [2.25, 2.25]]
    np.testing.assert_array_equal(dense, np.asarray(wanted, np.float32))


@pytest.mark.parametrize("dictionary", small.values(), ids=small)
def test_decoding_adds_raw_atoms_to_a_constant(dictionary):
    codes = coder.encode(dictionary, rows())
    nothing = Codes(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1)))
    constant = coder.decode(dictionary, nothing)
    expected = np.asarray(codes.dense(M)) @ dictionary.raw_atoms + constant
    np.testing.assert_allclose(coder.decode(dictionary, codes), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["topk", "jumprelu", "jumprelu transcoder", "itda", "itda whitened", "itda transcoder"],
)
def test_chunks_jit_and_the_disk_change_nothing(name, tmp_path):
    dictionary = KINDS[name]
    x = rows(n=4000)
    codes = coder.encode(dictionary, x)
    save_dictionary(dictionary, tmp_path / "dictionary")
    loaded = load_dictionary(tmp_path / "dictionary")
    for other in (
        coder.encode(dictionary, x, memory_mb=1),
        jax.jit(lambda x: coder.encode(loaded, x))(x),
    ):
        np.testing.assert_allclose(other.dense(M), codes.dense(M), rtol=1e-4, atol=1e-4)


@every
def test_bad_rows_and_codes_are_named(dictionary):
    with pytest.raises(ValueError, match=r"rows \[n, 12\].*got \[3, 5\]"):
        coder.encode(dictionary, np.zeros((3, 5)))
    with pytest.raises(ValueError, match=r"got \[2, 3\] and \[2, 2\]"):
        coder.decode(dictionary, Codes(jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 2))))


def test_arrays_are_moved_once():
    dictionary = itda(False)
    x = rows()
    coder.encode(dictionary, x)
    first = coder._prepared[dictionary]
    with jax.no_tracing():
        coder.encode(dictionary, x + 1)
    assert coder._prepared[dictionary] is first
