"""Normalization of rows: fitted once on the training split in float64, then frozen.

    z = (x - mean) * transform,     x = z * inverse + mean          none, rms, standardize: [d]
    z = (x - mean) @ transform,     x = z @ inverse + mean          whiten: [d, d]

Every transform is invertible, so that it can be folded into a dictionary exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt16

from harvest.atomic import whole_file
from harvest.tensors import TensorFile, write_tensors
from jaxdict.flags import NORMALIZATIONS


@dataclass(frozen=True, eq=False)
class Normalization:
    """A frozen affine map between raw rows x and normalized rows z.

    Attributes:
        kind: none, rms, standardize or whiten.
        mean: float64 [d], subtracted first (zeros for none and rms).
        transform: float64 [d] or [d, d].
        inverse: float64, the same shape.
        center: float64 [d], mean of the training rows in z, for the initial decoder bias.
        variance: total variance of the training rows in z, mean ||z - center||^2.
        rows: number of rows that it was fitted on.
    """

    kind: str
    mean: np.ndarray
    transform: np.ndarray
    inverse: np.ndarray
    center: np.ndarray
    variance: float
    rows: int


class Normalizer(NamedTuple):
    """The arrays of a `Normalization` on the device, float32."""

    mean: Float[Array, " d"]
    transform: Array
    inverse: Array


def to_device(normalization: Normalization) -> Normalizer:
    """The map as float32 JAX arrays."""
    return Normalizer(
        *(
            jnp.asarray(value, jnp.float32)
            for value in (normalization.mean, normalization.transform, normalization.inverse)
        )
    )


def normalize(normalizer: Normalizer, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Raw rows to normalized ones: (x - mean) * transform, or @ transform."""
    centred = x - normalizer.mean
    return (
        centred * normalizer.transform
        if normalizer.transform.ndim == 1
        else centred @ normalizer.transform
    )


def denormalize(normalizer: Normalizer, z: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Normalized rows back to raw ones: z * inverse + mean, or z @ inverse + mean."""
    scaled = z * normalizer.inverse if normalizer.inverse.ndim == 1 else z @ normalizer.inverse
    return scaled + normalizer.mean


def bfloat16_rows(bits: UInt16[Array, "n d"]) -> Float[Array, "n d"]:
    """bfloat16 bits, as a store keeps them, to float32 rows on the device."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


def fit(
    blocks: Callable[[], Iterable[np.ndarray]], kind: str, *, floor: float = 1e-6
) -> Normalization:
    """Fit a normalization on blocks of rows, in float64, streaming.

    none: z = x. rms: z = x / sqrt(mean of x^2 over rows and dimensions). standardize:
    z = (x - mean) / std per dimension. whiten: z = (x - mean) @ V diag(l)^(-1/2) for the covariance
    V diag(l) V^T (PCA coordinates). Variances, or eigenvalues, below `floor` times their mean are
    raised to it.

    Args:
        blocks: called once for a pass over the rows; yields float [n, d] blocks.
        kind: one of `jaxdict.flags.NORMALIZATIONS`.
        floor: smallest variance or eigenvalue, as a share of the mean one.

    Returns:
        The frozen map.

    Raises:
        ValueError: an unknown kind, no rows, rows that are not finite, or rows that are all the same.

    Source: whitening and standardization as in the FLUX paper (arXiv 2505.24360); it fitted its PCA
    on one bfloat16 batch, this is the float64 covariance of all the rows given.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(f"expected a normalization among {NORMALIZATIONS}, got {kind!r}; pick one")
    count, mean, second = _moments(blocks(), whiten=kind == "whiten")
    variances = second if second.ndim == 1 else np.diag(second)
    total = float(variances.sum())
    if not np.isfinite(total):
        raise ValueError("expected finite rows, found NaN or infinity; harvest the site again")
    if total <= 0:
        raise ValueError(f"expected rows that differ, got {count} equal rows; choose another site")
    d = mean.shape[0]
    if kind == "none":
        return Normalization(kind, np.zeros(d), np.ones(d), np.ones(d), mean, total, count)
    if kind == "rms":
        scale = np.sqrt((total + np.square(mean).sum()) / d)
        transform, inverse = np.full(d, 1 / scale), np.full(d, scale)
        return Normalization(
            kind, np.zeros(d), transform, inverse, mean / scale, float(total / scale**2), count
        )
    if kind == "standardize":
        std = np.sqrt(np.maximum(variances, floor * total / d))
        variance = float((variances / std**2).sum())
        return Normalization(kind, mean, 1 / std, std, np.zeros(d), variance, count)
    eigenvalues, vectors = np.linalg.eigh(second)
    eigenvalues, vectors = eigenvalues[::-1], vectors[:, ::-1]
    floored = np.maximum(eigenvalues, floor * total / d)
    root = np.sqrt(floored)
    variance = float((np.maximum(eigenvalues, 0) / floored).sum())
    transform, inverse = vectors / root, (vectors * root).T
    return Normalization(kind, mean, transform, inverse, np.zeros(d), variance, count)


def _moments(blocks: Iterable[np.ndarray], *, whiten: bool) -> tuple[int, np.ndarray, np.ndarray]:
    """Count, mean [d], and variance [d] or covariance [d, d], in float64.

    Sums are taken around the first block's mean, so that a large mean costs no digits.
    """
    count, shift = 0, np.zeros(0)
    first, second = np.zeros(0), np.zeros(0)
    for block in blocks:
        rows = np.asarray(block, np.float64)
        if not len(rows):
            continue
        if not count:
            shift = rows.mean(0)
            first = np.zeros_like(shift)
            second = np.zeros((len(shift), len(shift))) if whiten else np.zeros_like(shift)
        rows = rows - shift
        count += len(rows)
        first += rows.sum(0)
        second += rows.T @ rows if whiten else np.einsum("nd,nd->d", rows, rows)
    if not count:
        raise ValueError("expected at least one training row, got none; harvest more images")
    offset = first / count
    second = second / count
    second -= np.outer(offset, offset) if whiten else offset**2
    return count, shift + offset, second if whiten else np.maximum(second, 0)


def save_normalization(normalization: Normalization, path: Path) -> None:
    """Write one safetensors file (float64), all of it or nothing."""
    tensors = {
        name: getattr(normalization, name) for name in ("mean", "transform", "inverse", "center")
    }
    facts = {
        "kind": normalization.kind,
        "variance": repr(normalization.variance),
        "rows": str(normalization.rows),
    }
    with whole_file(path) as draft:
        write_tensors(draft, tensors, facts)


def load_normalization(path: Path, *, verify: bool = True) -> Normalization:
    """Read what `save_normalization` wrote, bit for bit.

    Args:
        path: its file.
        verify: whether contents have to have the hashes that the file names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is damaged.
    """
    file = TensorFile(path, verify=verify, remedy="copy the run again, or train it again")
    facts = file.metadata
    return Normalization(
        kind=facts["kind"],
        variance=float(facts["variance"]),
        rows=int(facts["rows"]),
        **file.read_all(),
    )


def fit_once(
    path: Path,
    blocks: Callable[[], Iterable[np.ndarray]],
    kind: str,
    *,
    floor: float,
    resume: bool,
) -> Normalization:
    """The frozen normalization of a run: read if an earlier start has saved it, else fitted and saved.

    Args:
        path: the run's file for it.
        blocks: as `fit` takes them.
        kind: as `fit` takes it.
        floor: as `fit` takes it.
        resume: whether a file found there belongs to this run.
    """
    if resume and path.is_file():
        return load_normalization(path)
    fitted = fit(blocks, kind, floor=floor)
    save_normalization(fitted, path)
    return fitted
