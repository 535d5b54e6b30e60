"""What the three pursuits share around their steps: checks, scales, chunks of rows, devices."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import index
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, ArrayLike, Float, Int

from jaxdict.codes import Codes, sort_slots
from jaxdict.devices import DATA, FEATURES
from jaxdict.pursuit import gradient, gram, matching, orthogonal, residual
from jaxdict.pursuit.atoms import PreparedAtoms, prepare_atoms, safe_norm, unit_rows
from jaxdict.pursuit.auto import choose_method
from jaxdict.pursuit.sharded import at, mixture
from jaxdict.pursuit.step import RUNNING, Options, Slots, Status, empty_slots

Method = Literal["auto", "residual", "gram"]
METHODS = {"residual": residual.pursue, "gram": gram.pursue}
RULES = {"gradient": gradient.RULE, "matching": matching.RULE, "orthogonal": orthogonal.RULE}


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


def pursue(
    x: ArrayLike,
    atoms: ArrayLike | PreparedAtoms,
    k: int,
    *,
    rule: str,
    method: Method,
    signed: bool,
    tol: float,
    memory_mb: int,
    mesh: Mesh | None,
) -> PursuitResult:
    """Any of the pursuits; arguments as in `gradient_pursuit`, and the name of the rule."""
    k = _check_k(k)
    rows = jnp.asarray(x)
    prepared = atoms if isinstance(atoms, PreparedAtoms) else None
    shape = jnp.shape(atoms.unit if isinstance(atoms, PreparedAtoms) else atoms)
    _check(rows, shape, mesh)
    _check_options(method, tol, memory_mb)
    (n, d), m = rows.shape, shape[0]
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    if method == "auto" and prepared is not None:
        method = "residual" if prepared.gram is None else "gram"
    elif method == "auto":
        parts = 1 if mesh is None else mesh.shape.get(FEATURES, 1)
        # One Gram row, and the row's correlations in and out.
        reads = 3 if RULES[rule].single else None
        work = {"tol": tol, "itemsize": dtype.itemsize, "reads": reads, "parts": parts}
        method = choose_method(n, d, m, k, **work)  # type: ignore[assignment]
    if prepared is None:
        given = jnp.asarray(atoms).astype(dtype)
        prepared = prepare_atoms(given, gram=method == "gram", mesh=mesh)
    elif method == "gram" and prepared.gram is None:
        raise ValueError("method gram: expected atoms prepared with gram=True, got gram=False")
    if method == "residual":
        prepared = prepared._replace(gram=None)
    own_n, own_m = (-(-size // part) for size, part in zip((n, m), _parts(mesh), strict=True))
    row_bytes = (4 * own_m + 6 * d + 2 * k * k) * dtype.itemsize
    chunk = _chunk_rows(own_n, (memory_mb << 20) // row_bytes)
    static = _Static(k, rule, method, bool(signed), chunk, mesh)
    return _solve(rows, prepared, float(tol), static)


def _check(rows: Array, shape: tuple[int, ...], mesh: Mesh | None) -> None:
    if rows.ndim != 2 or len(shape) != 2 or rows.shape[1] != shape[1]:
        raise ValueError(
            f"expected x [n, d] and atoms [m, d] of one width d, got {list(rows.shape)} and "
            f"{list(shape)}; give rows and atoms as rows"
        )
    if jnp.issubdtype(rows.dtype, jnp.complexfloating):
        raise TypeError(f"x: expected real numbers, got {rows.dtype}")
    if mesh is not None and not set(mesh.axis_names) <= {DATA, FEATURES}:
        raise ValueError(
            f"mesh: expected the axes {DATA} and {FEATURES} at most, got "
            f"{', '.join(mesh.axis_names)}; name them so"
        )


def _check_options(method: str, tol: float, memory_mb: int) -> None:
    if not 0 <= tol < 1:
        raise ValueError(f"tol: expected a share of the row's norm in [0, 1), got {tol}")
    if memory_mb < 1:
        raise ValueError(f"memory_mb: expected at least 1, got {memory_mb}")
    if method not in ("auto", *METHODS):
        raise ValueError(f"method: expected auto, {', '.join(METHODS)}, got {method!r}")


def _check_k(k: int) -> int:
    try:
        steps = index(k)
    except TypeError:
        raise TypeError(f"k: expected a whole number, got {k!r}") from None
    if steps < 1:
        raise ValueError(f"k: expected at least 1 atom a row, got {steps}")
    return steps


def _parts(mesh: Mesh | None) -> tuple[int, int]:
    """Devices that share the rows, and the atoms."""
    if mesh is None:
        return 1, 1
    return mesh.shape.get(DATA, 1), mesh.shape.get(FEATURES, 1)


def _chunk_rows(n: int, most: int) -> int:
    """Rows a chunk: as few chunks as `most` rows each allow, evenly filled."""
    chunks = max(1, -(-n // max(1, most)))
    return max(1, -(-n // chunks))


class _Static(NamedTuple):
    """What a pursuit is compiled for, beside shapes.

    Attributes:
        k: steps.
        rule: name of the rule.
        method: name of the form.
        signed: whether negative coefficients are allowed.
        chunk: rows that are solved at a time.
        mesh: devices to split rows and atoms over, if any.
    """

    k: int
    rule: str
    method: str
    signed: bool
    chunk: int
    mesh: Mesh | None


@partial(jax.jit, static_argnames=("static",))
def _solve(
    x: Float[Array, "n d"], atoms: PreparedAtoms, tol: Array | float, static: _Static
) -> PursuitResult:
    def solve(
        x: Array, atoms: PreparedAtoms, tol: Array | float, axis: str | None = None
    ) -> PursuitResult:
        options = Options(RULES[static.rule], static.signed, tol, axis)
        steps = partial(METHODS[static.method], atoms=atoms, k=static.k, options=options)
        chunk = partial(_solve_chunk, atoms=atoms, steps=steps, k=static.k, axis=axis)
        return _in_chunks(x, chunk, static.chunk)

    mesh = static.mesh
    if mesh is None:
        return solve(x, atoms, tol)
    # Zero rows stop at once and zero atoms never join: any n and m can be split evenly.
    (n, _), (data, features) = x.shape, _parts(mesh)
    more = -atoms.m % features
    atoms = PreparedAtoms(
        jnp.pad(atoms.unit, ((0, more), (0, 0))),
        jnp.pad(atoms.norm, (0, more)),
        None if atoms.gram is None else jnp.pad(atoms.gram, ((0, 0), (0, more))),
    )
    by_row = PartitionSpec(DATA if DATA in mesh.axis_names else None)
    name = FEATURES if FEATURES in mesh.axis_names else None
    by_atom = PreparedAtoms(
        PartitionSpec(name),  # pyright: ignore[reportArgumentType]
        PartitionSpec(name),  # pyright: ignore[reportArgumentType]
        None if atoms.gram is None else PartitionSpec(None, name),  # pyright: ignore[reportArgumentType]
    )
    split = jax.shard_map(
        partial(solve, axis=name if features > 1 else None),
        mesh=mesh,
        in_specs=(by_row, by_atom, PartitionSpec()),
        out_specs=by_row,
        check_vma=False,
    )
    found = split(jnp.pad(x, ((0, -n % data), (0, 0))), atoms, tol)
    return jax.tree.map(lambda a: a[:n], found)


def _in_chunks(
    x: Float[Array, "n d"], solve: Callable[[Array], PursuitResult], chunk: int
) -> PursuitResult:
    """Solve so many rows at a time; the last chunk is filled up with zero rows, which stop at once."""
    n, d = x.shape
    if chunk >= n:
        return solve(x)
    padded = jnp.pad(x, ((0, -n % chunk), (0, 0))).reshape(-1, chunk, d)
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:])[:n], lax.map(solve, padded))


def _solve_chunk(
    x: Float[Array, "n d"],
    *,
    atoms: PreparedAtoms,
    steps: Callable[[Array, Slots], Slots],
    k: int,
    axis: str | None,
) -> PursuitResult:
    """Rows to unit norm, pursuit, and codes back in units of the atoms as given."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x = x.astype(dtype)
    finite = jnp.all(jnp.isfinite(x), axis=1)
    unit, norm = unit_rows(jnp.where(finite[:, None], x, 0))
    slots = jax.vmap(partial(empty_slots, k=k, dtype=dtype))(finite, norm == 0)
    slots = steps(unit, slots)
    status = jnp.where(slots.status == RUNNING, Status.FULL, slots.status)
    rebuilt = jax.vmap(lambda v, i: mixture(v, i, atoms.unit, axis=axis))
    left = safe_norm(unit - rebuilt(slots.values, slots.indices))
    scale = jax.vmap(lambda i: at(atoms.norm, i, axis))(slots.indices)
    values = slots.values / jnp.where(scale > 0, scale, 1) * norm[:, None]
    codes = sort_slots(slots.indices, values)
    left = jnp.where(finite, left * norm, jnp.nan)
    return PursuitResult(codes.indices, codes.values, left, slots.steps, status)
