"""Each kind of autoencoder against dense automatic differentiation and against its formula in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.dictionary.arrays import ENCODER_KINDS
from jaxdict.rows.normalization import Normalizer
from jaxdict.sae import kinds, losses, model, step_config
from jaxdict.sae.module import SAE
from jaxdict.sae.state import Batch, NormalizedRows, initial_state
from jaxdict.sae.step import loss, make_train_step
from jaxdict.sae.step_config import AdamConfig, Hyperparams, ScheduleConfig, StepConfig
from tests.jaxdict.random_sae import D, K, M, N, params_and_rows

VARIANCE = 7.0
HYPERPARAMS = Hyperparams(1e-2, 1 / 32, 0.3, VARIANCE)


def step_config_of(kind, **more):
    fields = {"prefixes": (5, 20, M), "penalty": "target", "bandwidth": 0.5, "ramp": 0}
    slots = K if kind == "topk" else M
    adam = AdamConfig(0.9, 0.99, 1e-8, 1.0)
    return StepConfig(
        kind,
        K,
        slots,
        0,
        "residual",
        100,
        0.0,
        ScheduleConfig(50, 3, 0.2),
        adam,
        **{**fields, **more},
    )


def pre_of(params, x):
    return (x - params.bias) @ params.encoder.T + params.encoder_bias


def fvu(x, x_hat):
    return jnp.mean(jnp.sum(jnp.square(x - x_hat), axis=1)) / VARIANCE


def gradient_of(step_config, params, x):
    return jax.grad(loss, has_aux=True)(params, NormalizedRows(x, x), step_config, HYPERPARAMS)


def assert_same(got, wanted, tolerance=3e-5):
    for name, one, other in zip(got._fields, got, wanted, strict=True):
        if other is not None:
            np.testing.assert_allclose(one, other, atol=tolerance, err_msg=name)


def test_every_kind_of_the_settings_is_there_and_documented():
    assert set(kinds.REGISTRY) == set(ENCODER_KINDS)
    for kind in kinds.REGISTRY.values():
        text = kind.__doc__ or ""
        assert ("Source:" in text and "Differs:" in text and "e = " in text) or "e as" in text


def test_batchtopk_keeps_n_k_of_the_batch_and_learns_like_dense_autodiff():
    params, x = params_and_rows()
    step_config = step_config_of("batchtopk")

    def dense(p):
        pre = jax.nn.relu(pre_of(p, x))
        tau = jnp.sort(pre.reshape(-1))[-N * K]
        return fvu(x, jnp.where(pre >= tau, pre, 0) @ p.atoms + p.bias)

    gradient, (active, main, _) = gradient_of(step_config, params, x)
    assert int((active.codes.values > 0).sum()) == N * K
    counts = np.asarray(active.codes.l0)
    assert counts.min() < K < counts.max(), "rows should differ in how many atoms they have"
    pre = np.asarray(jax.nn.relu(pre_of(params, x))).reshape(-1)
    assert float(active.threshold) == pytest.approx(np.sort(pre)[-N * K])
    assert float(main) == pytest.approx(float(dense(params)), rel=1e-5)
    assert_same(gradient, jax.grad(dense)(params))


def test_slots_cut_a_row_of_batchtopk_at_its_largest():
    params, x = params_and_rows()
    active = kinds.BatchTopK.active(
        params, x, step_config_of("batchtopk")._replace(slots=6), HYPERPARAMS
    )
    whole = kinds.BatchTopK.active(params, x, step_config_of("batchtopk"), HYPERPARAMS)
    assert int(active.codes.l0.max()) == 6 < int(whole.codes.l0.max())


def test_matryoshka_learns_the_mean_over_its_prefixes():
    params, x = params_and_rows(1)
    step_config = step_config_of("matryoshka")

    def dense(p):
        pre = jax.nn.relu(pre_of(p, x))
        tau = jnp.sort(pre.reshape(-1))[-N * K]
        e = jnp.where(pre >= tau, pre, 0)
        parts = [fvu(x, e[:, :size] @ p.atoms[:size] + p.bias) for size in step_config.prefixes]
        return sum(parts) / len(parts)

    gradient, (_, main, _) = gradient_of(step_config, params, x)
    assert_same(gradient, jax.grad(dense)(params))
    pre = jax.nn.relu(pre_of(params, x))
    e = jnp.where(pre >= jnp.sort(pre.reshape(-1))[-N * K], pre, 0)
    assert float(main) == pytest.approx(float(fvu(x, e @ params.atoms + params.bias)), rel=1e-5)


def test_relu_learns_like_dense_autodiff_with_l1():
    params, x = params_and_rows(2)

    def dense(p):
        e = jax.nn.relu(pre_of(p, x))
        l1 = jnp.mean(e.sum(1)) / jnp.sqrt(K * VARIANCE)
        return fvu(x, e @ p.atoms + p.bias) + HYPERPARAMS.sparsity * l1

    gradient, _ = gradient_of(step_config_of("relu"), params, x)
    assert_same(gradient, jax.grad(dense)(params))


@pytest.mark.parametrize("penalty", ["target", "l0", "tanh"])
def test_jumprelu_is_its_formula_straight_through_estimators_included(penalty):
    params, x = params_and_rows(3)
    log_theta = jnp.log(jnp.linspace(0.5, 2.5, M))
    params = params._replace(threshold=log_theta)
    step_config = step_config_of("jumprelu", penalty=penalty)
    gradient, (active, _, _) = gradient_of(step_config, params, x)

    encoder, bias_e, atoms, bias = (np.asarray(leaf, np.float64) for leaf in params[:4])
    x, theta = np.asarray(x, np.float64), np.exp(np.asarray(log_theta, np.float64))
    pre = (x - bias) @ encoder.T + bias_e
    on = pre > theta
    e = np.where(on, pre, 0)
    np.testing.assert_allclose(active.codes.dense(M), e, atol=1e-5)
    near = (pre > 0) & (np.abs(pre - theta) < step_config.bandwidth * theta / 2)
    assert (near & ~on).any() and (near & on).any(), "both sides of a threshold should be near"
    error = e @ atoms + bias - x
    d_e = 2 * error @ atoms.T / N / VARIANCE
    d_theta = -(d_e * near).sum(0) * theta / (step_config.bandwidth * theta)
    over = on.sum() / N / K
    d_over = {"target": 2 * (over - 1), "l0": 1.0, "tanh": 0.0}[penalty] * HYPERPARAMS.sparsity
    d_theta += -d_over / N / K * near.sum(0) / (step_config.bandwidth * theta)
    if penalty == "tanh":
        squashed = np.tanh(e / theta)
        d_tanh = HYPERPARAMS.sparsity / N / K * (1 - squashed**2) / theta
        d_theta += -(d_tanh * near).sum(0) / step_config.bandwidth
        d_e = d_e + d_tanh
        assert float(active.penalty) == pytest.approx(HYPERPARAMS.sparsity * squashed.sum() / N / K)
    d_e = np.where(on, d_e, 0)
    np.testing.assert_allclose(gradient.threshold, d_theta * theta, atol=3e-5)
    np.testing.assert_allclose(gradient.encoder, d_e.T @ (x - bias), atol=3e-5)
    np.testing.assert_allclose(gradient.encoder_bias, d_e.sum(0), atol=3e-5)
    np.testing.assert_allclose(gradient.atoms, e.T @ (2 * error / N / VARIANCE), atol=3e-5)


def test_target_penalty_is_the_square_of_the_distance():
    params, x = params_and_rows(3)
    params = params._replace(threshold=jnp.zeros(M))
    active = kinds.JumpReLU.active(params, x, step_config_of("jumprelu"), HYPERPARAMS)
    over = float(active.codes.l0.mean()) / K
    assert float(active.penalty) == pytest.approx(HYPERPARAMS.sparsity * (over - 1) ** 2, rel=1e-5)


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_training_lowers_the_loss_and_the_trained_module_gives_its_rows(kind):
    step_config = step_config_of(kind)._replace(slots=K if kind == "topk" else 12)
    rng = np.random.default_rng(0)
    true = rng.normal(size=(16, D))
    codes = rng.exponential(size=(60, 64, 16)) * (rng.random((60, 64, 16)) < 0.15)
    rows = (codes @ true).astype(np.float32)
    bits = (rows.view(np.uint32) >> 16).astype(np.uint16)
    normalizer = Normalizer(jnp.zeros(D), jnp.ones(D), jnp.ones(D))
    state = initial_state(jax.random.key(0), M, mean=jnp.zeros(D), step_config=step_config)
    step = make_train_step(step_config)
    hyperparams = Hyperparams(*map(jnp.float32, (1e-2, 0.0, 0.05, rows.var((0, 1)).sum())))
    seen = []
    for one in bits:
        state, numbers = step(state, Batch(jnp.asarray(one), normalizer), hyperparams)
        seen.append(float(numbers.loss))
    assert step._cache_size() == 1, "compiled once"
    assert np.mean(seen[-5:]) < 0.6 * np.mean(seen[:5])
    params = state.best(kind)
    module = SAE.from_params(params, step_config.slots, kind=kind)
    x = jnp.asarray(rows[-1])
    found = module.encode(x)
    low = 0.0 if params.threshold is None else np.asarray(params.threshold)
    pre = np.asarray(pre_of(params, x))
    wanted = np.where(pre > low, np.maximum(pre, 0), 0)
    least = np.sort(wanted, axis=1)[:, -step_config.slots :][:, :1]
    wanted = np.where(wanted >= least, wanted, 0)
    np.testing.assert_allclose(found.dense(M), wanted, atol=1e-5)
    np.testing.assert_allclose(module(x), wanted @ params.atoms + params.bias, atol=1e-4)
    if ENCODER_KINDS[kind].threshold == "one":
        assert 0.5 * K < float(found.l0.mean()) < 2 * K, "the threshold should keep about k"


def test_auxk_in_both_forms():
    rng = np.random.default_rng(0)
    r, r_hat = rng.normal(size=(2, N, D)).astype(np.float32)
    error = np.square(r - r_hat).sum(1).mean()
    own = float(losses.auxk_loss(r, r_hat))
    assert own == pytest.approx(error / np.square(r).sum(1).mean(), rel=1e-5)
    other = losses.auxk_loss(r, r_hat, form="variance", variance=VARIANCE, share=0.25)
    assert float(other) == pytest.approx(0.25 * error / VARIANCE, rel=1e-5)
    assert float(losses.auxk_loss(jnp.zeros((N, D)), r_hat)) == 0


def test_approximate_selection_and_bfloat16_stay_close():
    params, x = params_and_rows()
    codes, _ = model.encode(params, x, K)
    for execution in (step_config.Execution(recall=0.95), step_config.Execution(bfloat16=True)):
        other, _ = model.encode(params, x, K, execution=execution)
        shared = [
            len(set(a) & set(b)) / K
            for a, b in zip(np.asarray(codes.indices), np.asarray(other.indices), strict=True)
        ]
        assert np.mean(shared) > 0.9
        np.testing.assert_allclose(other.values[:, 0], codes.values[:, 0], rtol=0.02)
