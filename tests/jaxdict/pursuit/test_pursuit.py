"""Gradient pursuit against a slow reference, SciPy, scikit-learn, and its own promises."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls
from sklearn.linear_model import orthogonal_mp

from jaxdict.codes.codes import decode
from jaxdict.codes.topk import argmax
from jaxdict.pursuit import STATUS, Status, choose_method, gradient_pursuit, prepare_atoms
from tests.reference import pursuit as reference

METHODS = ("residual", "gram")
both = pytest.mark.parametrize("method", METHODS)


def pursue(*args, **options):
    """gradient_pursuit, its result as NumPy arrays: reading single numbers is then quick."""
    return jax.device_get(gradient_pursuit(*args, **options))


def problem(n=12, d=20, m=48, seed=0, mix=0.6):
    """Rows and unit atoms; `mix` of a shared direction makes the atoms coherent."""
    rng = np.random.default_rng(seed)
    atoms = rng.normal(size=(m, d)) + mix * rng.normal(size=d)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    return rng.normal(size=(n, d)), atoms


def unsorted(weights):
    """A dense row as {atom: value}."""
    return {int(i): weights[i] for i in np.flatnonzero(weights)}


def codes_of(result, row):
    """A row's codes as {atom: value}."""
    pairs = zip(result.indices[row], result.values[row], strict=True)
    return {int(i): float(v) for i, v in pairs if v != 0}


@both
@pytest.mark.parametrize("k,signed", [(5, False), (30, False), (12, True)])
def test_same_support_and_values_as_the_slow_reference(method, signed, k):
    with jax.enable_x64(True):
        for seed, mix in ((0, 0.0), (1, 0.6), (2, 3.0)):
            x, atoms = problem(seed=seed, mix=mix)
            result = pursue(x, atoms, k, method=method, signed=signed)
            assert result.values.dtype == jnp.float64
            for row in range(len(x)):
                weights, norms = reference.gradient_pursuit(x[row], atoms, k, signed)
                expected, got = unsorted(weights), codes_of(result, row)
                assert got.keys() == expected.keys()
                np.testing.assert_allclose(
                    [got[i] for i in expected], list(expected.values()), rtol=1e-5, atol=1e-8
                )
                np.testing.assert_allclose(result.residual_norm[row], norms[-1], rtol=1e-9)
                assert result.steps[row] <= len(norms) - 1


def test_the_papers_equations_without_guards_give_the_same_where_they_are_monotone():
    with jax.enable_x64(True):
        x, atoms = problem(n=40, d=64, m=128, mix=0.0)
        result = pursue(x, atoms, 12, method="residual")
        equal = 0
        for row in range(len(x)):
            weights = reference.papers_step(x[row], atoms, 12)
            _, norms = reference.gradient_pursuit(x[row], atoms, 12)
            equal += unsorted(weights).keys() == codes_of(result, row).keys()
            error = np.linalg.norm(x[row] - weights @ atoms)
            assert result.residual_norm[row] <= error * (1 + 1e-9)
            assert (np.diff(norms) <= 1e-12).all()
        assert equal == len(x)


@both
def test_the_residual_never_grows_with_k_and_is_what_the_codes_say(method):
    x, atoms = (a.astype(np.float32) for a in problem(mix=2.0))
    before = np.linalg.norm(x, axis=1)
    for k in (5, 18):
        result = pursue(x, atoms, k, method=method)
        assert (result.residual_norm <= before * (1 + 1e-6)).all()
        before = np.asarray(result.residual_norm)
        rebuilt = np.asarray(decode(result.codes, atoms))
        np.testing.assert_allclose(before, np.linalg.norm(x - rebuilt, axis=1), rtol=1e-4)


def test_both_forms_give_the_same_error_in_float32():
    x, atoms = (a.astype(np.float32) for a in problem(n=30, d=64, m=128))
    one, two = (pursue(x, atoms, 10, method=method) for method in METHODS)
    np.testing.assert_allclose(one.residual_norm, two.residual_norm, rtol=1e-4)
    assert (np.asarray(one.indices) == np.asarray(two.indices)).mean() > 0.99


@both
def test_error_is_never_below_nnls_on_the_support_and_comes_close(method):
    x, atoms = problem(n=30, d=64, m=128, mix=0.0)
    result = pursue(x.astype(np.float32), atoms.astype(np.float32), 10, method=method)
    ratios = []
    for row in range(len(x)):
        support = sorted(codes_of(result, row))
        _, best = nnls(atoms[support].T, x[row])
        ratios.append(float(result.residual_norm[row]) / best)
    assert min(ratios) >= 1 - 1e-5
    assert max(ratios) <= 1.05
    assert np.median(ratios) <= 1.01


@both
def test_on_an_orthonormal_dictionary_it_is_orthogonal_matching_pursuit(method):
    rng = np.random.default_rng(5)
    atoms = np.linalg.qr(rng.normal(size=(24, 24)))[0].astype(np.float32)
    x = rng.normal(size=(9, 24)).astype(np.float32)
    result = pursue(x, atoms, 6, method=method, signed=True)
    expected = orthogonal_mp(atoms.T, x.T, n_nonzero_coefs=6).T
    np.testing.assert_allclose(result.codes.dense(24), expected, atol=1e-5)
    # Non-negative: the six largest positive inner products, unchanged.
    top = np.sort(np.maximum(x @ atoms.T, 0), axis=1)[:, ::-1][:, :6]
    values = pursue(x, atoms, 6).values
    np.testing.assert_allclose(values, top, atol=1e-5)


@both
def test_a_planted_support_is_found(method):
    rng = np.random.default_rng(2)
    atoms = rng.normal(size=(128, 64))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    support = np.stack([rng.permutation(128)[:3] for _ in range(30)])
    x = np.einsum("nk,nkd->nd", rng.uniform(1, 2, size=(30, 3)), atoms[support])
    result = pursue(x.astype(np.float32), atoms.astype(np.float32), 10, method=method)
    found = [set(map(int, s)) <= set(codes_of(result, i)) for i, s in enumerate(support)]
    assert np.mean(found) >= 0.96
    assert np.median(result.residual_norm / np.linalg.norm(x, axis=1)) < 0.02


@both
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_promises_hold_for_any_shape_and_scale(method, data):
    n = 3
    d, m, k = data.draw(st.sampled_from([(9, 4, 12), (1, 17, 5)]))
    signed = data.draw(st.booleans()) if m == 17 else False
    seed = data.draw(st.integers(0, 2**16))
    exponents = data.draw(st.tuples(*[st.integers(-15, 15)] * 2))
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, d)) * 10.0 ** exponents[0]).astype(np.float32)
    atoms = (rng.normal(size=(m, d)) * 10.0 ** exponents[1]).astype(np.float32)
    x[rng.random(n) < 0.2] = 0
    atoms[rng.random(m) < 0.2] = 0
    atoms[-1] = atoms[0]
    result = pursue(x, atoms, k, method=method, signed=signed)
    indices, values = np.asarray(result.indices), np.asarray(result.values)
    assert indices.shape == values.shape == (n, k)
    assert indices.dtype == np.int32
    assert np.isfinite(values).all()
    assert ((indices >= 0) & (indices < m)).all()
    assert (indices[values == 0] == 0).all()
    assert signed or (values >= 0).all()
    assert (np.diff(np.abs(values), axis=1) <= 0).all()
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    assert (result.residual_norm <= norms * (1 + 1e-5)).all()
    for row in range(n):
        used = indices[row][values[row] != 0]
        assert len(set(used)) == len(used) <= min(k, m)
        assert (np.abs(atoms[used]).max(axis=1, initial=0) > 0).all()
        left = np.linalg.norm(x[row] - values[row].astype(np.float64) @ atoms[indices[row]])
        assert abs(left - result.residual_norm[row]) <= 1e-4 * norms[row]


@both
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scale_of_rows_and_atoms_only_scales_the_values(method, scale):
    x, atoms = (a.astype(np.float32) for a in problem())
    plain = pursue(x, atoms, 5, method=method)
    rows = pursue(x * np.float32(scale), atoms, 5, method=method)
    np.testing.assert_array_equal(rows.indices, plain.indices)
    np.testing.assert_allclose(rows.values / np.float32(scale), plain.values, rtol=1e-3)
    shrink = np.float32(scale ** (1 / 2))
    long = pursue(x, atoms * shrink, 5, method=method)
    np.testing.assert_allclose(long.values * shrink, plain.values, rtol=1e-3)


@both
def test_each_way_to_stop_is_reported(method):
    x, atoms = (a.astype(np.float32) for a in problem(n=12, mix=0.0))
    x[1] = 0
    x[2, 3] = np.nan
    x[3, 0] = np.inf
    x[4] = 7 * atoms[5]
    result = pursue(x, atoms, 5, method=method)
    expected = [Status.FULL, Status.ZERO_ROW, *[Status.NOT_FINITE] * 2, Status.STATIONARY, 0]
    assert result.status.tolist()[:6] == expected
    assert result.steps.tolist()[:6] == [5, 0, 0, 0, 1, 5]
    assert codes_of(result, 4) == {5: pytest.approx(7, rel=1e-6)}
    assert np.isnan(result.residual_norm[jnp.array([2, 3])]).all()
    assert not np.asarray(result.values[1:4]).any()
    assert set(STATUS) == set(Status)

    loose = pursue(x, atoms, 5, method=method, tol=0.6)
    stopped = [row for row in range(6, 12) if loose.status[row] == Status.TOL]
    assert len(stopped) > 2
    for row in stopped:
        _, norms = reference.gradient_pursuit(x[row].astype(float), atoms.astype(float), 5)
        assert loose.steps[row] == np.argmax(norms <= 0.6 * norms[0])
        np.testing.assert_allclose(loose.residual_norm[row], norms[loose.steps[row]], rtol=1e-4)


@both
def test_rows_no_atom_points_along_stay_empty(method):
    atoms = np.eye(3, dtype=np.float32)
    result = pursue(-np.ones((1, 3), np.float32), atoms, 2, method=method)
    assert not np.asarray(result.values).any()
    assert result.status.tolist() == [Status.STATIONARY]
    signed = pursue(-np.ones((1, 3), np.float32), atoms, 3, signed=True)
    assert signed.values[0].tolist() == pytest.approx([-1, -1, -1])


@both
def test_duplicate_atoms_share_and_zero_atoms_stay_out(method):
    atom = np.array([0.6, 0.8, 0], np.float32)
    atoms = np.stack([np.zeros(3, np.float32), atom, atom, atom])
    result = pursue(np.array([[3.0, 4.0, 1.0]], np.float32), atoms, 4, method=method)
    assert 0 not in codes_of(result, 0)
    assert sum(codes_of(result, 0).values()) == pytest.approx(5, rel=1e-5)
    assert result.residual_norm[0] == pytest.approx(1, rel=1e-5)


def test_chunks_do_not_change_the_answer():
    x, atoms = (a.astype(np.float32) for a in problem(n=53, d=40, m=4000))
    whole = pursue(x, atoms, 6)
    parts = pursue(x, atoms, 6, memory_mb=1)
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(parts.status, whole.status)


@both
def test_memory_stays_below_slots_times_width(method):
    from jaxdict.pursuit.solve import _solve, _Static

    n, d, m, k = 64, 256, 1024, 32
    atoms = prepare_atoms(np.ones((m, d), np.float32), gram=method == "gram")
    static = _Static(k, "gradient", method, signed=False, chunk=n, mesh=None)
    memory = _solve.lower(jnp.ones((n, d)), atoms, 0.0, static).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * k * d * 4


def test_jit_equals_eager_and_a_second_call_does_not_compile():
    method = "residual"
    x, atoms = (a.astype(np.float32) for a in problem())
    first = pursue(x, atoms, 5, method=method)
    inside = jax.jit(lambda x, atoms: gradient_pursuit(x, atoms, 5, method=method))(x, atoms)
    np.testing.assert_array_equal(first.indices, inside.indices)
    np.testing.assert_allclose(first.values, inside.values, rtol=1e-5)
    with jax.no_tracing():
        pursue(x + 1, atoms, 5, method=method)


def test_bfloat16_rows_are_computed_in_float32():
    x, atoms = (a.astype(np.float32) for a in problem())
    low = jnp.asarray(x).astype(jnp.bfloat16)
    result = pursue(low, atoms, 5)
    assert result.values.dtype == jnp.float32
    expected = pursue(low.astype(jnp.float32), atoms, 5)
    np.testing.assert_array_equal(result.values, expected.values)


def test_prepared_atoms_give_the_same_and_auto_uses_their_gram():
    x, atoms = (a.astype(np.float32) for a in problem())
    for gram, method in ((True, "gram"), (False, "residual")):
        prepared = prepare_atoms(3 * atoms, gram=gram)
        auto = pursue(x, prepared, 5)
        plain = pursue(x, 3 * atoms, 5, method=method)
        np.testing.assert_array_equal(auto.values, plain.values)
    with pytest.raises(ValueError, match="gram=True"):
        pursue(x, prepare_atoms(atoms), 5, method="gram")


def test_auto_weighs_the_gram_matrix_against_the_rows():
    many, few = choose_method(100_000, 3072, 8192, 32), choose_method(16, 3072, 8192, 32)
    assert (many, few) == ("gram", "residual")
    # 16 GiB of Gram matrix: too much for 64 GiB, not for four devices of 64 GiB or one of 256.
    for memory, parts, method in ((64, 1, "residual"), (64, 4, "gram"), (256, 1, "gram")):
        sizes = {"memory": memory << 30, "parts": parts}
        assert choose_method(100_000, 3072, 65_536, 32, **sizes) == method
    # One Gram row a step instead of k / 2; on a GPU reading is dearer beside arithmetic.
    assert choose_method(100_000, 300, 2048, 64, platform="cpu") == "residual"
    assert choose_method(100_000, 300, 2048, 64, platform="cpu", reads=3) == "gram"
    assert choose_method(100_000, 600, 8192, 32, platform="cpu") == "gram"
    assert choose_method(100_000, 600, 8192, 32, platform="gpu") == "residual"
    assert choose_method(100_000, 3072, 8192, 32, tol=1e-5) == "residual"


def test_the_two_level_argmax_is_argmax():
    rng = np.random.default_rng(0)
    for m in (1, 127, 128, 129, 1000):
        scores = rng.integers(0, 5, size=(30, m)).astype(np.float32) - 2
        np.testing.assert_array_equal(jax.vmap(argmax)(scores), scores.argmax(1))


X, ATOMS = np.ones((2, 3), np.float32), np.eye(3, dtype=np.float32)
BAD = np.array([[1, 0, 0], [np.nan, 0, 0]], np.float32)


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: pursue(X, ATOMS, 0), ValueError, "k: expected at least 1 atom a row"),
        (lambda: pursue(X, ATOMS, 2.5), TypeError, "k: expected a whole number"),
        (lambda: pursue(X[0], ATOMS, 1), ValueError, r"got \[3\] and \[3, 3\]"),
        (lambda: pursue(X, ATOMS[:, :2], 1), ValueError, r"\[2, 3\] and \[3, 2\]"),
        (lambda: pursue(X, BAD, 1), ValueError, "in 1 of 2 atoms, the first at 1"),
        (lambda: pursue(X, ATOMS, 1, tol=1.0), ValueError, r"in \[0, 1\), got 1.0"),
        (lambda: pursue(X, ATOMS, 1, method="omp"), ValueError, "got 'omp'"),
        (lambda: pursue(X, ATOMS, 1, memory_mb=0), ValueError, "memory_mb"),
        (lambda: pursue(X * 1j, ATOMS, 1), TypeError, "x: expected real numbers"),
        (lambda: prepare_atoms(np.ones((0, 3))), ValueError, r"got \[0, 3\]"),
        (lambda: prepare_atoms(ATOMS * 1j), TypeError, "atoms: expected real numbers"),
    ],
)
def test_bad_input_says_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_no_rows_is_no_error():
    result = pursue(np.zeros((0, 3), np.float32), ATOMS, 2)
    assert result.indices.shape == (0, 2)
