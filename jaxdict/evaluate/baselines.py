"""What a dictionary has to beat, on the same rows: the training mean, PCA, and a random dictionary.

    mean     x_hat = mean of training rows
    PCA-k    x_hat = mean + V_k V_k^T (x - mean), V_k the first k eigenvectors of the covariance of
             training rows
    random   m unit atoms drawn from a Gaussian in standardized space, k of them a row by gradient
             pursuit

PCA-k spends as many numbers a row as a dictionary with k active atoms, but always the same k
directions. The random dictionary chooses atoms as freely as any dictionary, but has learned nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from harvest.tensors import aligned
from jaxdict.devices import FULL_PRECISION
from jaxdict.dictionary import Dictionary
from jaxdict.metrics import BatchReport, Measurement, batch_sums, measure_blocks, row_sums
from jaxdict.rows import Source, fit, floats, image_rows

_FLOOR = 1e-6
_ATOMS = 1024
"""Atoms that are scaled at a time."""


class BaselineFit(NamedTuple):
    """Statistics of training rows that the baselines are made of, in float64.

    Attributes:
        mean: [d].
        std: [d], standard deviations; at least 1e-3 of their root mean square.
        vectors: [d, d], eigenvectors of the covariance as columns, the largest eigenvalue first.
    """

    mean: np.ndarray
    std: np.ndarray
    vectors: np.ndarray


def fit_baselines(train: Source) -> BaselineFit:
    """Mean, standard deviations and principal components of rows, streaming, in float64.

    Args:
        train: rows of the training split.

    Raises:
        ValueError: rows that are not finite, or all the same.
    """
    fitted = fit(lambda: image_rows(train.blocks()), "whiten", floor=1e-12)
    variance = np.square(fitted.inverse).sum(0)
    std = np.sqrt(np.maximum(variance, _FLOOR * variance.mean()))
    vectors = fitted.transform / np.linalg.norm(fitted.transform, axis=0)
    return BaselineFit(fitted.mean, std, vectors)


def measure_pca(
    fitted: BaselineFit, source: Source, components: int, *, batch: int = 4096
) -> Measurement:
    """Rebuild rows from the first principal components of the training rows, and measure the error.

    Args:
        fitted: from training rows of the same site.
        source: rows to measure on.
        components: how many; 0 is the training mean alone, any number above the width means all.
        batch: rows at a time.
    """
    mean = jnp.asarray(fitted.mean, jnp.float32)
    vectors = jnp.asarray(fitted.vectors[:, :components], jnp.float32)

    def report(bits: np.ndarray, weight: np.ndarray) -> BatchReport:
        return _report(jnp.asarray(floats(bits)), jnp.asarray(weight), mean, vectors)

    return measure_blocks(source.blocks(), source.denoising_steps, report, batch=batch)


@jax.jit
def _report(x: Array, weight: Array, mean: Array, vectors: Array) -> BatchReport:
    along = jnp.dot(x - mean, vectors, precision=FULL_PRECISION)
    x_hat = jnp.dot(along, vectors.T, precision=FULL_PRECISION) + mean
    sums = batch_sums(x, x_hat, weight, mean)
    return BatchReport(sums, None, jnp.zeros(1, jnp.float32), row_sums(None, x, x_hat, weight))


def random_dictionary(fitted: BaselineFit, *, m: int, k: int, seed: int = 0) -> Dictionary:
    """A dictionary that knows only the mean and standard deviation of each dimension.

    Args:
        fitted: from training rows of the site it is for.
        m: atoms.
        k: active atoms a row.
        seed: of the atoms.

    Returns:
        Kind itda: Gaussian atoms of unit norm in standardized space, encoded by gradient pursuit,
        so that the numbers show what random atoms can do, not what a poor encoder can.
    """
    atoms = aligned((m, len(fitted.mean)), np.float32)
    np.random.default_rng(seed).standard_normal(dtype=np.float32, out=atoms)
    for part in np.array_split(atoms, -(-m // _ATOMS)):
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    mean, std = fitted.mean.astype(np.float32), fitted.std.astype(np.float32)
    return Dictionary(
        *("itda", k, atoms),
        mean=mean,
        transform=1 / std,
        inverse=std,
        typical=np.zeros(m, np.float32),
        card={"made": f"random, seed {seed}"},
    )
