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
from jaxdict.pursuit.split import join, mixture, products
from jaxdict.pursuit.step import Rule, Slots, Support, finish, moved, repeat, run, shorten


def pursue(
    x: Float[Array, "n d"],
    slots: Slots,
    atoms: PreparedAtoms,
    k: int,
    *,
    rule: Rule,
    signed: bool,
    tol: Array | float,
    axis: str | None = None,
) -> Slots:
    """Run up to k steps on unit rows; stops early when no row is running.

    Args:
        x: rows of unit norm (or zero).
        slots: their states before the first step, batched over n.
        atoms: prepared atoms, those of this device; their Gram matrix is not used.
        k: steps.
        rule: how values move.
        signed: whether negative coefficients are allowed.
        tol: a row stops when its residual norm is at most this.
        axis: mesh axis along which the atoms are split, if they are.
    """
    unit = atoms.unit

    def step(
        t: Array, row: Array, slots: Slots, residual: Array, memory: Array
    ) -> tuple[Slots, Array, Array]:
        correlations = jnp.dot(residual, unit.T, precision=FULL_PRECISION)
        slots, gradient = join(slots, correlations, t, signed, axis)

        def energy(weights: Array) -> Array:
            direction = mixture(weights, slots.indices, unit, t + 1, axis)
            return jnp.dot(direction, direction)

        def with_new() -> Array:
            atom = mixture(jnp.ones(1, unit.dtype), slots.indices[t][None], unit, None, axis)
            return products(atom, slots.indices, unit, t + 1, axis)

        proposed, memory = rule.propose(
            slots, gradient, t, memory, Support(energy, with_new), signed
        )
        if rule.single:
            after = residual - mixture(*moved(slots, proposed), unit, None, axis)
        else:
            after = row - mixture(proposed, slots.indices, unit, t + 1, axis)
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
