"""Which atom enters a row's support: the selection that all pursuits share."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdict.pursuit.sharded import at, largest
from jaxdict.pursuit.step import RUNNING, Slots, Status, floor


def select_atom(
    slots: Slots,
    correlations: Float[Array, " m"],
    t: Int[Array, ""],
    *,
    signed: bool,
    axis: str | None,
) -> tuple[Slots, Float[Array, " k"]]:
    """Put the best atom into slot t, and take the gradient on the support.

    The best atom has the largest inner product with the residual (in size, if signed). It takes
    slot t unless it is in the support already, or its inner product is no better than rounding.

    Args:
        slots: the row's state; slot t is empty, because each earlier step filled at most one.
        correlations: float [m], atoms @ residual, for the atoms of this device.
        t: the step, 0 to k - 1 (the same for all rows).
        signed: whether negative coefficients are allowed.
        axis: mesh axis along which the atoms are split, if they are.

    Returns:
        The state with the atom's index in slot t (its value still 0), and the gradient [k]: the
        correlations of the support, 0 elsewhere. A row that can go no further stops here.
    """
    best, score = largest(jnp.abs(correlations) if signed else correlations, axis)
    active = slots.values != 0
    held = jnp.any(active & (slots.indices == best))
    small = floor(correlations.dtype)
    joins = (jnp.arange(slots.indices.shape[0]) == t) & (score > small) & ~held
    indices = jnp.where(joins, best, slots.indices)
    gradient = jnp.where(active | joins, at(correlations, indices, axis), 0)
    running = slots.status == RUNNING
    stationary = running & (jnp.max(jnp.abs(gradient)) <= small)
    status = jnp.where(stationary, Status.STATIONARY, slots.status)
    gradient = jnp.where(status == RUNNING, gradient, 0)
    return slots._replace(indices=indices, status=status), gradient
