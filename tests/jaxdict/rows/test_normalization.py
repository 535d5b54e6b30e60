"""Normalization: fitted numbers, inverses, floors, and large means."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.flags import NORMALIZATIONS
from jaxdict.rows.normalization import (
    denormalize,
    fit,
    load_normalization,
    normalize,
    save_normalization,
    to_device,
)
from tests.damage import flipped


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6)) * np.array([1, 1, 1, 5, 1, 100.0])
    return (rng.normal(size=(4000, 6)) @ mixing + np.array([0, 1, -2, 500, 0, 0])).astype("f4")


def fitted(rows, kind, **options):
    return fit(lambda: iter(np.array_split(rows, 7)), kind, **options)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_fit_is_the_direct_float64_formula(rows, kind):
    normalizer = fitted(rows, kind)
    x = rows.astype(np.float64)
    flat = normalizer.transform.ndim == 1
    z = (
        (x - normalizer.mean) * normalizer.transform
        if flat
        else (x - normalizer.mean) @ normalizer.transform
    )
    np.testing.assert_allclose(z.mean(0), normalizer.center, atol=1e-9)
    np.testing.assert_allclose(
        np.square(z - z.mean(0)).sum(1).mean(), normalizer.variance, rtol=1e-9
    )
    assert normalizer.rows == len(rows)
    if kind == "none":
        np.testing.assert_array_equal(z, x)
    if kind == "rms":
        assert np.square(z).mean() == pytest.approx(1)
        assert np.ptp(normalizer.transform) == 0
    if kind == "standardize":
        np.testing.assert_allclose(z.std(0), 1, rtol=1e-9)
    if kind == "whiten":
        np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(6), atol=1e-6)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_device_map_and_its_inverse_return_the_rows(rows, kind):
    normalizer = to_device(fitted(rows, kind))
    back = denormalize(normalizer, normalize(normalizer, jnp.asarray(rows)))
    np.testing.assert_allclose(back, rows, atol=1e-5 * np.abs(rows).max())


@pytest.mark.parametrize("kind", ["standardize", "whiten"])
def test_floor_bounds_the_amplification_of_a_constant_dimension(rows, kind):
    rows = np.concatenate([rows, np.full((len(rows), 1), 3.0, "f4")], axis=1)
    normalizer = fitted(rows, kind, floor=1e-4)
    mean_variance = rows.astype(np.float64).var(0).mean()
    largest = np.linalg.norm(normalizer.transform, axis=0 if kind == "whiten" else None, ord=None)
    assert np.isfinite(normalizer.transform).all()
    assert np.max(largest if kind == "whiten" else normalizer.transform) == pytest.approx(
        1 / np.sqrt(1e-4 * mean_variance)
    )


def test_large_mean_costs_no_digits():
    rng = np.random.default_rng(0)
    rows = (1e4 + rng.integers(-2, 3, size=(5000, 3)) * 0.125).astype(np.float32)
    normalizer = fitted(rows, "standardize")
    np.testing.assert_allclose(normalizer.inverse, rows.astype(np.float64).std(0), rtol=1e-9)


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_file_round_trip_is_bit_for_bit(rows, kind, tmp_path):
    normalizer = fitted(rows, kind)
    save_normalization(normalizer, tmp_path / "n.safetensors")
    again = load_normalization(tmp_path / "n.safetensors")
    for name in ("mean", "transform", "inverse", "center"):
        assert (
            getattr(again, name).tobytes()
            == np.ascontiguousarray(getattr(normalizer, name)).tobytes()
        )
    assert (again.kind, again.variance, again.rows) == (kind, normalizer.variance, normalizer.rows)


def test_a_turned_bit_is_told(rows, tmp_path):
    path = tmp_path / "n.safetensors"
    save_normalization(fitted(rows, "standardize"), path)
    before, quiet = load_normalization(path), 0
    for where in flipped(path):
        try:
            again = load_normalization(path)
        except ValueError as error:
            assert "n.safetensors" in str(error) and "copy the run again" in str(error), where
        else:  # the name of the hashes itself was hit
            quiet += 1
            assert (again.kind, again.variance) == (before.kind, before.variance)
            np.testing.assert_array_equal(again.transform, before.transform)
    assert quiet <= 10


def test_bad_input_says_what_came():
    with pytest.raises(ValueError, match="got 'pca'"):
        fit(lambda: [np.ones((2, 2))], "pca")
    with pytest.raises(ValueError, match="at least one training row"):
        fit(lambda: [], "rms")
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit(lambda: [np.array([[1.0, np.nan], [0, 1]])], "rms")
    with pytest.raises(ValueError, match="equal rows"):
        fit(lambda: [np.ones((4, 2))], "standardize")
