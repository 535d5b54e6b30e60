"""Sparse autoencoders as pure functions over a few arrays: encode, decode and their gradients.

    e = TopK_k(ReLU(encoder (x - bias) + encoder_bias)),    x_hat = sum_j e_j atoms_j + bias

Only x @ encoder.T is a dense product. Everything after it, gradients included, touches the k active
atoms of each row: no [n, m] gradient and no [n, k, d] tensor exists. Atoms may be split over the
devices of a mesh: each finds its own k largest, and only those [n, k] are merged.

The kinds of autoencoder in `jaxdict.sae.kinds` are built on these. Source: Gao et al. 2024
(arXiv 2406.04093).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdict.codes import Codes, gather_rows, inner_products, scatter_rows, top_k, whole_top_k
from jaxdict.sae.step_config import SINGLE_DEVICE, Execution


class SAEParams(NamedTuple):
    """What a TopK autoencoder learns.

    Attributes:
        encoder: float32 [m, d].
        encoder_bias: float32 [m].
        atoms: float32 [m, d_out], decoder rows of unit norm; d_out = d except for a transcoder.
        bias: float32 [d], subtracted before encoding and, unless there is an `out_bias`, added after
            decoding.
        threshold: float32 [m], what a pre-activation must exceed to count, or None for 0.
        out_bias: float32 [d_out], added after decoding by a transcoder, or None for `bias`.
    """

    encoder: Float[Array, "m d"]
    encoder_bias: Float[Array, " m"]
    atoms: Float[Array, "m d_out"]
    bias: Float[Array, " d"]
    threshold: Float[Array, " m"] | None = None
    out_bias: Float[Array, " d_out"] | None = None


def initial_params(
    key: Array, m: int, *, mean: Float[Array, " d"], out_mean: Float[Array, " d_out"] | None = None
) -> SAEParams:
    """Random unit atoms, the encoder as their transpose, the bias at the data's mean.

    A transcoder's atoms live at another site than its encoder, so the two are drawn apart.

    Args:
        key: JAX random key.
        m: number of atoms.
        mean: float32 [d], mean of the training rows in the autoencoder's own space.
        out_mean: float32 [d_out], the same of the rows that a transcoder predicts.

    Returns:
        Fresh parameters.

    Source: Gao et al. 2024.
    """

    def units(key: Array, d: int) -> Array:
        drawn = jax.random.normal(key, (m, d), jnp.float32)
        return drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)

    encoder, bias = units(key, mean.shape[0]), jnp.asarray(mean, jnp.float32)
    if out_mean is None:
        # A copy: two donated arguments may not share one buffer.
        return SAEParams(jnp.copy(encoder), jnp.zeros(m), encoder, bias)
    atoms = units(jax.random.fold_in(key, 1), out_mean.shape[0])
    out_bias = jnp.asarray(out_mean, jnp.float32)
    return SAEParams(encoder, jnp.zeros(m), atoms, bias, None, out_bias)


def unit_norm(params: SAEParams) -> SAEParams:
    """Scale every atom to unit norm; an atom of zeros stays as it is.

    Args:
        params: parameters after an optimizer step.

    Returns:
        The same, atoms [m, d] of norm 1.
    """
    norms = jnp.linalg.norm(params.atoms, axis=1, keepdims=True)
    return params._replace(atoms=params.atoms / jnp.where(norms > 0, norms, 1.0))


def remove_parallel(gradient: SAEParams, params: SAEParams) -> SAEParams:
    """Remove the part of each atom's gradient that only changes the atom's norm.

    g_j <- g_j - <g_j, a_j> a_j, for unit atoms a_j.

    Args:
        gradient: gradient of the loss.
        params: the parameters it was taken at, with atoms of unit norm.

    Returns:
        The gradient, its `atoms` orthogonal to the atoms.

    Source: Bricken et al. 2023 (Towards Monosemanticity); the FLUX paper (arXiv 2505.24360).
    """
    along = jnp.sum(gradient.atoms * params.atoms, axis=1, keepdims=True)
    return gradient._replace(atoms=gradient.atoms - along * params.atoms)


def encode(
    params: SAEParams,
    x: Float[Array, "n d"],
    k: int,
    *,
    dead: Bool[Array, " m"] | None = None,
    k_aux: int = 0,
    floor: Float[Array, " m"] | None = None,
    execution: Execution = SINGLE_DEVICE,
) -> tuple[Codes, Codes | None]:
    """Codes of rows, and for AuxK the codes that dead features alone would give.

    e = TopK_k(ReLU(pre) where pre > floor), pre = encoder (x - bias) + encoder_bias; differentiable
    in `params` and `x` through the active slots only. Indices of a row are all different; a slot of
    value 0 is empty.

    Args:
        params: the autoencoder; on a mesh, this device's share of its atoms.
        x: float32 [n, d], rows in its own space.
        k: active atoms a row.
        dead: bool [m], the features allowed in the second codes.
        k_aux: slots of the second codes; 0 for none.
        floor: float32 [m], what a pre-activation must exceed; None for 0. Has no gradient.
        execution: precision, exactness of the selection, axes of the mesh.

    Returns:
        Codes [n, k], and Codes [n, k_aux] over `dead` features or None. On a mesh their indices
        count over all atoms, and every device of a row has the same.
    """
    small = (params.encoder, params.encoder_bias, params.bias)
    out: Any = _encode(execution, k, k_aux, small, x, dead, floor)
    values, indices, aux_values, aux_indices = out
    aux = Codes(aux_indices, aux_values) if k_aux else None
    return Codes(indices, values), aux


def decode(
    codes: Codes,
    atoms: Float[Array, "m d"],
    bias: Array | None,
    *,
    execution: Execution = SINGLE_DEVICE,
) -> Float[Array, "n d"]:
    """x_hat = sum_j values_j atoms[indices_j] + bias, differentiable without an [n, k, d] tensor.

    Args:
        codes: n rows of k slots; the indices of a row are all different.
        atoms: float32 [m, d]; on a mesh, this device's share.
        bias: float32 [d], or None.
        execution: axes of the mesh.

    Returns:
        x_hat [n, d].
    """
    x_hat: Any = _decode(execution, codes.values, codes.indices, atoms)
    return x_hat if bias is None else x_hat + bias


def at_slots(
    table: Float[Array, " m"], indices: Int[Array, "n k"], execution: Execution = SINGLE_DEVICE
) -> Float[Array, "n k"]:
    """table[indices], differentiable in the table, also where the table is split over a mesh."""
    picked: Any = _at_slots(execution, table, indices)
    return picked


def _select(pre: Float[Array, "n m"], k: int, execution: Execution) -> tuple[Array, Array]:
    """The k largest positive values of each row over all devices, and their indices there."""
    positive, share = jax.nn.relu(pre), min(k, pre.shape[1])
    if execution.recall:
        values, indices = jax.lax.approx_max_k(positive, share, recall_target=execution.recall)
    else:
        values, indices = top_k(positive, share)
    if execution.features is None:
        return values, indices
    indices = indices + jax.lax.axis_index(execution.features) * pre.shape[1]
    values, indices = (
        jax.lax.all_gather(part, execution.features, axis=1, tiled=True)
        for part in (values, indices)
    )
    values, place = whole_top_k(values, k)
    return values, jnp.take_along_axis(indices, place, axis=1)


def own_slots(execution: Execution, indices: Array, m: int) -> tuple[Array, Array]:
    """Where slots lie among this device's m atoms, and which do; the others get indices past the end."""
    if execution.features is None:
        return indices, jnp.ones(indices.shape, bool)
    local = indices - jax.lax.axis_index(execution.features) * m
    own = (local >= 0) & (local < m)
    return jnp.where(own, local, m + jnp.arange(indices.shape[1])), own


def _over_features(execution: Execution, value: Array) -> Array:
    return value if execution.features is None else jax.lax.psum(value, execution.features)


def _pre(execution: Execution, small: tuple, x: Array) -> Array:
    encoder, encoder_bias, bias = small
    centred = x - bias
    if execution.bfloat16:
        centred, encoder = centred.astype(jnp.bfloat16), encoder.astype(jnp.bfloat16)
    return jnp.dot(centred, encoder.T, preferred_element_type=jnp.float32) + encoder_bias


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _encode(
    execution: Execution,
    k: int,
    k_aux: int,
    small: tuple,
    x: Array,
    dead: Array | None,
    floor: Array | None,
) -> tuple:
    pre = _pre(execution, small, x)
    values, indices = _select(
        pre if floor is None else jnp.where(pre > floor, pre, 0.0), k, execution
    )
    if not k_aux or dead is None:
        empty = jnp.zeros((x.shape[0], 0))
        return values, indices, empty, empty.astype(jnp.int32)
    return values, indices, *_select(jnp.where(dead, pre, 0.0), k_aux, execution)


def _encode_forward(
    execution: Execution,
    k: int,
    k_aux: int,
    small: tuple,
    x: Array,
    dead: Array | None,
    floor: Array | None,
) -> tuple:
    out = _encode(execution, k, k_aux, small, x, dead, floor)
    return out, (small, x, dead, floor, out)


def _encode_backward(
    execution: Execution, k: int, k_aux: int, kept: tuple, cotangents: tuple
) -> tuple:
    small, x, dead, floor, (values, indices, aux_values, aux_indices) = kept
    encoder, _, bias = small
    m = encoder.shape[0]
    slots = [(indices, jnp.where(values > 0, cotangents[0], 0.0))]
    if k_aux:
        slots.append((aux_indices, jnp.where(aux_values > 0, cotangents[2], 0.0)))
    places = [(own_slots(execution, i, m), g) for i, g in slots]
    own = [(i, jnp.where(mine, g, 0.0)) for (i, mine), g in places]
    centred = x - bias
    d_encoder = sum(scatter_rows(i, g, centred, m) for i, g in own)
    d_encoder_bias = sum(jnp.zeros(m).at[i].add(g, mode="drop") for i, g in own)
    d_rows: Any = sum(gather_rows(g, i, encoder) for i, g in own)
    d_x = _over_features(execution, d_rows)
    d_bias = -_over_features(execution, d_encoder_bias @ encoder)
    none = None if dead is None else np.zeros(dead.shape, jax.dtypes.float0)
    d_floor = None if floor is None else jnp.zeros_like(floor)
    return (d_encoder, d_encoder_bias, d_bias), d_x, none, d_floor


_encode.defvjp(_encode_forward, _encode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(execution: Execution, values: Array, indices: Array, atoms: Array) -> Array:
    place, own = own_slots(execution, indices, atoms.shape[0])
    return _over_features(execution, gather_rows(jnp.where(own, values, 0.0), place, atoms))


def _decode_forward(execution: Execution, values: Array, indices: Array, atoms: Array) -> tuple:
    return _decode(execution, values, indices, atoms), (values, indices, atoms)


def _decode_backward(execution: Execution, kept: tuple, g: Array) -> tuple:
    values, indices, atoms = kept
    m = atoms.shape[0]
    place, own = own_slots(execution, indices, m)

    d_values = jnp.where(own, inner_products(jnp.minimum(place, m - 1), g, atoms), 0.0)
    d_atoms = scatter_rows(place, jnp.where(own, values, 0.0), g, m)
    none = np.zeros(indices.shape, jax.dtypes.float0)
    return _over_features(execution, d_values), none, d_atoms


_decode.defvjp(_decode_forward, _decode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at_slots(execution: Execution, table: Array, indices: Array) -> Array:
    place, own = own_slots(execution, indices, table.shape[0])
    return _over_features(execution, jnp.where(own, table.at[place].get(mode="clip"), 0.0))


def _at_slots_forward(execution: Execution, table: Array, indices: Array) -> tuple:
    return _at_slots(execution, table, indices), (table.shape[0], indices)


def _at_slots_backward(execution: Execution, kept: tuple, g: Array) -> tuple:
    m, indices = kept
    place, own = own_slots(execution, indices, m)
    d_table = jnp.zeros(m).at[place].add(jnp.where(own, g, 0.0), mode="drop")
    return d_table, np.zeros(indices.shape, jax.dtypes.float0)


_at_slots.defvjp(_at_slots_forward, _at_slots_backward)
