"""First weights that are taken from training rows."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdict.rows import Loader, floats, normalize, to_device
from jaxdict.sae import SAEParams, kinds
from jaxdict.training.batches import Fitted


def from_rows(
    params: SAEParams, loader: Loader, fitted: Fitted, target: Loader | None = None
) -> SAEParams:
    """First weights whose atoms are training rows: centred, of unit norm, the encoder their transpose.

    Args:
        params: weights to start from; a row that is the mean itself leaves its atom as it is.
        loader: gives the rows; those of its first batches are taken.
        fitted: normalizations.
        target: gives the rows that a transcoder's atoms are made of.

    Returns:
        The weights; a transcoder's encoder comes from the rows, its atoms from the target's.
    """
    m = params.encoder.shape[0]

    def units(source: Loader, normalization: Any, center: Array, old: Array) -> Array:
        rows, batches = [], source.batches()
        for _ in range(-(-m // source.batch)):
            rows.append(next(batches))
        batches.close()
        z = normalize(to_device(normalization), jnp.asarray(floats(np.concatenate(rows)[:m])))
        z = z - center
        norms = jnp.linalg.norm(z, axis=1, keepdims=True)
        return jnp.where(norms > 0, z / jnp.where(norms > 0, norms, 1.0), old)

    encoder = units(loader, fitted.site, params.bias, params.encoder)
    if target is None:
        return params._replace(encoder=encoder, atoms=jnp.copy(encoder))
    assert params.out_bias is not None
    atoms = units(target, fitted.target, params.out_bias, params.atoms)
    return params._replace(encoder=encoder, atoms=atoms)


def threshold_from_rows(params: SAEParams, loader: Loader, fitted: Fitted, k: int) -> float:
    """A first threshold that leaves about k atoms of a row active: the mean of the rows' k-th largest values.

    Args:
        params: first weights.
        loader: gives the rows; those of its first batch are taken.
        fitted: normalizations.
        k: active atoms a row.
    """
    batches = loader.batches()
    z = normalize(to_device(fitted.site), jnp.asarray(floats(next(batches))))
    batches.close()
    codes = kinds.encode(params._replace(threshold=None), z, k)
    return float(jnp.maximum(jnp.mean(codes.values[:, -1]), 1e-6))
