"""The three pursuits. One signature, one result; how values move is the difference."""

from __future__ import annotations

from jax.sharding import Mesh
from jaxtyping import ArrayLike

from jaxdict.pursuit.atoms import PreparedAtoms
from jaxdict.pursuit.solve import Method, PursuitResult, pursue


def gradient_pursuit(
    x: ArrayLike,
    atoms: ArrayLike | PreparedAtoms,
    k: int,
    *,
    method: Method = "auto",
    signed: bool = False,
    tol: float = 0.0,
    memory_mb: int = 512,
    mesh: Mesh | None = None,
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
        memory_mb: rows go in chunks so that the state takes about this much memory, in MB (of
            each device).
        mesh: devices with axes data (rows are split over it) and features (atoms are), either
            of which may be left out; any n and m will do. None for one device.

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
    options = {"method": method, "signed": signed, "tol": tol, "memory_mb": memory_mb}
    return pursue(x, atoms, k, rule="gradient", mesh=mesh, **options)


def matching_pursuit(
    x: ArrayLike,
    atoms: ArrayLike | PreparedAtoms,
    k: int,
    *,
    method: Method = "auto",
    signed: bool = False,
    tol: float = 0.0,
    memory_mb: int = 512,
    mesh: Mesh | None = None,
) -> PursuitResult:
    """Sparse codes of rows by matching pursuit: one coefficient moves a step.

    The best atom outside the support and those inside are candidates; of each coefficient's
    exact step, clipped at zero unless signed, the one that lowers the residual r the most is taken:

        c_j = max(<atom_j, r>, -values_j)      (signed: <atom_j, r>)
        j = argmax c_j (2 <atom_j, r> - c_j);  values_j <- values_j + c_j;   r <- r - c_j atom_j

    The cheapest of the three a step, and the one with the largest error. A step may move an atom
    that is there already, so that fewer than k atoms may be used.

    Args:
        x: as in `gradient_pursuit`, like all that follow.
        atoms: [m, d], or prepared.
        k: steps, and slots of the result.
        method: "residual", "gram" or "auto".
        signed: allow negative coefficients: matching pursuit as published.
        tol: a row stops once ||r|| <= tol ||x||.
        memory_mb: about how much memory the state of a chunk of rows may take.
        mesh: devices to split rows and atoms over.

    Returns:
        A `PursuitResult`. The residual norm never grows from one step to the next.

    Raises:
        ValueError: as `gradient_pursuit`.

    Example:
        >>> import jax.numpy as jnp
        >>> matching_pursuit(jnp.array([[3.0, 0.0, 1.0]]), jnp.eye(3), k=2).values.tolist()
        [[3.0, 1.0]]

    Source: Mallat and Zhang, Matching Pursuits with Time-Frequency Dictionaries (IEEE TSP 1993).

    Deviations: the non-negative form also lets a coefficient shrink, down to zero.
    """
    options = {"method": method, "signed": signed, "tol": tol, "memory_mb": memory_mb}
    return pursue(x, atoms, k, rule="matching", mesh=mesh, **options)


def orthogonal_matching_pursuit(
    x: ArrayLike,
    atoms: ArrayLike | PreparedAtoms,
    k: int,
    *,
    method: Method = "auto",
    signed: bool = False,
    tol: float = 0.0,
    memory_mb: int = 512,
    mesh: Mesh | None = None,
) -> PursuitResult:
    """Sparse codes of rows by orthogonal matching pursuit: least squares on the support.

    Each of k steps takes in the atom with the largest inner product with the residual r, and
    solves again for all values, by updates of the support's Cholesky factor:

        S <- S + argmax_j <atom_j, r>;   values_S <- argmin_v ||x - sum_j v_j atom_j||, v >= 0
        unless signed;   atoms whose value is zero leave S

    Non-negative, an atom leaves when its value reaches zero on the way to the least-squares
    values of the others, which are then solved again; the values are the non-negative
    least-squares ones of the support that is left. An atom that is a combination of the support
    up to rounding is refused, and the row stops.

    Args:
        x: as in `gradient_pursuit`, like all that follow.
        atoms: [m, d], or prepared.
        k: steps, and slots of the result.
        method: "residual", "gram" or "auto".
        signed: allow negative coefficients: orthogonal matching pursuit as published.
        tol: a row stops once ||r|| <= tol ||x||.
        memory_mb: about how much memory the state of a chunk of rows may take.
        mesh: devices to split rows and atoms over.

    Returns:
        A `PursuitResult`. The residual norm never grows from one step to the next.

    Raises:
        ValueError: as `gradient_pursuit`.

    Example:
        >>> import jax.numpy as jnp
        >>> atoms = jnp.array([[1.0, 0.0], [0.8, 0.6]])
        >>> result = orthogonal_matching_pursuit(jnp.array([[1.8, 0.6]]), atoms, k=2)
        >>> [round(value, 4) for value in result.values[0].tolist()]
        [1.0, 1.0]

    Source: Pati, Rezaiifar and Krishnaprasad, Orthogonal Matching Pursuit (Asilomar 1993); the
        inner loop of the non-negative form: Lawson and Hanson, Solving Least Squares Problems
        (1974), section 23.3.
    """
    options = {"method": method, "signed": signed, "tol": tol, "memory_mb": memory_mb}
    return pursue(x, atoms, k, rule="orthogonal", mesh=mesh, **options)
