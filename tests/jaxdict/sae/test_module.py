"""The Flax module: made, trained by hand, saved, and the same autoencoder as the functions and the dictionary."""

from __future__ import annotations

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jaxdict
from jaxdict import SAE
from jaxdict.dictionary.arrays import ENCODER_KINDS, Dictionary
from jaxdict.rows.normalization import Normalizer, denormalize, normalize
from jaxdict.sae import kinds
from tests.jaxdict.random_sae import D, K, M, N, params_and_rows


def batches(count, n=256, d=64):
    rng = np.random.default_rng(0)
    true = rng.normal(size=(80, d)) / np.sqrt(d)
    codes = rng.exponential(size=(count, n, 80)) * (rng.random((count, n, 80)) < 0.05)
    return jnp.asarray(codes @ true, jnp.float32)


def dictionary_of(kind, *, d_out=D, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    form = ENCODER_KINDS[kind].threshold
    threshold = {"none": None, "one": np.full(M, 0.4, "f4"), "each": np.abs(normal(M))}[form]
    return Dictionary(
        kind,
        K,
        normal(M, d_out),
        bias=normal(d_out),
        encoder=normal(M, D),
        encoder_bias=normal(M) - 5,
        threshold=threshold,
        typical=np.zeros(M, np.float32),
        card={} if d_out == D else {"target": "another"},
    )


def test_the_docstrings_example_trains():
    lines = (SAE.__doc__ or "").splitlines()
    first = next(i for i, line in enumerate(lines) if "sae = SAE(" in line)
    last = next(i for i, line in enumerate(lines) if "losses = [" in line)
    example = textwrap.dedent("\n".join(lines[first : last + 1]))
    names = {"SAE": SAE, "nnx": nnx, "optax": optax, "jnp": jnp, "batches": batches(60)}
    exec(example, names)
    losses, sae = names["losses"], names["sae"]
    assert np.mean(losses[-5:]) < 0.3 * np.mean(losses[:5])
    np.testing.assert_allclose(jnp.linalg.norm(sae.atoms[...], axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_its_codes_are_those_of_the_functions(kind):
    params, x = params_and_rows()
    if ENCODER_KINDS[kind].threshold != "none":
        params = params._replace(threshold=jnp.full(M, 0.3))
    sae = SAE.from_params(params, K, kind=kind)
    codes, wanted = sae.encode(x), kinds.encode(params, x, K)
    for one, other in zip(codes, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(sae.decode(codes), kinds.decode(params, wanted))
    np.testing.assert_allclose(jax.jit(lambda sae, x: sae(x))(sae, x), sae(x), atol=1e-5)


@pytest.mark.parametrize("kind", ENCODER_KINDS)
@pytest.mark.parametrize("d_out", [D, 7])
def test_it_is_the_dictionary_that_it_was_made_from(kind, d_out):
    dictionary = dictionary_of(kind, d_out=d_out)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(N, D)), jnp.float32)
    sae = SAE.from_dictionary(dictionary)
    codes, wanted = sae.encode(x), jaxdict.encode(dictionary, x)
    assert (np.asarray(wanted.values) == 0).any(), "the case needs empty slots"
    np.testing.assert_array_equal(codes.indices, wanted.indices)
    np.testing.assert_allclose(codes.values, wanted.values, atol=1e-5)
    np.testing.assert_allclose(sae(x), jaxdict.decode(dictionary, wanted), atol=1e-5)


def test_a_normalizer_makes_it_act_on_raw_rows_and_is_not_trained():
    params, z = params_and_rows()
    scale = jnp.arange(1, D + 1, dtype=jnp.float32)
    normalizer = Normalizer(jnp.ones(D), 1 / scale, scale)
    sae = SAE.from_params(params, K, kind="topk", normalizer=normalizer)
    x = denormalize(normalizer, z)
    wanted = kinds.encode(params, normalize(normalizer, x), K)
    np.testing.assert_array_equal(sae.encode(x).indices, wanted.indices)
    np.testing.assert_array_equal(
        sae(x), denormalize(normalizer, kinds.decode(params, sae.encode(x)))
    )
    grads = nnx.grad(lambda sae: jnp.mean((sae(x) - x) ** 2))(sae)
    assert set(nnx.to_pure_dict(grads)) == {"encoder", "encoder_bias", "atoms", "bias"}
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_a_transcoder_rebuilds_rows_of_another_width():
    sae = SAE(d=D, m=M, k=K, kind="batchtopk", d_out=7, rngs=nnx.Rngs(0))
    _, x = params_and_rows()
    assert sae(x).shape == (N, 7)


def test_orbax_brings_its_state_back_to_the_bit(tmp_path):
    sae = SAE(d=D, m=M, k=K, kind="jumprelu", rngs=nnx.Rngs(1))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(sae))
        checkpointer.wait_until_finished()
        other = SAE(d=D, m=M, k=K, kind="jumprelu", rngs=nnx.Rngs(2))
        assert not np.array_equal(other.atoms[...], sae.atoms[...])
        nnx.update(other, checkpointer.restore(tmp_path / "state", nnx.state(other)))
    for one, restored in zip(sae.params, other.params, strict=True):
        assert (one is None) == (restored is None)
        assert one is None or np.asarray(one).tobytes() == np.asarray(restored).tobytes()
    _, x = params_and_rows()
    graph, state = nnx.split(other)
    np.testing.assert_array_equal(nnx.merge(graph, state)(x), sae(x))


def test_bad_input_says_what_was_expected():
    params, _ = params_and_rows()
    itda = Dictionary(
        "itda", 2, np.eye(3, dtype=np.float32), typical=np.zeros(3, np.float32), card={}
    )
    for message, make in (
        ("kind: expected one of topk, .*got 'top'", lambda: SAE(d=3, m=4, k=2, kind="top", rngs=nnx.Rngs(0))),
        ("k: expected a number from 1 to the 4 atoms, got 5", lambda: SAE(d=3, m=4, k=5, rngs=nnx.Rngs(0))),
        ("threshold: expected one for kind jumprelu, got none", lambda: SAE.from_params(params, K, kind="jumprelu")),
        ("expected a dictionary of a kind with an encoder .*got itda; use jaxdict.encode", lambda: SAE.from_dictionary(itda)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            make()
