"""Gradient pursuit: the whole support moves along the gradient, by the exact step size."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdict.pursuit.step import Rule, Slots, Support, quotient


def propose(
    slots: Slots,
    gradient: Float[Array, " k"],
    memory: Array,
    support: Support,
    *,
    signed: bool,
) -> tuple[Float[Array, " k"], Array]:
    """Values after the exact step along the gradient, clipped at zero unless signed.

    a = <g, g> / ||sum_j g_j atom_j||^2 minimises ||r - a sum_j g_j atom_j||;
    values <- max(0, values + a g). See `Rule.propose` for arguments and result.
    """
    step = quotient(jnp.dot(gradient, gradient), support.energy(gradient))
    values = slots.values + step * gradient
    return values if signed else jnp.maximum(values, 0), memory


RULE = Rule(propose)
