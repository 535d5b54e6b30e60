"""FVU, VE, L0 and dead share against NumPy, whatever the batches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict import metrics
from jaxdict.codes import Codes
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

    measured = metrics.measure([(None, bits[:4]), (None, bits[4:])], [0, 3], report, batch=40)
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
