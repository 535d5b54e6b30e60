"""`gradient_pursuit`: the one verb, whatever the method."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import index
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdict.codes import Codes, decode, sort_slots
from jaxdict.pursuit import gram, residual
from jaxdict.pursuit.atoms import PreparedAtoms, prepare_atoms, safe_norm, unit_rows
from jaxdict.pursuit.step import RUNNING, Slots, Status, empty_slots

Method = Literal["auto", "residual", "gram"]
METHODS = {"residual": residual.pursue, "gram": gram.pursue}

# The rule of `choose_method`; see there for what the two numbers are.
GRAM_READ = 12.0
GRAM_BYTES = 1 << 30


class PursuitResult(NamedTuple):
    """Codes of n rows and how each row fared.

    Attributes:
        indices: int32 [n, k], sorted by |value|, largest first; 0 in an empty slot.
        values: float [n, k], in units of the atoms as given; 0 in an empty slot.
        residual_norm: float [n], ||x - x_hat|| computed from the final codes; NaN for a row that
            is not finite.
        steps: int32 [n], steps taken (at most k).
        status: int32 [n], a `Status`; `STATUS` says each in words.
    """

    indices: Int[Array, "n k"]
    values: Float[Array, "n k"]
    residual_norm: Float[Array, " n"]
    steps: Int[Array, " n"]
    status: Int[Array, " n"]

    @property
    def codes(self) -> Codes:
        """The codes alone."""
        return Codes(self.indices, self.values)


def choose_method(n: int, d: int, m: int, k: int, *, tol: float = 0.0, itemsize: int = 4) -> str:
    """The rule behind `method="auto"`: the cheaper form by a count of work.

    In units of one multiply-add of a matrix product, a step of a row costs d m in the residual
    form, and in the Gram form k / 2 Gram rows of m numbers to read, GRAM_READ each; the Gram form
    also pays (n + m) d m once:

        residual  n k d m          gram  (n + m) d m + n k^2 m GRAM_READ / 2

    The residual form is taken besides when the Gram matrix takes more than GRAM_BYTES, and when
    tol is finer than the Gram form can see in float32 (1e-3).

    Args:
        n: rows.
        d: width.
        m: atoms.
        k: steps.
        tol: stopping residual norm, relative to the row's.
        itemsize: bytes of a number.

    Returns:
        "residual" or "gram".
    """
    if m * m * itemsize > GRAM_BYTES or (0 < tol < 1e-3 and itemsize < 8):
        return "residual"
    return "gram" if (n + m) * d + n * k * k * GRAM_READ / 2 < n * k * d else "residual"


def gradient_pursuit(
    x: ArrayLike,
    atoms: ArrayLike | PreparedAtoms,
    k: int,
    *,
    method: Method = "auto",
    signed: bool = False,
    tol: float = 0.0,
    memory_mb: int = 512,
) -> PursuitResult:
    """Sparse codes of rows by (non-negative) gradient pursuit: at most k atoms a row.

    Each of k steps takes in the atom with the largest inner product with the residual r, then
    moves along the gradient on the support S with the exact step size and clips at zero:

        S <- S + argmax_j <atom_j, r>;   g = atoms_S r;   a = <g, g> / ||sum g_j atom_j||^2
        values_S <- max(0, values_S + a g);   r <- x - sum_j values_j atom_j

    Args:
        x: [n, d] rows, any scale; bfloat16 is accepted. Computed in float32 (float64 if x is).
        atoms: [m, d], any norm (scaled inside, values are in units of the atoms as given), or
            the result of `prepare_atoms`. Zero atoms are never used.
        k: steps, and slots of the result. May exceed m or d.
        method: "residual", "gram" (the same answer up to rounding), or "auto", see
            `choose_method`. With prepared atoms auto means gram when they carry a Gram matrix.
        signed: allow negative coefficients; the largest |inner product| is then chosen.
        tol: a row stops once ||r|| <= tol ||x||.
        memory_mb: rows go in chunks so that the state takes about this much memory, in MB.

    Returns:
        A `PursuitResult`. The residual norm never grows from one step to the next.

    Raises:
        ValueError: shapes that do not fit, k < 1, tol outside [0, 1), an unknown method, atoms
            that are not finite. A row that is not finite is no error: see its status.

    Example:
        >>> import jax.numpy as jnp
        >>> result = gradient_pursuit(jnp.array([[3.0, 0.0, 1.0]]), jnp.eye(3), k=2)
        >>> result.indices.tolist(), result.values.tolist()
        ([[0, 2]], [[3.0, 1.0]])

    Source: Blumensath and Davies, Gradient Pursuits (IEEE TSP 2008); the non-negative form
        follows arXiv 2505.24360 and 2505.17769.

    Deviations: where clipping would make the residual grow, the best part of the step is taken;
        a row stops when no inner product exceeds rounding; an atom joins only if its inner
        product is positive (signed: not zero).
    """
    k = _check_k(k)
    rows = jnp.asarray(x)
    prepared = atoms if isinstance(atoms, PreparedAtoms) else None
    shape = jnp.shape(atoms.unit if isinstance(atoms, PreparedAtoms) else atoms)
    if rows.ndim != 2 or len(shape) != 2 or rows.shape[1] != shape[1]:
        raise ValueError(
            f"expected x [n, d] and atoms [m, d] of one width d, got {list(rows.shape)} and "
            f"{list(shape)}; give rows and atoms as rows"
        )
    if not 0 <= tol < 1:
        raise ValueError(f"tol: expected a share of the row's norm in [0, 1), got {tol}")
    if memory_mb < 1:
        raise ValueError(f"memory_mb: expected at least 1, got {memory_mb}")
    if method not in ("auto", *METHODS):
        raise ValueError(f"method: expected auto, {', '.join(METHODS)}, got {method!r}")
    if jnp.issubdtype(rows.dtype, jnp.complexfloating):
        raise TypeError(f"x: expected real numbers, got {rows.dtype}")
    (n, d), m = rows.shape, shape[0]
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    if method == "auto" and prepared is not None:
        method = "residual" if prepared.gram is None else "gram"
    elif method == "auto":
        method = choose_method(n, d, m, k, tol=tol, itemsize=dtype.itemsize)  # type: ignore[assignment]
    if prepared is None:
        prepared = prepare_atoms(jnp.asarray(atoms).astype(dtype), gram=method == "gram")
    elif method == "gram" and prepared.gram is None:
        raise ValueError("method gram: expected atoms prepared with gram=True, got gram=False")
    if method == "residual":
        prepared = prepared._replace(gram=None)
    chunk = _chunk_rows(n, d, m, k, dtype.itemsize, memory_mb)
    return _solve(rows, prepared, float(tol), k=k, method=method, signed=bool(signed), chunk=chunk)


def _check_k(k: int) -> int:
    try:
        steps = index(k)
    except TypeError:
        raise TypeError(f"k: expected a whole number, got {k!r}") from None
    if steps < 1:
        raise ValueError(f"k: expected at least 1 atom a row, got {steps}")
    return steps


def _chunk_rows(n: int, d: int, m: int, k: int, itemsize: int, memory_mb: int) -> int:
    """Rows a chunk, so that its state (about 4 m + 6 d + k^2 numbers a row) fits; evenly filled."""
    most = max(1, (memory_mb << 20) // ((4 * m + 6 * d + k * k) * itemsize))
    chunks = max(1, -(-n // most))
    return max(1, -(-n // chunks))


@partial(jax.jit, static_argnames=("k", "method", "signed", "chunk"))
def _solve(
    x: Float[Array, "n d"],
    atoms: PreparedAtoms,
    tol: Array | float,
    *,
    k: int,
    method: str,
    signed: bool,
    chunk: int,
) -> PursuitResult:
    n, d = x.shape
    pursue = partial(METHODS[method], atoms=atoms, k=k, signed=signed, tol=tol)
    solve = partial(_solve_chunk, atoms=atoms, k=k, pursue=pursue)
    if chunk >= n:
        return solve(x)
    padded = jnp.pad(x, ((0, -n % chunk), (0, 0))).reshape(-1, chunk, d)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], lax.map(solve, padded))


def _solve_chunk(
    x: Float[Array, "n d"], *, atoms: PreparedAtoms, k: int, pursue: Callable[..., Slots]
) -> PursuitResult:
    """Rows to unit norm, pursuit, and codes back in units of the atoms as given."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(dtype)
    finite = jnp.all(jnp.isfinite(x), axis=1)
    unit, norm = unit_rows(jnp.where(finite[:, None], x, 0))
    slots = jax.vmap(partial(empty_slots, k=k, dtype=dtype))(finite, norm == 0)
    slots = pursue(unit, slots)
    status = jnp.where(slots.status == RUNNING, Status.FULL, slots.status)
    left = safe_norm(unit - decode(Codes(slots.indices, slots.values), atoms.unit))
    scale = atoms.norm.at[slots.indices].get(mode="promise_in_bounds")
    values = slots.values / jnp.where(scale > 0, scale, 1) * norm[:, None]
    codes = sort_slots(slots.indices, values)
    left = jnp.where(finite, left * norm, jnp.nan)
    return PursuitResult(codes.indices, codes.values, left, slots.steps, status)
