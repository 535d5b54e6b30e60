"""Jaccard, CKA, SVCCA and layer matching against their definitions, written slowly, and their invariances."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdict.compare.similarity import (
    CrossCovariance,
    jaccard,
    linear_cka,
    match,
    svcca,
    whitened_components,
)


def cross(x, y, size=7):
    """C_xy, summed a few rows at a time, away from the mean."""
    sums = CrossCovariance(x.shape[1], y.shape[1])
    for start in range(0, len(x), size):
        sums.add(x[start : start + size], y[start : start + size])
    assert sums.rows == len(x)
    return sums.centred


def ours_cka(x, y):
    return linear_cka(cross(x, y), *(np.linalg.norm(cross(z, z)) for z in (x, y)))


def ours_svcca(x, y, variance=0.99):
    return svcca(*(whitened_components(cross(z, z), variance) for z in (x, y)), cross(x, y))


def slow_cka(x, y):
    """By centred Gram matrices [n, n]: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    a, b = h @ x @ x.T @ h, h @ y @ y.T @ h
    return np.trace(a @ b) / np.sqrt(np.trace(a @ a) * np.trace(b @ b))


def slow_svcca(x, y, variance):
    """SVD of each, then the canonical correlations of what is kept, by least squares."""
    kept = []
    for z in (x, y):
        u, s, _ = np.linalg.svd(z - z.mean(0), full_matrices=False)
        share = np.cumsum(s**2) / np.sum(s**2)
        p = next(i + 1 for i in range(len(s)) if share[i] >= variance - 1e-12)
        kept.append(u[:, :p] * s[:p])
    a, b = kept
    saa, sbb, sab = a.T @ a, b.T @ b, a.T @ b
    squared = np.linalg.eigvals(np.linalg.solve(saa, sab) @ np.linalg.solve(sbb, sab.T)).real
    least = min(a.shape[1], b.shape[1])
    return np.sqrt(np.clip(np.sort(squared)[::-1][:least], 0, 1)).mean()


def representations(n=200, d=9, e=6, seed=0):
    """Two that share part of what they say, of unequal variances, far from zero."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(n, 4))
    x = shared @ rng.normal(size=(4, d)) + 0.5 * rng.normal(size=(n, d)) * np.geomspace(1, 0.01, d)
    y = shared @ rng.normal(size=(4, e)) + 0.5 * rng.normal(size=(n, e)) + 100
    return x, y


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_jaccard_is_that_of_sets(a, b):
    found = jaccard(*(np.array(sorted(s), np.int64) for s in (a, b)))
    assert found == (len(a & b) / len(a | b) if a | b else 0)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), d=st.integers(1, 12), e=st.integers(1, 12))
def test_cka_is_that_of_gram_matrices(seed, d, e):
    x, y = representations(60, d, e, seed)
    assert ours_cka(x, y) == pytest.approx(slow_cka(x, y), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    d=st.integers(1, 12),
    e=st.integers(1, 12),
    variance=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
)
def test_svcca_is_svd_then_cca(seed, d, e, variance):
    x, y = representations(60, d, e, seed)
    assert ours_svcca(x, y, variance) == pytest.approx(slow_svcca(x, y, variance), rel=1e-6)


def test_both_ignore_rotation_scale_and_shift():
    x, y = representations()
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(9, 9)))[0]
    for measure in (ours_cka, ours_svcca):
        plain = measure(x, y)
        assert 0.1 < plain < 0.95
        assert measure(y, x) == pytest.approx(plain, rel=1e-9)
        assert measure(7 * x @ turn - 3, 0.01 * y) == pytest.approx(plain, rel=1e-9)
        assert measure(x, 2 * x @ turn + 5) == pytest.approx(1, abs=1e-9)


def test_svcca_of_all_variance_ignores_every_invertible_map_and_cka_does_not():
    x, y = representations()
    linear = np.random.default_rng(2).normal(size=(9, 9))
    assert ours_svcca(x @ linear, y, 1.0) == pytest.approx(ours_svcca(x, y, 1.0), rel=1e-6)
    assert abs(ours_cka(x @ linear, y) - ours_cka(x, y)) > 0.01


def test_independent_rows_are_unlike_and_constant_ones_have_no_similarity():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 5000, 4))
    assert ours_cka(x, y) < 0.01 and ours_svcca(x, y) < 0.1
    assert np.isnan(ours_cka(x, np.ones((5000, 3)))) and np.isnan(ours_svcca(x, np.ones((5000, 3))))


@pytest.mark.parametrize(("variance", "kept"), [(0.5, 1), (0.9, 1), (0.91, 2), (0.9995, 3), (1, 3)])
def test_as_few_components_are_kept_as_hold_the_variance(variance, kept):
    xx = np.diag([0.01, 9.0, 0.0, 0.99])  # shares 90%, 9.9%, 0.1% and nothing
    found = whitened_components(xx, variance)
    assert found.shape == (4, kept)
    np.testing.assert_allclose(found.T @ xx @ found, np.eye(kept), atol=1e-12)


def test_matching_counts_what_could_go_wrong():
    nan = np.nan
    scores = np.array([[0.9, 0.1, 0.2], [0.5, 0.5, 0.1], [0.3, 0.4, 0.2], [0.2, 0.1, 0.3]])
    same = np.eye(4, 3, dtype=bool)
    found = match(scores, same)
    assert found.best.tolist() == [0, 0, 1, 2]
    assert found.right.tolist() == [True, False, False, False], "a tie is not a match"
    assert found.counted.tolist() == [True, True, True, False], "the last has no counterpart"
    assert found.accuracy == pytest.approx(1 / 3) and found.chance == pytest.approx(1 / 3)
    other = match(np.array([[nan, 0.2, 0.1], [0.5, nan, nan], [nan, 0.9, 0.3]]), np.eye(3) > 0)
    assert other.counted.tolist() == [False, False, True] and other.accuracy == 0
    assert match(np.full((1, 2), nan), np.array([[True, False]])).best.tolist() == [-1]
    assert match(np.ones((1, 1)), np.ones((1, 1), bool)).accuracy is None, "nothing else to take"
