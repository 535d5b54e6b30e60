"""Steps at a threshold whose gradient reaches the threshold (straight-through estimators)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def jump(width: float, values: Array, log_theta: Array) -> Any:
    """The values above their threshold; the threshold learns from those near it."""
    return jnp.where(values > jnp.exp(log_theta), values, 0.0)


def _jump_forward(width: float, values: Array, log_theta: Array) -> tuple:
    return jump(width, values, log_theta), (values, log_theta)


def _jump_backward(width: float, kept: tuple, g: Array) -> tuple:
    values, log_theta = kept
    theta = jnp.exp(log_theta)
    # d/dlog theta = theta d/dtheta = -theta (theta / (width theta)) K = -theta K / width
    return jnp.where(values > theta, g, 0.0), -g * theta * _near(width, values, theta) / width


jump.defvjp(_jump_forward, _jump_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def step(width: float, values: Array, log_theta: Array) -> Array:
    """1 for values above their threshold; the threshold learns from those near it."""
    return jnp.where(values > jnp.exp(log_theta), 1.0, 0.0)


def _step_forward(width: float, values: Array, log_theta: Array) -> tuple:
    return step(width, values, log_theta), (values, log_theta)


def _step_backward(width: float, kept: tuple, g: Array) -> tuple:
    values, log_theta = kept
    return jnp.zeros_like(values), -g * _near(width, values, jnp.exp(log_theta)) / width


step.defvjp(_step_forward, _step_backward)


def _near(width: float, values: Array, theta: Array) -> Array:
    """The rectangle kernel: whether a value lies within half a bandwidth of its threshold."""
    return jnp.where((values > 0) & (jnp.abs(values - theta) < width * theta / 2), 1.0, 0.0)
