"""Gradient pursuit in the residual form: one product residual @ atoms.T a step.

State a row: k slots and the residual [d]. Work: k products [n, d] x [d, m]. Nothing is computed
for the atoms in advance, so this is the form for few rows, very many atoms, or narrow rows. The
residual is recomputed from the codes at each step and does not drift.
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
        atoms: prepared atoms; their Gram matrix is not used.
        k: steps.
        signed: whether negative coefficients are allowed.
        tol: a row stops when its residual norm is at most this.
    """

    def step(t: Array, row: Array, slots: Slots, residual: Array) -> tuple[Slots, Array]:
        correlations = jnp.dot(residual, atoms.unit.T, precision=PRECISION)
        slots, gradient = join(slots, correlations, t, signed)
        direction = combine(gradient, slots.indices, atoms.unit, t + 1)
        proposed = propose(slots, gradient, jnp.dot(direction, direction), signed)
        after = row - combine(proposed, slots.indices, atoms.unit, t + 1)
        change = residual - after
        along, energy = jnp.dot(residual, change), jnp.dot(change, change)
        share = shorten(along, energy)
        values = jnp.where(share == 1, proposed, slots.values + share * (proposed - slots.values))
        after = jnp.where(share == 1, after, residual - share * change)
        decrease = share * (2 * along - share * energy)
        done = finish(slots, values, decrease, jnp.linalg.norm(after), tol)
        # A row that stopped keeps its residual along with its values.
        moved = done.steps > slots.steps
        return done, jnp.where(moved, after, residual)

    return run(step, k, slots, x, given=x)
