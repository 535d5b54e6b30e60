"""Resampling touches what belongs to dead features, and nothing else, whatever the shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.rows.normalization import Normalizer
from jaxdict.sae.dead_features import resample
from jaxdict.sae.state import Batch, initial_state
from jaxdict.sae.step_config import AdamConfig, ScheduleConfig, StepConfig

STEP_CONFIG = StepConfig(
    kind="jumprelu",
    k=2,
    slots=4,
    k_aux=0,
    aux_form="residual",
    dead_rows=100,
    ema=0.9,
    schedule=ScheduleConfig(10, 1, 0.0),
    adam=AdamConfig(0.9, 0.99, 1e-8, 1.0),
)


@pytest.mark.parametrize("m", [6, 20], ids=["as many atoms as dimensions", "more atoms"])
def test_only_arrays_with_an_axis_of_atoms_change(m):
    d = 6
    state = initial_state(jax.random.key(0), m, mean=jnp.zeros(d), step_config=STEP_CONFIG)
    dead = np.arange(m) % 3 == 0
    ones = jax.tree.map(lambda leaf: jnp.ones_like(leaf), state.optimizer)
    average = jax.tree.map(lambda leaf: leaf + 1.0, state.params)
    since = jnp.where(dead, 200, 3).astype(jnp.int32)
    state = state._replace(optimizer=ones, ema=average, since_fired=since)
    before = jax.tree.map(np.array, state)
    rng = np.random.default_rng(0)
    bits = jax.lax.bitcast_convert_type(
        jnp.asarray(rng.normal(size=(8, d)), jnp.bfloat16), jnp.uint16
    )
    batch = Batch(bits, Normalizer(jnp.zeros(d), jnp.ones(d), jnp.ones(d)))
    after = resample(state, batch, STEP_CONFIG, seeds=[0], step=1)
    assert after.ema is not None
    np.testing.assert_array_equal(after.since_fired, np.where(dead, 0, 3))
    for name in ("encoder", "encoder_bias", "atoms"):
        moments = (getattr(after.optimizer.mu, name), getattr(after.optimizer.nu, name))
        for moment in moments:
            assert (np.asarray(moment)[dead] == 0).all() and (np.asarray(moment)[~dead] == 1).all()
        new, averaged = getattr(after.params, name), np.asarray(getattr(after.ema, name))
        np.testing.assert_array_equal(averaged[dead], np.asarray(new)[dead])
        np.testing.assert_array_equal(averaged[~dead], getattr(before.ema, name)[~dead])
    np.testing.assert_array_equal(after.ema.bias, before.ema.bias)
    np.testing.assert_array_equal(after.optimizer.mu.bias, 1)
    np.testing.assert_array_equal(after.optimizer.mu.threshold, 1)
