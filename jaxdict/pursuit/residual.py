"""The residual form of every pursuit: one product residual @ atoms.T a step.

State a row: k slots and the residual [d]. Work: k products [n, d] x [d, m]. Nothing is computed
for the atoms in advance, so this is the form for few rows, very many atoms, or narrow rows. The
residual is recomputed from the codes at each step and does not drift (where one value moves a
step, it is followed instead, one atom a step).
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxdict.devices import FULL_PRECISION
from jaxdict.pursuit.atoms import PreparedAtoms
from jaxdict.pursuit.selection import select_atom
from jaxdict.pursuit.sharded import mixture, products
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
        atoms: prepared atoms, those of this device; their Gram matrix is not used.
        k: steps.
        options: the rule, signs, tolerance and mesh axis.
    """
    unit = atoms.unit
    rule, signed, tol, axis = options

    def step(
        t: Array, row: Array, slots: Slots, residual: Array, memory: Array
    ) -> tuple[Slots, Array, Array]:
        correlations = jnp.dot(residual, unit.T, precision=FULL_PRECISION)
        slots, gradient = select_atom(slots, correlations, t, signed=signed, axis=axis)

        def energy(weights: Array) -> Array:
            direction = mixture(weights, slots.indices, unit, slots=t + 1, axis=axis)
            return jnp.dot(direction, direction)

        def with_new() -> Array:
            atom = mixture(jnp.ones(1, unit.dtype), slots.indices[t][None], unit, axis=axis)
            return products(atom, slots.indices, unit, slots=t + 1, axis=axis)

        support = Support(t, energy, with_new)
        proposed, memory = rule.propose(slots, gradient, memory, support, signed=signed)
        if rule.single:
            after = residual - mixture(*moved(slots, proposed), unit, axis=axis)
        else:
            after = row - mixture(proposed, slots.indices, unit, slots=t + 1, axis=axis)
        change = residual - after
        along, used = jnp.dot(residual, change), jnp.dot(change, change)
        share = shorten(along, used)
        values = jnp.where(share == 1, proposed, slots.values + share * (proposed - slots.values))
        after = jnp.where(share == 1, after, residual - share * change)
        decrease = share * (2 * along - share * used)
        done = finish(slots, values, decrease, jnp.linalg.norm(after), tol)
        # A row that stopped keeps its residual along with its values.
        return done, jnp.where(done.steps > slots.steps, after, residual), memory

    return run(step, k, slots, x, repeat(rule.memory(k, x.dtype), len(x)), given=x)
