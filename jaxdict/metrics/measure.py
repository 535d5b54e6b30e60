"""How well an exported dictionary rebuilds rows of a store, with its own encoder or another one."""

from __future__ import annotations

from collections.abc import Callable
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
from jaxdict.rows import Source, floats, side_by_side, watched


def check_width(dictionary: Dictionary, source: Source) -> None:
    """Refuse a site whose rows the dictionary cannot read.

    Raises:
        ValueError: the site's rows are of another width than the dictionary's.
    """
    if dictionary.d != source.d:
        raise ValueError(
            f"expected rows of width {dictionary.d} as in the dictionary, got {source.d} at "
            f"{source.site}; name the site it was trained on with --site"
        )


def target_rows(dictionary: Dictionary, source: Source) -> Source | None:
    """The rows that a transcoder is to rebuild from those it reads; None for any other dictionary.

    Args:
        dictionary: of any kind; `target` in its card names the site that it rebuilds.
        source: the rows that it reads.

    Raises:
        ValueError: the store has no such site, or its rows do not fit.
    """
    if not dictionary.transcoder:
        return None
    store, site = source.store, str(dictionary.card["target"])
    if site not in store.sites:
        raise ValueError(
            f"expected the transcoder's target {site} in {store.path}, which holds "
            f"{', '.join(store.sites)}; harvest both sites into one store"
        )
    target = source.beside(site)
    if target.d != dictionary.d_out:
        raise ValueError(
            f"expected rows of width {dictionary.d_out} at the transcoder's target {site}, got "
            f"{target.d}; measure on a store of the same model"
        )
    return target


def measure_dictionary(
    dictionary: Dictionary,
    source: Source,
    *,
    batch: int = 4096,
    name: str = "eval",
    encode: Callable[[Array], Codes] | None = None,
    memory_mb: int = 512,
) -> Measurement:
    """Encode and decode rows with an exported dictionary, and measure the error.

    Args:
        dictionary: acts on raw rows; what a transcoder rebuilds is compared with its target's rows.
        source: the rows to encode.
        batch: rows at a time.
        name: of the progress bar.
        encode: raw rows float32 [n, d] to codes; the dictionary's own encoder by default.
        memory_mb: memory, in MB, that arrays with one entry an atom may take.

    Returns:
        The measurement, in raw space alone: a dictionary knows no other.

    Raises:
        ValueError: as `target_rows`.
    """
    target = target_rows(dictionary, source)
    shift, d = _shift(target or source), source.d
    encoder = encode or partial(coder.encode, dictionary, memory_mb=memory_mb)

    def report(bits: np.ndarray, weight: np.ndarray) -> BatchReport:
        every = jnp.asarray(floats(bits))
        x, y = every[:, :d], every[:, d:] if target else every
        codes = encoder(x)
        y_hat = coder.decode(dictionary, codes)
        return _report(codes, y, y_hat, jnp.asarray(weight), shift, m=dictionary.m)

    blocks = side_by_side(watched(source, name), target)
    return measure_blocks(blocks, source.denoising_steps, report, batch=batch)


def pursuit_encoder(
    dictionary: Dictionary, k: int, *, std: np.ndarray | None = None, memory_mb: int = 512
) -> Callable[[Array], Codes]:
    """Gradient pursuit on a dictionary's atoms in place of its encoder: inference-time optimization.

        e = argmin ||(x - bias - sum_j e_j atoms_j) / std||^2,  e >= 0, at most k of them, greedily

    Args:
        dictionary: any kind that rebuilds the rows it encodes; atoms may have any norm.
        k: most active atoms a row.
        std: float [d], divides the error in each dimension; all 1 (raw) by default.
        memory_mb: memory of the solver's state, in MB.

    Returns:
        Raw rows float32 [n, d] to codes [n, k], for the dictionary's own decoder.

    Source: the encoder of ITDA (arXiv 2505.17769), here on learned atoms; see also Smith 2024,
        Replacing SAE Encoders with Inference-Time Optimisation.
    """
    nothing = Codes(jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 1), jnp.float32))
    bias = coder.decode(dictionary, nothing)[0]
    m, d = dictionary.m, dictionary.d
    scale = jnp.ones(d, jnp.float32) if std is None else jnp.asarray(1 / std, jnp.float32)
    gram = choose_method(1000 * m, d, m, k) == "gram"
    atoms = prepare_atoms(jnp.asarray(dictionary.raw_atoms) * scale, gram=gram)
    return lambda x: gradient_pursuit((x - bias) * scale, atoms, k, memory_mb=memory_mb).codes


@partial(jax.jit, static_argnames="m")
def _report(
    codes: Codes, y: Array, y_hat: Array, weight: Array, shift: Array, *, m: int
) -> BatchReport:
    sums = batch_sums(y, y_hat, weight, shift)
    counts = row_sums(codes, y, y_hat, weight)
    return BatchReport(sums, None, fired(codes, m, weight), counts)


def _shift(source: Source) -> Array:
    """The mean of the first image's rows, near enough to that of all."""
    first = floats(source.read(source.images[:1]))
    return jnp.asarray(first.mean(0, dtype=np.float64), jnp.float32)
