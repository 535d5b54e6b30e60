"""Folding a normalization into an autoencoder, so that it acts on raw rows.

With z = (x - mean) T and x = z R + mean (T, R diagonal or full), an autoencoder in z,

    e = TopK(ReLU(pre) where pre > threshold),   pre = W (z - b) + c,   z_hat = A^T e + b_out,

(b_out = b, except in a transcoder) is the same function of raw rows as one with

    W' = W T^T,   c' = c - W b - W' mean,   A' = A R_out,   b' = b_out R_out + mean_out

and the same thresholds, because ReLU, thresholds and TopK see the same numbers. R_out and mean_out
belong to the rows that are rebuilt: the same normalization, or the target's in a transcoder. The
folding is done in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from harvest.tensors import aligned
from jaxdict.codes import Codes
from jaxdict.dictionary import Dictionary, coder
from jaxdict.metrics import target_rows
from jaxdict.rows import (
    Normalization,
    Source,
    denormalize,
    floats,
    normalize,
    side_by_side,
    to_device,
)
from jaxdict.sae import SAEParams, kinds

_ATOMS = 1024
"""Atoms that are folded at a time, so that their float64 copies take little memory."""
_DENSE = 2**23
"""Pre-activations of the model that are held at a time."""


def fold(
    params: SAEParams,
    normalization: Normalization,
    k: int,
    *,
    kind: str = "topk",
    target: Normalization | None = None,
    target_site: str | None = None,
) -> Dictionary:
    """Fold a normalization into an autoencoder of any kind, exactly (see the top of this file).

    Args:
        params: the autoencoder in normalized space.
        normalization: the map of the rows it reads.
        k: slots kept a row.
        kind: one of `jaxdict.dictionary.ENCODER_KINDS`.
        target: of a transcoder, the map of the rows it rebuilds.
        target_site: of a transcoder, the site it rebuilds, for the dictionary's card.

    Returns:
        A dictionary on raw rows; its `typical` is zero, its card empty except for `target`.

    Raises:
        ValueError: one of `target` and `target_site` without the other; a threshold that the kind
            does not have, or a missing one.
    """
    if (target is None) != (not target_site):
        raise ValueError(
            "expected both target and target_site (a transcoder) or neither, got "
            f"{'no target' if target is None else 'no target_site'}; give both"
        )
    bias = np.asarray(params.bias, np.float64)
    out = normalization if target is None else target
    out_bias = bias if params.out_bias is None else np.asarray(params.out_bias, np.float64)
    raw_bias = _times(out_bias, out.inverse) + out.mean
    raw_encoder, raw_atoms = (
        aligned(array.shape, np.float32) for array in (params.encoder, params.atoms)
    )
    raw_encoder_bias = np.empty(len(raw_atoms), np.float32)
    for part, encoder, encoder_bias, atoms in _blocks(params):
        raw = _times(encoder, normalization.transform.T)
        raw_encoder_bias[part] = encoder_bias - encoder @ bias - raw @ normalization.mean
        raw_encoder[part] = raw
        raw_atoms[part] = _times(atoms, out.inverse)
    threshold = params.threshold
    return Dictionary(
        kind,
        k,
        raw_atoms,
        bias=raw_bias.astype(np.float32),
        encoder=raw_encoder,
        encoder_bias=raw_encoder_bias,
        threshold=None if threshold is None else np.asarray(threshold, np.float32),
        typical=np.zeros(len(raw_atoms), np.float32),
        card={"target": target_site} if target_site else {},
    )


def _blocks(params: SAEParams) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Some atoms after others: which, and encoder, encoder_bias and atoms of these in float64."""
    arrays = [np.asarray(a) for a in (params.encoder, params.encoder_bias, params.atoms)]
    for start in range(0, len(arrays[0]), _ATOMS):
        part = slice(start, start + _ATOMS)
        encoder, encoder_bias, atoms = (array[part].astype(np.float64) for array in arrays)
        yield part, encoder, encoder_bias, atoms


def _times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rows times a diagonal [d] or full [d, d] matrix."""
    return rows * matrix if matrix.ndim == 1 else rows @ matrix


def folding_error(
    dictionary: Dictionary,
    params: SAEParams,
    rows: Source,
    *,
    normalization: Normalization,
    target: Normalization | None = None,
    batch: int = 4096,
) -> dict[str, Any]:
    """How far the folded dictionary is from the model it was folded from, both in float32.

    Args:
        dictionary: on raw rows, of any kind with an encoder.
        params: the model in normalized space.
        rows: to compare on; at most 8 batches of them are used.
        normalization: of the rows that are read.
        target: of a transcoder, the normalization of the rows it rebuilds.
        batch: rows at a time.

    Returns:
        rows; relative, sqrt(sum ||y_hat' - y_hat||^2 / sum ||y - mean||^2) for raw rows y that are
        rebuilt (those that are read, or a transcoder's target's); same_features, share of active
        slots that hold the same feature (two features within rounding of each other at the k-th
        place may change places, one within rounding of its threshold may be lost).
    """
    # Compiled, since by itself the product would first copy the encoder, transposed.
    compiled = jax.jit(kinds.encode, static_argnums=2)

    def model(z: Any) -> Codes:
        return compiled(params, z, int(dictionary.k))

    normalizer, out = to_device(normalization), to_device(target or normalization)
    far, spread, same, active, count = 0.0, 0.0, 0, 0, 0
    center = _raw_mean(target or normalization)
    some = rows.spread(8 * batch)
    for block in side_by_side(some.blocks(), target_rows(dictionary, some)):
        every = floats(block.bits)
        for start in range(0, len(every), batch):
            part = every[start : start + batch]
            x, y = jnp.asarray(part[:, : some.d]), part[:, -dictionary.d_out :]
            codes = _in_pieces(model, normalize(normalizer, x), dictionary.m)
            y_hat = denormalize(out, kinds.decode(params, codes))
            folded = _in_pieces(partial(coder.encode, dictionary), x, dictionary.m)
            again = coder.decode(dictionary, folded)
            far += _squares(np.asarray(again - y_hat).astype(np.float64))
            spread += _squares(y.astype(np.float64) - center)
            count += len(x)
            for one, other in zip(*map(_active, (codes, folded)), strict=True):
                same += len(one & other)
                active += max(len(one), len(other))
    return {
        "rows": count,
        "relative": float(np.sqrt(far / spread)) if spread else 0.0,
        "same_features": same / active if active else 1.0,
    }


def _in_pieces(encode: Callable[[Any], Any], rows: Any, m: int) -> Codes:
    """Codes of rows, some after others."""
    size = max(1, _DENSE // m)
    parts = [encode(rows[i : i + size]) for i in range(0, len(rows), size)]
    return Codes(*(jnp.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _squares(rows: np.ndarray) -> float:
    """Sum of squares, in the memory of the rows themselves."""
    return float(np.square(rows, out=rows).sum())


def _raw_mean(normalization: Normalization) -> np.ndarray:
    """Mean of the raw rows that a normalization was fitted on: float64 [d]."""
    return normalization.mean + _times(normalization.center, normalization.inverse)


def _active(codes: Any) -> list[set[int]]:
    """Active features of each row."""
    indices, values = np.asarray(codes.indices), np.asarray(codes.values)
    return [set(i[v != 0].tolist()) for i, v in zip(indices, values, strict=True)]
