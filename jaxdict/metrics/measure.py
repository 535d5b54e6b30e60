"""How well an exported dictionary rebuilds rows of a store, with its own encoder or another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdict.codes import Codes
from jaxdict.dictionary import Dictionary, coder
from jaxdict.metrics.distributions import row_sums
from jaxdict.metrics.fidelity import BatchReport, Measurement, batch_sums, fired, measure_blocks
from jaxdict.pursuit import choose_method, gradient_pursuit, prepare_atoms
from jaxdict.rows import Source, floats, watched


def measure_dictionary(
    dictionary: Dictionary,
    source: Source,
    *,
    batch: int = 4096,
    name: str = "eval",
    target: Source | None = None,
    encode: Callable[[Array], Codes] | None = None,
    memory_mb: int = 512,
) -> Measurement:
    """Encode and decode rows with the exported dictionary and measure.

    Args:
        dictionary: acts on raw rows.
        source: which rows.
        batch: rows at a time.
        name: of the progress bar.
        target: of a transcoder, the rows to be predicted, of the same images, steps and tokens.
        encode: raw rows float32 [n, d] to codes; the dictionary's own encoder by default.
        memory_mb: what is dense in the atoms takes about this much memory, in MB.

    Returns:
        The measurement; only raw space, the dictionary knows no other.
    """
    shift, d = _shift(target or source), source.d
    encoder = encode or partial(coder.encode, dictionary, memory_mb=memory_mb)

    def report(bits: np.ndarray, weight: np.ndarray) -> BatchReport:
        every = jnp.asarray(floats(bits))
        x, y = every[:, :d], every[:, d:] if target else every
        codes = encoder(x)
        y_hat = coder.decode(dictionary, codes)
        return _report(codes, y, y_hat, jnp.asarray(weight), shift, m=dictionary.m)

    blocks = watched(source, name)
    if target is not None:
        blocks = _side_by_side(blocks, target)
    return measure_blocks(blocks, source.steps, report, batch=batch)


def pursuit_encoder(
    dictionary: Dictionary, k: int, *, std: np.ndarray | None = None, memory_mb: int = 512
) -> Callable[[Array], Codes]:
    """Gradient pursuit on a dictionary's atoms in its encoder's place: inference-time optimization.

        e = argmin ||(x - bias - sum_j e_j atoms_j) / std||^2,  e >= 0, at most k of them, greedily

    Args:
        dictionary: any kind that rebuilds the rows it encodes; atoms may have any norm.
        k: active atoms a row, at most.
        std: float [d], what an error in each dimension is divided by; raw (all 1) by default.
        memory_mb: memory of the solver's state, in MB.

    Returns:
        Raw rows float32 [n, d] to codes [n, k], for the dictionary's own decoder.

    Source: the encoder of ITDA (arXiv 2505.17769), here on learned atoms; see also Smith 2024,
        Replacing SAE Encoders with Inference-Time Optimisation.
    """
    nothing = Codes(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1)))
    bias = coder.decode(dictionary, nothing)[0]
    m, d = dictionary.m, dictionary.d
    scale = jnp.ones(d) if std is None else jnp.asarray(1 / std, jnp.float32)
    gram = choose_method(1000 * m, d, m, k) == "gram"
    atoms = prepare_atoms(jnp.asarray(dictionary.raw_atoms) * scale, gram=gram)
    return lambda x: gradient_pursuit((x - bias) * scale, atoms, k, memory_mb=memory_mb).codes


def _side_by_side(
    blocks: Iterator[tuple[np.ndarray, np.ndarray]], target: Source
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of rows with the target's rows behind them, [image, step, token, d + d_out]."""
    for images, bits in blocks:
        yield images, np.concatenate([bits, target.read(images)], axis=-1)


@partial(jax.jit, static_argnames="m")
def _report(
    codes: Codes, y: Array, y_hat: Array, weight: Array, shift: Array, *, m: int
) -> BatchReport:
    sums = batch_sums(y, y_hat, weight, shift)
    counts = row_sums(codes, y, y_hat, weight)
    return BatchReport(sums, None, fired(codes, m, weight), counts)


def _shift(source: Source) -> Array:
    """About the mean of the rows: the first image's."""
    first = floats(source.read(source.images[:1]))
    return jnp.asarray(first.mean(0, dtype=np.float64), jnp.float32)
