"""Encode and decode of an exported dictionary, one list of properties for all kinds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict import coder
from jaxdict.codes import Codes
from jaxdict.export import Dictionary, load_dictionary, save_dictionary
from tests.reference.pursuit import gradient_pursuit as slow_pursuit

D, M, K = 12, 40, 5


def topk() -> Dictionary:
    rng = np.random.default_rng(0)
    atoms, encoder = rng.normal(size=(2, M, D)).astype(np.float32)
    bias, encoder_bias = rng.normal(size=D), rng.normal(size=M)
    typical = np.ones(M, np.float32)
    biases = bias.astype(np.float32), encoder, encoder_bias.astype(np.float32)
    return Dictionary("topk", K, atoms, *biases, typical=typical)


def itda(square: bool) -> Dictionary:
    rng = np.random.default_rng(1)
    atoms = rng.normal(size=(M, D))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    inverse = rng.normal(size=(D, D)) if square else np.exp(rng.normal(size=D))
    transform = np.linalg.inv(inverse) if square else 1 / inverse
    space = rng.normal(size=D), transform, inverse
    mean, transform, inverse = (a.astype(np.float32) for a in space)
    return Dictionary(
        "itda",
        K,
        atoms.astype(np.float32),
        mean=mean,
        transform=transform,
        inverse=inverse,
        typical=np.ones(M, np.float32),
    )


KINDS = {"topk": topk(), "itda": itda(False), "itda whitened": itda(True)}
every = pytest.mark.parametrize("dictionary", KINDS.values(), ids=KINDS)


def rows(n=9, seed=7):
    return np.random.default_rng(seed).normal(size=(n, D)).astype(np.float32) * 3


def slow_encode(dictionary: Dictionary, x: np.ndarray) -> np.ndarray:
    """Dense codes [n, m] from the formulas, one row at a time, float64."""
    out = np.zeros((len(x), M))
    for row, raw in enumerate(x.astype(np.float64)):
        if dictionary.kind == "topk":
            pre = np.maximum(dictionary.encoder @ raw + dictionary.encoder_bias, 0)
            kept = np.argsort(-pre)[:K]
            out[row, kept] = pre[kept]
        else:
            z = raw - dictionary.mean
            t = dictionary.transform.astype(np.float64)
            out[row], _ = slow_pursuit(z * t if t.ndim == 1 else z @ t, dictionary.atoms, K)
    return out


@every
def test_codes_are_what_the_formulas_say(dictionary):
    x = rows()
    codes = coder.encode(dictionary, x)
    np.testing.assert_allclose(codes.dense(M), slow_encode(dictionary, x), rtol=1e-4, atol=1e-4)
    assert codes.indices.dtype == jnp.int32
    assert (codes.l0 <= K).all()
    assert (np.diff(codes.values, axis=1) <= 0).all()
    assert (np.asarray(codes.indices)[np.asarray(codes.values) == 0] == 0).all()


@every
def test_decoding_adds_raw_atoms_to_a_constant(dictionary):
    codes = coder.encode(dictionary, rows())
    nothing = Codes(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1)))
    constant = coder.decode(dictionary, nothing)
    expected = np.asarray(codes.dense(M)) @ dictionary.raw_atoms + constant
    np.testing.assert_allclose(coder.decode(dictionary, codes), expected, rtol=1e-4, atol=1e-4)


@every
def test_chunks_jit_and_the_disk_change_nothing(dictionary, tmp_path):
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
