"""The Gram form of every pursuit: coefficient space, no product with the atoms after the first.

    c = x @ atoms.T once;   correlations of the residual = c - sum_j values_j gram[indices_j]

State a row: k slots, the correlations [m], and the [k, k] Gram matrix of the support. Work: two
products (one for all rows, one for the Gram matrix, which many rows share) and then reads of at
most k Gram rows a step (of one, where one value moves a step). The form for many rows on atoms
whose Gram matrix fits in memory. Over devices, each holds the columns of its atoms.

The squared residual norm is followed by subtraction, 1 - sum of decreases, so in float32 it is
good to about 1e-7 of the row's squared norm: `tol` below 1e-3 wants the residual form.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdict.codes import combine
from jaxdict.devices import FULL_PRECISION
from jaxdict.pursuit.atoms import PreparedAtoms
from jaxdict.pursuit.selection import select_atom
from jaxdict.pursuit.sharded import at
from jaxdict.pursuit.step import Options, Slots, Support, finish, moved, repeat, run, shorten


def pursue(
    x: Float[Array, "n d"],
    slots: Slots,
    atoms: PreparedAtoms,
    k: int,
    options: Options,
) -> Slots:
    """Run up to k steps on unit rows; stops early when no row is running.

    Args:
        x: rows of unit norm (or zero).
        slots: their states before the first step, batched over n.
        atoms: prepared atoms, those of this device, with their columns of the Gram matrix.
        k: steps.
        options: the rule, signs, tolerance and mesh axis.
    """
    gram = atoms.gram
    rule, signed, tol, axis = options
    assert gram is not None
    n, dtype = len(x), x.dtype
    start = jnp.dot(x, atoms.unit.T, precision=FULL_PRECISION)

    def step(
        t: Array,
        start: Array,
        slots: Slots,
        inner: Array,
        squared: Array,
        correlations: Array,
        memory: Array,
    ) -> tuple[Slots, Array, Array, Array, Array]:
        slots, gradient = select_atom(slots, correlations, t, signed=signed, axis=axis)
        if not rule.single:
            row = gram.at[slots.indices[t]].get(mode="promise_in_bounds")
            new = at(row, slots.indices, axis)
            inner = inner.at[t].set(new).at[:, t].set(new)

        def energy(weights: Array) -> Array:
            return jnp.dot(weights, jnp.dot(inner, weights, precision=FULL_PRECISION))

        support = Support(t, energy, lambda: inner[t])
        proposed, memory = rule.propose(slots, gradient, memory, support, signed=signed)
        change = proposed - slots.values
        along = jnp.dot(gradient, change)
        used = jnp.dot(change, change) if rule.single else energy(change)
        share = shorten(along, used)
        values = jnp.where(share == 1, proposed, slots.values + share * change)
        decrease = share * (2 * along - share * used)
        squared = jnp.maximum(squared - decrease, 0)
        done = finish(slots, values, decrease, jnp.sqrt(squared), tol)
        if rule.single:
            after = correlations - combine(*moved(slots, done.values), gram)
        else:
            after = start - combine(done.values, done.indices, gram, t + 1)
        return done, inner, squared, after, memory

    inner = jnp.zeros((n, *((0, 0) if rule.single else (k, k))), dtype)
    memory = repeat(rule.memory(k, dtype), n)
    return run(step, k, slots, inner, jnp.ones(n, dtype), start, memory, given=start)
