"""Matching and orthogonal matching pursuit: slow references, scikit-learn, SciPy, and the promises all keep."""

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
from jaxdict.pursuit import (
    Status,
    gradient_pursuit,
    matching_pursuit,
    orthogonal_matching_pursuit,
    prepare_atoms,
)
from tests.jaxdict.pursuit.test_pursuit import codes_of, problem, unsorted
from tests.reference import pursuit as reference

PURSUITS = {
    "gradient": gradient_pursuit,
    "matching": matching_pursuit,
    "orthogonal": orthogonal_matching_pursuit,
}
REFERENCES = {
    "matching": reference.matching_pursuit,
    "orthogonal": reference.orthogonal_matching_pursuit,
}
both = pytest.mark.parametrize("method", ["residual", "gram"])
each = pytest.mark.parametrize("name", REFERENCES)


def pursue(name, *args, **options):
    """Any pursuit by name, its result as NumPy arrays."""
    return jax.device_get(PURSUITS[name](*args, **options))


@both
@each
@pytest.mark.parametrize("signed", [False, True])
def test_same_support_and_values_as_the_slow_reference(name, method, signed):
    with jax.enable_x64(True):
        left = 0
        for seed, mix in ((0, 0.0), (1, 0.6), (2, 3.0)):
            x, atoms = problem(seed=seed, mix=mix)
            result = pursue(name, x, atoms, 14, method=method, signed=signed)
            for row in range(len(x)):
                weights, norms = REFERENCES[name](x[row], atoms, 14, signed)
                expected, got = unsorted(weights), codes_of(result, row)
                assert got.keys() == expected.keys()
                np.testing.assert_allclose(
                    [got[i] for i in expected], list(expected.values()), rtol=1e-5, atol=1e-8
                )
                np.testing.assert_allclose(result.residual_norm[row], norms[-1], rtol=1e-9)
                assert (np.diff(norms) <= 1e-12).all()
                left += len(norms) - 1 - len(expected)
        # The non-negative least squares must have turned atoms out, or this shows nothing of it.
        assert left > 0 or signed


def test_signed_orthogonal_matching_pursuit_is_scikit_learns():
    x, atoms = (a.astype(np.float32) for a in problem(n=30, d=64, m=128, mix=0.3))
    result = pursue("orthogonal", x, atoms, 10, signed=True)
    expected = orthogonal_mp(atoms.astype(float).T, x.astype(float).T, n_nonzero_coefs=10).T
    np.testing.assert_allclose(result.codes.dense(128), expected, atol=2e-4)


@both
def test_the_non_negative_form_is_nnls_on_the_support_that_is_left(method):
    x, atoms = problem(n=30, d=64, m=128, mix=2.0)
    result = pursue("orthogonal", x.astype(np.float32), atoms.astype(np.float32), 12, method=method)
    others = [
        pursue(name, x.astype(np.float32), atoms.astype(np.float32), 12, method=method)
        for name in ("gradient", "matching")
    ]
    solved = 0
    for row in range(len(x)):
        support = sorted(codes_of(result, row))
        if not support:
            continue  # no atom points along this row
        solved += 1
        best, norm = nnls(atoms[support].T, x[row])
        np.testing.assert_allclose([codes_of(result, row)[i] for i in support], best, atol=1e-3)
        assert result.residual_norm[row] == pytest.approx(norm, rel=1e-5)
        for other in others:
            support = sorted(codes_of(other, row))
            assert other.residual_norm[row] >= nnls(atoms[support].T, x[row])[1] * (1 - 1e-5)
    assert solved > 10
    mean = [np.mean(r.residual_norm**2) for r in (result, *others)]
    assert mean[0] < mean[1] < mean[2]


@each
def test_on_an_orthonormal_dictionary_all_pursuits_are_one(name):
    rng = np.random.default_rng(5)
    atoms = np.linalg.qr(rng.normal(size=(24, 24)))[0].astype(np.float32)
    x = rng.normal(size=(9, 24)).astype(np.float32)
    one, two = (pursue(which, x, atoms, 6) for which in (name, "gradient"))
    np.testing.assert_array_equal(one.indices, two.indices)
    np.testing.assert_allclose(one.values, two.values, atol=1e-5)


def test_orthogonal_matching_pursuit_recovers_few_planted_atoms_exactly():
    rng = np.random.default_rng(2)
    atoms = rng.normal(size=(256, 128))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    share = {}
    for planted in (3, 40):
        support = np.stack([rng.permutation(256)[:planted] for _ in range(30)])
        weights = rng.uniform(1, 2, size=(30, planted))
        x = np.einsum("nk,nkd->nd", weights, atoms[support]).astype(np.float32)
        result = pursue("orthogonal", x, atoms.astype(np.float32), planted)
        found = [set(map(int, s)) == set(codes_of(result, i)) for i, s in enumerate(support)]
        share[planted] = np.mean(found)
        if planted == 3:
            assert (result.residual_norm < 1e-5 * np.linalg.norm(x, axis=1)).all()
            for i, atoms_of_row in enumerate(support):
                got = [codes_of(result, i)[int(j)] for j in atoms_of_row]
                np.testing.assert_allclose(got, weights[i], rtol=1e-4)
    assert share[3] == 1
    assert share[40] < 0.9, "recovery must end somewhere, or the curve shows nothing"


@both
@each
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_promises_hold_for_any_scale(name, method, data):
    n, d, m, k = 4, 9, 14, 12
    signed = data.draw(st.booleans()) if name == "matching" else False
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16)))
    exponents = data.draw(st.tuples(*[st.integers(-15, 15)] * 2))
    x = (rng.normal(size=(n, d)) * 10.0 ** exponents[0]).astype(np.float32)
    atoms = (rng.normal(size=(m, d)) * 10.0 ** exponents[1]).astype(np.float32)
    x[rng.random(n) < 0.2] = 0
    atoms[rng.random(m) < 0.2] = 0
    atoms[-1] = atoms[0]
    result = pursue(name, x, atoms, k, method=method, signed=signed)
    indices, values = result.indices, result.values
    assert np.isfinite(values).all()
    assert signed or (values >= 0).all()
    assert ((indices >= 0) & (indices < m)).all()
    assert (indices[values == 0] == 0).all()
    assert (np.diff(np.abs(values), axis=1) <= 0).all()
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    assert (result.residual_norm <= norms * (1 + 1e-5)).all()
    for row in range(n):
        used = indices[row][values[row] != 0]
        assert len(set(used)) == len(used)
        assert (np.abs(atoms[used]).max(axis=1, initial=0) > 0).all()
        left = np.linalg.norm(x[row] - values[row].astype(np.float64) @ atoms[indices[row]])
        assert abs(left - result.residual_norm[row]) <= 1e-4 * norms[row]
    # Order of atoms and rows, and scale, change nothing else (atoms 0 and 13 are equal: left out).
    order = rng.permutation(m)
    again = pursue(name, 4 * x[::-1], atoms[order], k, method=method, signed=signed)
    np.testing.assert_allclose(
        again.residual_norm[::-1] / 4, result.residual_norm, atol=2e-5 * norms.max(initial=0)
    )


@both
@each
def test_the_residual_never_grows_with_k(name, method):
    x, atoms = (a.astype(np.float32) for a in problem(mix=2.0))
    before = np.linalg.norm(x, axis=1)
    for k in (2, 13):
        result = pursue(name, x, atoms, k, method=method)
        assert (result.residual_norm <= before * (1 + 1e-6)).all()
        before = result.residual_norm
        left = np.linalg.norm(x - np.asarray(decode(result.codes, atoms)), axis=1)
        np.testing.assert_allclose(before, left, rtol=1e-4)


@both
@each
def test_each_way_to_stop_is_reported(name, method):
    x, atoms = (a.astype(np.float32) for a in problem(n=12, mix=0.0))
    x[1], x[2, 3], x[3, 0], x[4] = 0, np.nan, np.inf, 7 * atoms[5]
    result = pursue(name, x, atoms, 5, method=method)
    expected = [Status.FULL, Status.ZERO_ROW, *[Status.NOT_FINITE] * 2, Status.STATIONARY, 0]
    assert result.status.tolist()[:6] == expected
    assert result.steps.tolist()[:6] == [5, 0, 0, 0, 1, 5]
    assert codes_of(result, 4) == {5: pytest.approx(7, rel=1e-6)}
    loose = pursue(name, x, atoms, 5, method=method, tol=0.6)
    stopped = [row for row in range(6, 12) if loose.status[row] == Status.TOL]
    assert len(stopped) > 2
    for row in stopped:
        _, norms = REFERENCES[name](x[row].astype(float), atoms.astype(float), 5)
        assert loose.steps[row] == np.argmax(norms <= 0.6 * norms[0])


@both
def test_atoms_that_are_combinations_of_others_do_no_harm(method):
    rng = np.random.default_rng(3)
    basis = rng.normal(size=(3, 16))
    atoms = np.concatenate([basis, rng.normal(size=(9, 3)) @ basis, basis]).astype(np.float32)
    x = rng.normal(size=(8, 16)).astype(np.float32)
    result = pursue("orthogonal", x, atoms, 15, method=method, signed=True)
    assert np.isfinite(result.values).all()
    fit = np.linalg.lstsq(basis.T, x.T.astype(float), rcond=None)[0]
    best = np.linalg.norm(x.T - basis.T @ fit, axis=0)
    np.testing.assert_allclose(result.residual_norm, best, rtol=1e-4)
    assert (result.codes.l0 <= 3).all()


@each
def test_chunks_and_prepared_atoms_do_not_change_the_answer(name):
    x, atoms = (a.astype(np.float32) for a in problem(n=53, d=40, m=4000))
    prepared = prepare_atoms(atoms)
    whole, parts = (pursue(name, x, prepared, 4, memory_mb=mb) for mb in (512, 1))
    np.testing.assert_array_equal(parts.indices, whole.indices)
    np.testing.assert_allclose(parts.values, whole.values, rtol=1e-4, atol=1e-5)


@each
def test_bfloat16_rows_no_rows_and_bad_calls(name):
    x, atoms = (a.astype(np.float32) for a in problem())
    low = jnp.asarray(x).astype(jnp.bfloat16)
    result = pursue(name, low, atoms, 4)
    assert result.values.dtype == np.float32
    np.testing.assert_array_equal(result.values, pursue(name, low.astype("f"), atoms, 4).values)
    with pytest.raises(ValueError, match="k: expected at least 1"):
        pursue(name, x, atoms, 0)
    with pytest.raises(ValueError, match="got 'omp'"):
        pursue(name, x, atoms, 1, method="omp")
