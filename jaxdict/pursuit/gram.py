"""Gradient pursuit in the Gram form: coefficient space, no product with the atoms after the first.

    c = x @ atoms.T once;   correlations of the residual = c - sum_j values_j gram[indices_j]

State a row: k slots, the correlations [m], and the [k, k] Gram matrix of the support. Work: two
products (one for all rows, one for the Gram matrix, which many rows share) and then reads of at
most k Gram rows a step. The form for many rows on atoms whose Gram matrix fits in memory.

The squared residual norm is followed by subtraction, 1 - sum of decreases, so in float32 it is
good to about 1e-7 of the row's squared norm: `tol` below 1e-3 wants the residual form.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdict.codes import combine
from jaxdict.pursuit.atoms import PRECISION, PreparedAtoms
from jaxdict.pursuit.step import Slots, finish, join, propose, run, shorten


def pursue(
    x: Float[Array, "n d"],
    slots: Slots,
    atoms: PreparedAtoms,
    k: int,
    *,
    signed: bool,
    tol: Array | float,
) -> Slots:
    """Run up to k steps on unit rows; stops early when no row is running.

    Args:
        x: rows of unit norm (or zero).
        slots: their states before the first step, batched over n.
        atoms: prepared atoms with their Gram matrix.
        k: steps.
        signed: whether negative coefficients are allowed.
        tol: a row stops when its residual norm is at most this.
    """
    gram = atoms.gram
    assert gram is not None
    n = len(x)
    start = jnp.dot(x, atoms.unit.T, precision=PRECISION)

    def step(
        t: Array, start: Array, slots: Slots, support: Array, squared: Array, correlations: Array
    ) -> tuple[Slots, Array, Array, Array]:
        slots, gradient = join(slots, correlations, t, signed)
        new = gram.at[slots.indices[t], slots.indices].get(mode="promise_in_bounds")
        support = support.at[t].set(new).at[:, t].set(new)
        along_gradient = jnp.dot(support, gradient, precision=PRECISION)
        proposed = propose(slots, gradient, jnp.dot(gradient, along_gradient), signed)
        change = proposed - slots.values
        along = jnp.dot(gradient, change)
        energy = jnp.dot(change, jnp.dot(support, change, precision=PRECISION))
        share = shorten(along, energy)
        values = jnp.where(share == 1, proposed, slots.values + share * change)
        decrease = share * (2 * along - share * energy)
        squared = jnp.maximum(squared - decrease, 0)
        done = finish(slots, values, decrease, jnp.sqrt(squared), tol)
        after = start - combine(done.values, done.indices, gram, t + 1)
        return done, support, squared, after

    support, squared = jnp.zeros((n, k, k), x.dtype), jnp.ones(n, x.dtype)
    return run(step, k, slots, support, squared, start, given=start)
