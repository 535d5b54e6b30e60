"""The training step: compiled once, Adam on the slow gradient, counters exact to the row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxdict.codes.codes import Codes
from jaxdict.rows.normalization import Normalizer, bfloat16_rows
from jaxdict.sae import model, step_config
from jaxdict.sae.optimizer import learning_rate_schedule
from jaxdict.sae.state import Batch, NormalizedRows, initial_state
from jaxdict.sae.step import count_rows, loss, make_train_step
from tests.reference import sae as reference

STEP_CONFIG = step_config.StepConfig(
    kind="topk",
    k=4,
    slots=4,
    k_aux=6,
    aux_form="residual",
    dead_rows=100,
    ema=0.0,
    schedule=step_config.ScheduleConfig(50, 3, 0.2),
    adam=step_config.AdamConfig(0.9, 0.99, 1e-8, 1.0),
)
HYPERPARAMS = step_config.Hyperparams(*map(jnp.float32, (1e-2, 1 / 32, 0.0, 12.0)))


def small_update(step_config=STEP_CONFIG):
    d, m = 12, 64
    state = initial_state(jax.random.key(0), m, mean=jnp.zeros(d), step_config=step_config)
    normalizer = Normalizer(jnp.zeros(d), jnp.ones(d), jnp.ones(d))
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(30, 32, d)).astype(np.float32)
    batches = (rows.view(np.uint32) >> 16).astype("u2")
    step = make_train_step(step_config)
    return step, state, [Batch(jnp.asarray(one), normalizer) for one in batches]


def test_step_compiles_once_and_keeps_unit_atoms_even_when_features_die():
    step, state, batches = small_update()
    seen = []
    for batch in batches:
        state, numbers = step(state, batch, HYPERPARAMS)
        seen.append(jax.device_get(numbers))
        np.testing.assert_allclose(jnp.linalg.norm(state.params.atoms, axis=1), 1, atol=1e-5)
    assert step._cache_size() == 1
    assert seen[0].aux == 0 and any(one.aux > 0 for one in seen), "both branches should run"
    assert seen[-1].loss < 0.8 * seen[0].loss
    assert all(one.l0 <= 4 for one in seen)
    assert int(state.step) == len(batches)


def test_step_gives_its_buffers_away():
    step, state, batches = small_update()
    before = state.params.encoder
    step(state, batches[0], HYPERPARAMS)
    assert before.is_deleted()


def test_one_step_is_adam_on_the_slow_gradient():
    step, state, batches = small_update(STEP_CONFIG._replace(k_aux=0))
    params = [np.asarray(leaf, np.float64) for leaf in state.params[:4]]
    x = np.asarray(bfloat16_rows(batches[0].bits), np.float64)
    _, slopes = reference.gradient(*params, x, 4, 12.0)
    slopes = list(slopes)
    along = np.sum(slopes[2] * params[2], axis=1, keepdims=True)
    slopes[2] = slopes[2] - along * params[2]
    norm = np.sqrt(sum(np.square(slope).sum() for slope in slopes))
    wanted = []
    for value, slope in zip(params, slopes, strict=True):
        slope = slope * min(1, 1.0 / norm)
        # Adam's first step with bias correction: g / (|g| + eps), at a third of the rate (warm-up).
        wanted.append(value - 1e-2 / 3 * slope / (np.abs(slope) + 1e-8))
    wanted[2] /= np.linalg.norm(wanted[2], axis=1, keepdims=True)
    state, _ = step(state, batches[0], HYPERPARAMS)
    for got, value, slope in zip(state.params[:4], wanted, slopes, strict=True):
        sure = (np.abs(slope) > 1e-5) | (slope == 0)
        np.testing.assert_allclose(np.asarray(got)[sure], value[sure], atol=2e-5)


def test_dead_counters_are_exact_to_the_row():
    rng = np.random.default_rng(0)
    m, counted = 20, np.zeros(20, int)
    since = jnp.zeros(m, jnp.int32)
    for _ in range(6):
        indices = np.stack([rng.permutation(m)[:3] for _ in range(8)])
        values = rng.random((8, 3)) * (rng.random((8, 3)) < 0.3)
        codes = Codes(jnp.asarray(indices, jnp.int32), jnp.asarray(values, jnp.float32))
        since = count_rows(since, codes)
        counted = reference.rows_since_fired(counted, np.asarray(codes.dense(m)), 8)
        np.testing.assert_array_equal(since, counted)
    top = jnp.full(m, jnp.iinfo(jnp.int32).max - 3, jnp.int32)
    assert (np.asarray(count_rows(top, codes)) >= 0).all(), "saturates, never wraps"


def test_dead_features_learn_through_auxk_only():
    params = model.initial_params(jax.random.key(0), 64, mean=jnp.zeros(12))
    z = jax.random.normal(jax.random.key(1), (32, 12))
    dead = jnp.arange(64) >= 60
    # Far below the others: never among the k, but still active on their own.
    params = params._replace(encoder_bias=jnp.where(dead, 0.0, 30.0))
    step_config = STEP_CONFIG._replace(k_aux=2)
    slope = jax.jit(jax.grad(loss, has_aux=True), static_argnums=2)
    without, _ = slope(params, NormalizedRows(z, z), step_config, HYPERPARAMS)
    with_aux, _ = slope(params, NormalizedRows(z, z), step_config, HYPERPARAMS, dead=dead)
    assert (np.asarray(without.encoder)[60:] == 0).all()
    assert (np.abs(np.asarray(with_aux.encoder)[60:]).max(1) > 0).all()


def test_learning_rate_warms_up_stays_and_falls():
    rate = learning_rate_schedule(step_config.ScheduleConfig(100, 10, 0.2))
    np.testing.assert_allclose(
        [2 * rate(t) for t in (0, 4, 9, 50, 80, 90, 99)], [0.2, 1, 2, 2, 2, 1, 0.1], rtol=1e-6
    )
    assert float(learning_rate_schedule(step_config.ScheduleConfig(10, 0, 0.0))(9)) == 1
