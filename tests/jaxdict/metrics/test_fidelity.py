"""FVU, VE, L0, cosine, density and dead share against NumPy, whatever the batches."""

from __future__ import annotations

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.codes.codes import Codes
from jaxdict.metrics import distributions
from jaxdict.metrics import fidelity as metrics
from jaxdict.metrics.quality import quality_of, without_nan
from jaxdict.rows import Block
from tests.reference import sae as reference


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 5)) * np.array([1, 2, 0.1, 30, 1]) + np.array([0, 3, 0, 900, 0])
    return x.astype("f4"), (x + rng.normal(size=x.shape) * 0.3).astype("f4")


def fidelity(x, x_hat, size):
    total = metrics.Fidelity()
    for start in range(0, len(x), size):
        a, b = jnp.asarray(x[start : start + size]), jnp.asarray(x_hat[start : start + size])
        total.add(jax.jit(metrics.batch_sums)(a, b, jnp.ones(len(a)), jnp.asarray(x[0])))
    return total


@pytest.mark.parametrize("size", [300, 64, 7])
def test_fvu_and_ve_are_the_slow_reference_for_any_batch_size(rows, size):
    x, x_hat = rows
    total = fidelity(x, x_hat, size)
    wide, wide_hat = x.astype(np.float64), x_hat.astype(np.float64)
    assert total.rows == 300
    assert total.fvu == pytest.approx(reference.fvu(wide, wide_hat), rel=1e-5)
    assert total.ve == pytest.approx(reference.ve(wide, wide_hat), rel=1e-5)
    each = [reference.fvu(wide[:, [i]], wide_hat[:, [i]]) for i in range(5)]
    assert total.fvu_standardized == pytest.approx(np.mean(each), rel=1e-5)


def test_perfect_and_mean_reconstructions(rows):
    x, _ = rows
    assert fidelity(x, x, 50).fvu == 0
    assert fidelity(x, x, 50).ve == pytest.approx(1)
    flat = np.broadcast_to(x.mean(0), x.shape)
    assert fidelity(x, flat, 50).fvu == pytest.approx(1, rel=1e-5)
    assert fidelity(x, flat, 50).ve == pytest.approx(0, abs=1e-6)


def test_constant_rows_and_no_rows_do_not_divide_by_zero():
    ones = np.ones((4, 3), np.float32)
    assert np.isnan(fidelity(ones, ones, 4).fvu)
    with pytest.raises(ValueError, match="at least one measured row"):
        _ = metrics.Fidelity().fvu


def test_measure_pads_per_step_counts_and_sums(rows):
    x, _ = rows
    bits = (x.reshape(6, 2, 25, 5).view(np.uint32) >> 16).astype(np.uint16)
    stored = (bits.astype(np.uint32) << 16).view(np.float32)
    sizes = set()

    def report(part, weight):
        sizes.add(part.shape)
        a = jnp.asarray((part.astype(np.uint32) << 16).view(np.float32))
        codes = Codes(
            jnp.tile(jnp.array([[1, 0]], jnp.int32), (len(part), 1)),
            jnp.tile(jnp.array([[2.0, 0.0]]), (len(part), 1)),
        )
        sums = metrics.batch_sums(a, a * 0.9, jnp.asarray(weight), jnp.zeros(5))
        return metrics.BatchReport(sums, sums, metrics.fired(codes, 4, jnp.asarray(weight)))

    blocks = [
        Block(np.arange(len(part)), part.reshape(-1, 5), 2, np.full(len(part), 25))
        for part in (bits[:4], bits[4:])
    ]
    measured = metrics.measure_blocks(blocks, [0, 3], report, batch=40)
    numbers = measured.summary()
    assert sizes == {(40, 5)}, "one batch shape, so one compilation"
    assert numbers["rows"] == 300 and numbers["l0"] == 1 and numbers["dead_share"] == 0.75
    wide = stored.astype(np.float64)
    assert numbers["fvu"] == pytest.approx(
        reference.fvu(wide.reshape(-1, 5), 0.9 * wide.reshape(-1, 5)), rel=1e-4
    )
    for place, name in enumerate("03"):
        part = wide[:, place].reshape(-1, 5)
        assert numbers["fvu_per_step"][name] == pytest.approx(
            reference.fvu(part, 0.9 * part), rel=1e-4
        )
    np.testing.assert_array_equal(measured.fired, [0, 300, 0, 0])


def test_a_constant_dimension_far_from_the_shift_has_no_variance(rows):
    x = np.concatenate([rows[0], np.full((300, 1), 77.7, "f4")], axis=1)
    total = metrics.Fidelity()
    total.add(metrics.batch_sums(jnp.asarray(x), jnp.asarray(x) + 0.1, jnp.ones(300), jnp.ones(6)))
    each = total.centred.fvu_per_dimension
    assert np.isnan(each[5]) and np.isfinite(each[:5]).all()
    assert total.fvu_standardized == pytest.approx(each[:5].mean())


def test_pooled_rows_keep_their_own_means(rows):
    x, x_hat = rows
    both = metrics.pool(
        [fidelity(x, x_hat, 50).centred, fidelity(x + 100, x_hat + 100, 50).centred]
    )
    assert both.rows == 600
    assert both.fvu == pytest.approx(fidelity(x, x_hat, 50).fvu, rel=1e-4)
    scaled = fidelity(x, x_hat, 50).centred.over(np.array([4.0, 0, 1, 1, 1]))
    wide, near = x.astype(np.float64)[:, 0], x_hat.astype(np.float64)[:, 0]
    assert scaled.error[0] == pytest.approx(np.square((wide - near) / 2).sum(), rel=1e-5)
    assert scaled.xx[1] == 0 and scaled.error[1] == 0, "a dimension without variance is left out"


def test_angles_and_active_features_are_counted(rows):
    x, x_hat = (jnp.asarray(value).at[7].set(0) for value in rows)
    weight = jnp.ones(300).at[200:].set(0)
    l0 = np.arange(300) % 3
    values = jnp.asarray((np.arange(4) < l0[:, None]).astype("f4"))
    found = jax.jit(distributions.row_sums)(
        Codes(jnp.zeros((300, 4), int), values), x, x_hat, weight
    )
    a, b = (np.delete(np.asarray(value, np.float64)[:200], 7, axis=0) for value in (x, x_hat))
    cosine = np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert float(found.cosine) == pytest.approx(cosine.sum(), rel=1e-6), "zero rows count 0"
    angles = np.append(np.arccos(np.clip(cosine, -1, 1)), np.pi / 2)
    wanted, _ = np.histogram(angles, distributions.ANGLES, (0, np.pi))
    edge = np.cumsum(np.asarray(found.angles)) - np.cumsum(wanted)
    assert np.abs(edge).max() <= 2, "but for angles within rounding of an edge"
    np.testing.assert_array_equal(found.active, np.bincount(l0[:200], minlength=5))


def test_the_angle_keeps_its_digits_where_a_row_is_nearly_rebuilt():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1000)), jnp.float32)
    turned = x.at[0, 0].add(0.005 * jnp.linalg.norm(x))
    for x_hat, low, high in ((x, 0, 0), (turned, 2, 3), (-x, 1799, 1799)):
        (place,) = np.flatnonzero(distributions.row_sums(None, x, x_hat, jnp.ones(1)).angles)
        assert low <= place <= high


def test_quantiles_and_histograms_are_numpys():
    rng = np.random.default_rng(0)
    l0 = rng.integers(3, 70, 1000)
    counts = np.bincount(l0, minlength=100)
    histogram = distributions.l0_histogram(counts)
    assert len(histogram["rows"]) <= 16 and sum(histogram["rows"]) == 1000
    wanted = [((l0 >= a) & (l0 < b)).sum() for a, b in pairwise(histogram["edges"])]
    assert histogram["rows"] == wanted
    assert distributions.l0_histogram(np.array([0, 0, 9])) == {"edges": [2, 3], "rows": [9]}
    for q, found in distributions.l0_quantiles(counts).items():
        assert found == np.quantile(l0, float(q), method="inverted_cdf")

    cosines = np.sort(1 - rng.exponential(0.05, 1000).clip(0, 2))
    angles, _ = np.histogram(np.arccos(cosines), distributions.ANGLES, (0, np.pi))
    for q, found in distributions.cosine_quantiles(angles).items():
        wanted = np.quantile(cosines, float(q), method="inverted_cdf")
        assert np.arccos(found) == pytest.approx(
            np.arccos(wanted), abs=np.pi / distributions.ANGLES
        )


def test_density_holds_every_feature_once():
    fired = np.array([0, 0, 1, 10, 99, 1000, 1000, 317])
    found = distributions.density(fired, 1000)
    edges, features = np.array(found["log10_edges"]), np.array(found["features"])
    assert found["never"] == 2 and features.sum() == 6 and edges[-1] == 0 and edges[0] == -3
    for share, count in ((1e-3, 1), (1e-2, 1), (0.099, 1), (0.317, 1), (1.0, 2)):
        place = min(np.searchsorted(edges, np.log10(share) + 1e-12, side="right"), len(features))
        assert features[place - 1] == count


def test_quality_of_one_measurement_is_its_summary(rows):
    x, x_hat = rows
    found = metrics.Measurement()
    for step in (1, 0):
        a, b = jnp.asarray(x[step::2]), jnp.asarray(x_hat[step::2])
        codes, weight = Codes(jnp.ones((150, 2), int), jnp.ones((150, 2))), jnp.ones(150)
        sums = metrics.batch_sums(a, b, weight, jnp.asarray(x[0]))
        counts = distributions.row_sums(codes, a, b, weight)
        fired = metrics.fired(codes, 3, weight)
        found.add(step, metrics.BatchReport(sums, None, fired, counts))
    numbers = quality_of([found]).numbers()
    for name, value in found.summary().items():
        assert numbers[name] == pytest.approx(value, rel=1e-9)
    assert list(numbers["fvu_per_step"]) == ["0", "1"], "in order"


def test_what_json_does_not_have_becomes_none():
    assert without_nan({"a": {"b": float("nan"), "c": float("inf")}, "d": [1], "e": 0.5}) == {
        "a": {"b": None, "c": None},
        "d": [1],
        "e": 0.5,
    }
