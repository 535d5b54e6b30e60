"""JumpReLU and the Heaviside step, with straight-through estimators that give the threshold a gradient."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def jumprelu(width: float, values: Array, log_theta: Array) -> Any:
    """The values above their threshold; the threshold learns from those near it."""
    return jnp.where(values > jnp.exp(log_theta), values, 0.0)


def _jumprelu_forward(width: float, values: Array, log_theta: Array) -> tuple:
    return jumprelu(width, values, log_theta), (values, log_theta)


def _jumprelu_backward(width: float, residuals: tuple, g: Array) -> tuple:
    values, log_theta = residuals
    theta = jnp.exp(log_theta)
    # d/dlog theta = theta d/dtheta = -theta (theta / (width theta)) K = -theta K / width
    return jnp.where(values > theta, g, 0.0), -g * theta * _near(width, values, theta) / width


jumprelu.defvjp(_jumprelu_forward, _jumprelu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def heaviside(width: float, values: Array, log_theta: Array) -> Array:
    """1 for values above their threshold; the threshold learns from those near it."""
    return (values > jnp.exp(log_theta)).astype(values.dtype)


def _heaviside_forward(width: float, values: Array, log_theta: Array) -> tuple:
    return heaviside(width, values, log_theta), (values, log_theta)


def _heaviside_backward(width: float, residuals: tuple, g: Array) -> tuple:
    values, log_theta = residuals
    return jnp.zeros_like(values), -g * _near(width, values, jnp.exp(log_theta)) / width


heaviside.defvjp(_heaviside_forward, _heaviside_backward)


def _near(width: float, values: Array, theta: Array) -> Array:
    """The rectangle kernel: whether a value lies within half a bandwidth of its threshold."""
    near = (values > 0) & (jnp.abs(values - theta) < width * theta / 2)
    return near.astype(values.dtype)
