"""What a pursuit needs to know about the atoms, computed once and used for any number of rows."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, ArrayLike, Float

from jaxdict.devices import FEATURES, FULL_PRECISION


class PreparedAtoms(NamedTuple):
    """Atoms scaled to unit norm, with their norms and, for the Gram form, their inner products.

    Attributes:
        unit: float [m, d], atoms / norm; a zero atom stays zero (and is never chosen).
        norm: float [m], norm of each atom as given; values are divided by it at the end.
        gram: float [m, m], unit @ unit.T, or None.
    """

    unit: Float[Array, "m d"]
    norm: Float[Array, " m"]
    gram: Float[Array, "m m"] | None

    @property
    def m(self) -> int:
        """Number of atoms."""
        return int(self.unit.shape[0])

    @property
    def d(self) -> int:
        """Width of a row."""
        return int(self.unit.shape[1])


def safe_norm(x: Array) -> Array:
    """Euclidean norm over the last axis that neither overflows nor underflows in between."""
    largest = jnp.max(jnp.abs(x), axis=-1, initial=0)
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    scaled = x / scale[..., None]
    return scale * jnp.sqrt(jnp.sum(scaled * scaled, axis=-1))


def unit_rows(x: Float[Array, "n d"]) -> tuple[Float[Array, "n d"], Float[Array, " n"]]:
    """Rows scaled to unit norm, and their norms; a zero row stays zero."""
    norm = safe_norm(x)
    return x / jnp.where(norm > 0, norm, 1)[:, None], norm


def prepare_atoms(
    atoms: ArrayLike, *, gram: bool = False, mesh: Mesh | None = None
) -> PreparedAtoms:
    """Check and scale atoms once, so that many calls of a pursuit need not.

    Args:
        atoms: float [m, d], of any scale; computed in float32 (float64 stays float64).
        gram: also compute the [m, m] Gram matrix that `method="gram"` works with:
            2 m m d operations and m m numbers of memory, once.
        mesh: devices to compute on and to leave the result on, each with its atoms and its
            columns of the Gram matrix, if m splits evenly over the axis features.

    Returns:
        Prepared atoms, to be given to a pursuit in place of the atoms.

    Raises:
        ValueError: not [m, d] with m, d >= 1, or not finite.
    """
    array = jnp.asarray(atoms)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"atoms: expected a shape [m, d] with m, d >= 1, got {list(array.shape)}; "
            "give one atom a row"
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"atoms: expected real numbers, got {array.dtype}")
    prepared = _prepare(array, gram, mesh)
    if not isinstance(prepared.norm, Tracer):
        bad = ~jnp.isfinite(prepared.norm)
        if bad.any():
            raise ValueError(
                f"atoms: expected finite numbers, found NaN or infinity in {int(bad.sum())} of "
                f"{prepared.m} atoms, the first at {int(jnp.argmax(bad))}; drop those atoms"
            )
    return prepared


@partial(jax.jit, static_argnames=("gram", "mesh"))
def _prepare(atoms: Array, gram: bool, mesh: Mesh | None) -> PreparedAtoms:
    unit, norm = unit_rows(atoms.astype(jnp.promote_types(atoms.dtype, jnp.float32)))
    whole = jnp.dot(unit, unit.T, precision=FULL_PRECISION) if gram else None
    prepared = PreparedAtoms(unit, norm, whole)
    if mesh is None or len(unit) % mesh.shape.get(FEATURES, len(unit) + 1):
        return prepared

    def place(array: Array, *spec: str | None) -> Array:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return lax.with_sharding_constraint(array, sharding)

    return PreparedAtoms(
        place(unit, FEATURES),
        place(norm, FEATURES),
        None if whole is None else place(whole, None, FEATURES),
    )
