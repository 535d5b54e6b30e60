"""Losses against their formulas, and their guards."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.sae import losses


def test_reconstruction_loss_is_fvu_when_given_the_batch_variance():
    rng = np.random.default_rng(0)
    x, x_hat = rng.normal(size=(2, 50, 6)).astype(np.float32)
    variance = np.square(x - x.mean(0)).sum(1).mean()
    wanted = np.square(x - x_hat).sum() / np.square(x - x.mean(0)).sum()
    got = losses.reconstruction_loss(jnp.asarray(x), jnp.asarray(x_hat), variance=variance)
    assert float(got) == pytest.approx(wanted, rel=1e-5)


def test_auxk_loss_is_a_share_of_the_residual():
    residual = jnp.asarray(np.random.default_rng(0).normal(size=(7, 5)), jnp.float32)
    assert float(losses.auxk_loss(residual, jnp.zeros_like(residual))) == pytest.approx(1)
    assert float(losses.auxk_loss(residual, residual)) == 0
    assert float(losses.auxk_loss(residual, residual / 2)) == pytest.approx(0.25)


def test_auxk_loss_teaches_the_dead_features_only():
    residual = jnp.ones((3, 4))
    to_residual, to_dead = jax.grad(losses.auxk_loss, (0, 1))(residual, residual / 2)
    np.testing.assert_array_equal(to_residual, 0)
    assert (np.asarray(to_dead) < 0).all()


def test_auxk_loss_of_a_perfect_reconstruction_is_zero_with_finite_slopes():
    zero = jnp.zeros((3, 4))
    value, slopes = jax.value_and_grad(losses.auxk_loss, (0, 1))(zero, jnp.ones((3, 4)))
    assert float(value) == 0
    assert all(np.isfinite(slope).all() for slope in slopes)
