"""Orthogonal matching pursuit: after each step the values are the least-squares ones.

What is kept is the inverse Cholesky factor B [k, k] of the support's Gram matrix G: row j of B
combines atoms to the j-th vector of an orthonormal basis of their span, so B G B^T = 1 and
G^-1 = B^T B. An atom that joins adds a row (as in a Cholesky update), one that leaves is turned
out by a reflection; both are products of k^2 numbers, no triangular system is solved.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxdict.devices import FULL_PRECISION
from jaxdict.pursuit.step import Rule, Slots, Support, floor, quotient


def propose(
    slots: Slots,
    gradient: Float[Array, " k"],
    memory: Float[Array, "k k"],
    support: Support,
    *,
    signed: bool,
) -> tuple[Float[Array, " k"], Float[Array, "k k"]]:
    """The least-squares values on the support, non-negative ones unless signed.

    values <- values + G^-1 g; because g holds the whole gradient, also what rounding left on the
    atoms of earlier steps, each step also repairs the ones before. An atom that is a combination
    of the support up to rounding is refused. See `Rule.propose` for arguments and result.

    Non-negative: on the way from the old values to the least-squares ones, the first coefficient
    to reach zero stops the move and leaves; the rest is solved again (the inner loop of Lawson
    and Hanson), until all are positive. Every part of the way lowers the residual.
    """
    basis = enter(memory, support.products(), support.t, gradient[support.t] != 0)
    target = slots.values + solve(basis, gradient)
    if signed:
        return target, basis

    def blocked(state: tuple) -> Array:
        _, _, target, basis = state
        return jnp.any(held(basis) & (target <= 0))

    def shrink(state: tuple) -> tuple:
        values, gradient, target, basis = state
        down = held(basis) & (target <= 0)
        share = jnp.where(down, quotient(values, values - target), jnp.inf)
        first = jnp.argmin(share)
        least = share[first]
        values = jnp.maximum(values + least * (target - values), 0)
        values = jnp.where(jnp.arange(values.shape[0]) == first, 0, values)
        # G (target - values) = g on the support, so that much of the gradient is used up.
        gradient = (1 - least) * gradient
        basis = leave(basis, first)
        return values, gradient, values + solve(basis, gradient), basis

    values = jnp.where(held(basis), slots.values, 0)
    state = lax.while_loop(blocked, shrink, (values, gradient, target, basis))
    return jnp.where(held(state[3]), state[2], 0), state[3]


def enter(
    basis: Float[Array, "k k"], products: Float[Array, " k"], t: Int[Array, ""], joins: Array
) -> Float[Array, "k k"]:
    """The basis with the part of slot t's atom that is orthogonal to it, if that is more than rounding.

    Args:
        basis: float [k, k]; row and column t are zero.
        products: float [k], of the new atom with the atoms of the support.
        t: its slot.
        joins: whether there is a new atom at all.
    """
    along = jnp.dot(basis, products, precision=FULL_PRECISION)
    left = 1 - jnp.dot(along, along, precision=FULL_PRECISION)
    there = jnp.arange(basis.shape[0]) == t
    row = jnp.where(there, 1, 0) - jnp.dot(along, basis, precision=FULL_PRECISION)
    fits = joins & (left > floor(basis.dtype))
    row = jnp.where(fits, row / jnp.sqrt(jnp.where(fits, left, 1)), 0)
    return jnp.where(there[:, None], row, basis)


def leave(basis: Float[Array, "k k"], slot: Int[Array, ""]) -> Float[Array, "k k"]:
    """The basis of the support without one slot's atom.

    A reflection of the basis leaves that atom in one row alone, which is dropped.
    """
    there = jnp.arange(basis.shape[0]) == slot
    column = basis[:, slot]
    size = jnp.linalg.norm(column)
    mirror = column + jnp.where(there, jnp.where(column[slot] < 0, -size, size), 0)
    share = quotient(jnp.asarray(2, basis.dtype), jnp.dot(mirror, mirror))
    turned = (
        basis - share * mirror[:, None] * jnp.dot(mirror, basis, precision=FULL_PRECISION)[None, :]
    )
    return jnp.where(there[:, None] | there[None, :], 0, turned)


def solve(basis: Float[Array, "k k"], right: Float[Array, " k"]) -> Float[Array, " k"]:
    """G^-1 right, on the support."""
    inner = jnp.dot(basis, right, precision=FULL_PRECISION)
    return jnp.dot(inner, basis, precision=FULL_PRECISION)


def held(basis: Float[Array, "k k"]) -> Bool[Array, " k"]:
    """Which slots' atoms the basis is made of."""
    return jnp.any(basis != 0, axis=0)


RULE = Rule(propose, remembers=True)
