"""Matching pursuit: one coefficient moves a step, the one that lowers the residual the most."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdict.pursuit.step import Rule, Slots, Support


def propose(
    slots: Slots,
    gradient: Float[Array, " k"],
    memory: Array,
    support: Support,
    *,
    signed: bool,
) -> tuple[Float[Array, " k"], Array]:
    """Values after one coefficient's exact step, clipped at zero unless signed.

    change_j = max(g_j, -values_j) lowers the squared residual by change_j (2 g_j - change_j); the
    largest such fall is taken. Signed, change_j = g_j: the largest inner product, as usual. See `Rule.propose` for arguments and result.
    """
    del support
    change = gradient if signed else jnp.maximum(gradient, -slots.values)
    best = jnp.argmax(change * (2 * gradient - change))
    moving = jnp.arange(change.shape[0]) == best
    return slots.values + jnp.where(moving, change, 0), memory


RULE = Rule(propose, single=True)
