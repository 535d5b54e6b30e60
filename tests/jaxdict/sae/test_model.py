"""The TopK autoencoder against slow NumPy and against dense automatic differentiation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.codes.kernels import inner_products, scatter_rows
from jaxdict.codes.topk import _TWO_STAGES_FROM, top_k
from jaxdict.sae import losses, model
from jaxdict.sae.module import SAE
from tests.jaxdict.random_sae import D, K, M, N, params_and_rows
from tests.reference import sae as reference


def as_numpy(params):
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]


def dense_codes(params, x, k, allowed=None):
    pre = jax.nn.relu((x - params.bias) @ params.encoder.T + params.encoder_bias)
    pre = pre if allowed is None else jnp.where(allowed, pre, 0)
    threshold = jax.lax.top_k(pre, k)[0][:, -1:]
    return jnp.where(pre >= threshold, pre, 0)


def test_forward_is_the_slow_reference():
    params, x = params_and_rows()
    encoder, encoder_bias, atoms, bias = as_numpy(params)
    wanted = reference.encode(encoder, encoder_bias, bias, np.asarray(x, np.float64), K)
    codes, aux = model.encode(params, x, K)
    assert aux is None
    np.testing.assert_allclose(codes.dense(M), wanted, atol=1e-5)
    x_hat = model.decode(codes, params.atoms, params.bias)
    np.testing.assert_allclose(x_hat, reference.decode(wanted, atoms, bias), atol=1e-5)


def test_module_gives_the_same_rows_and_sorted_codes():
    params, x = params_and_rows()
    params = params._replace(encoder_bias=params.encoder_bias - 5)
    module = SAE.from_params(params, K, kind="topk")
    codes = module.encode(x)
    assert (np.asarray(codes.values) == 0).any(), "the case needs empty slots"
    assert (np.asarray(codes.indices)[np.asarray(codes.values) == 0] == 0).all()
    assert (np.diff(np.asarray(codes.values), axis=1) <= 0).all()
    encoder, encoder_bias, atoms, bias = as_numpy(params)
    dense = reference.encode(encoder, encoder_bias, bias, np.asarray(x, np.float64), K)
    np.testing.assert_allclose(module(x), reference.decode(dense, atoms, bias), atol=1e-5)


def test_gradient_is_the_slow_reference():
    params, x = params_and_rows()

    def loss(p):
        codes, _ = model.encode(p, x, K)
        x_hat = model.decode(codes, p.atoms, p.bias)
        return losses.reconstruction_loss(x, x_hat, variance=7.0)

    value, gradient = jax.value_and_grad(loss)(params)
    slow, slopes = reference.gradient(*as_numpy(params), np.asarray(x, np.float64), K, 7.0)
    assert float(value) == pytest.approx(slow, rel=1e-5)
    for name, got, wanted in zip(params._fields[:4], gradient[:4], slopes, strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5, err_msg=name)


def test_gradient_with_auxk_and_towards_rows_is_dense_autodiff():
    params, x = params_and_rows(1)
    dead = jnp.arange(M) % 3 == 0

    def sparse(p, x):
        codes, aux = model.encode(p, x, K, dead=dead, k_aux=6)
        x_hat = model.decode(codes, p.atoms, p.bias)
        return jnp.sum(jnp.sin(x_hat)) + losses.auxk_loss(
            x - x_hat, model.decode(aux, p.atoms, None)
        )

    def dense(p, x):
        x_hat = dense_codes(p, x, K) @ p.atoms + p.bias
        residual_hat = dense_codes(p, x, 6, dead) @ p.atoms
        return jnp.sum(jnp.sin(x_hat)) + losses.auxk_loss(x - x_hat, residual_hat)

    for got, wanted in zip(
        jax.tree.leaves(jax.grad(sparse, (0, 1))(params, x)),
        jax.tree.leaves(jax.grad(dense, (0, 1))(params, x)),
        strict=True,
    ):
        np.testing.assert_allclose(got, wanted, atol=3e-5)


def test_both_forms_of_sums_over_slots_agree(monkeypatch):
    rng = np.random.default_rng(0)
    indices = jnp.asarray(np.stack([rng.permutation(M)[:K] for _ in range(N)]).astype(np.int32))
    weights = jnp.asarray(rng.normal(size=(N, K)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    table = rng.normal(size=(M, D)).astype(np.float32)
    wanted = np.zeros((M, D))
    for i in range(N):
        for j in range(K):
            wanted[indices[i, j]] += float(weights[i, j]) * np.asarray(rows[i])
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        np.testing.assert_allclose(
            scatter_rows(indices, weights, rows, M), wanted, atol=1e-5, err_msg=backend
        )
        np.testing.assert_allclose(
            inner_products(indices, rows, jnp.asarray(table)),
            np.einsum("nkd,nd->nk", table[indices], np.asarray(rows)),
            atol=1e-5,
            err_msg=backend,
        )


@pytest.mark.parametrize("kind", ["normal", "ties", "mostly zero"])
@pytest.mark.parametrize("k", [1, 5, 32])
def test_two_stage_top_k_is_lax_top_k_ties_included(kind, k):
    rng = np.random.default_rng(k)
    x = rng.normal(size=(8, _TWO_STAGES_FROM)).astype(np.float32)
    if kind == "ties":
        x = np.round(x * 2) / 2
    if kind == "mostly zero":
        x = np.maximum(x - 3, 0)
    values, indices = top_k(jnp.asarray(x), k)
    wanted_values, wanted_indices = jax.lax.top_k(jnp.asarray(x), k)
    np.testing.assert_array_equal(values, wanted_values)
    np.testing.assert_array_equal(indices, wanted_indices)
    text = str(jax.make_jaxpr(lambda x: top_k(x, k))(x))
    assert text.count("top_k[") == 2, "this shape should go in two stages"


def test_no_n_k_d_and_no_dense_gradient_tensor():
    n, d, m, k = 32, 48, 160, 8
    params, x = params_and_rows(0, m, d, n)

    def loss(p):
        codes, _ = model.encode(p, x, k)
        return jnp.sum(jnp.square(x - model.decode(codes, p.atoms, p.bias)))

    def shapes(jaxpr):
        for equation in jaxpr.eqns:
            for value in equation.outvars:
                yield equation.primitive.name, tuple(value.aval.shape)
            for value in jax.tree.leaves(list(equation.params.values())):
                inner = getattr(value, "jaxpr", value)  # closed or open, by the version of JAX
                if hasattr(inner, "eqns"):
                    yield from shapes(inner)

    found = list(shapes(jax.make_jaxpr(jax.grad(loss))(params).jaxpr))
    assert max(np.prod(shape) for _, shape in found) <= max(n * m, m * d)
    dense = [shape for name, shape in found if name == "dot_general" and shape == (n, m)]
    assert len(dense) == 1, "only the encoder's product is [n, m]"
    assert not [s for name, s in found if name == "dot_general" and s in ((m, d), (n, d))]


def test_atoms_keep_unit_norm_and_gradients_lose_the_parallel_part():
    params, _ = params_and_rows()
    zero = params._replace(atoms=params.atoms.at[3].set(0).at[4].multiply(9))
    norms = jnp.linalg.norm(model.unit_norm(zero).atoms, axis=1)
    np.testing.assert_allclose(norms, np.where(np.arange(M) == 3, 0, 1), atol=1e-6)
    gradient = params._replace(atoms=jnp.ones((M, D)))
    left = model.remove_parallel(gradient, params).atoms
    np.testing.assert_allclose(jnp.sum(left * params.atoms, axis=1), 0, atol=1e-5)
    slope = jnp.sum(jnp.ones((M, D)) * params.atoms, axis=1, keepdims=True)
    np.testing.assert_allclose(left + slope * params.atoms, 1, atol=1e-5)


def test_initial_params_start_as_transposes_at_the_mean():
    params = model.initial_params(jax.random.key(0), M, mean=jnp.arange(D, dtype=jnp.float32))
    np.testing.assert_array_equal(params.encoder, params.atoms)
    assert params.encoder.unsafe_buffer_pointer() != params.atoms.unsafe_buffer_pointer()
    np.testing.assert_array_equal(params.bias, np.arange(D))
