"""Sparse autoencoders as pure functions over a few arrays: encode, decode and their gradients.

    e = TopK_k(ReLU(encoder (x - bias) + encoder_bias)),    x_hat = sum_j e_j atoms_j + bias

Only x @ encoder.T is a dense product. Everything after it, gradients included, touches the k active
atoms of each row: there is no [n, m] gradient and no [n, k, d] tensor. Atoms may be split over the
devices of a mesh: each device finds its own k largest, and only those [n, k] are merged.

The kinds of autoencoder in `jaxdict.sae.kinds` and the Flax module in `jaxdict.sae.module` are built on
these functions. Source: Gao et al. 2024 (arXiv 2406.04093).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxdict.codes import Codes, gather_rows, inner_products, scatter_rows, top_k, whole_top_k
from jaxdict.devices import own_indices
from jaxdict.sae.step_config import SINGLE_DEVICE, Execution


class SAEParams(NamedTuple):
    """The weights of an autoencoder of any kind; gradients, moments and averages have the same form.

    Attributes:
        encoder: float32 [m, d].
        encoder_bias: float32 [m].
        atoms: float32 [m, d_out], decoder rows of unit norm; d_out = d except for a transcoder.
        bias: float32 [d], subtracted before encoding and, unless there is an `out_bias`, added after
            decoding.
        threshold: float32 [m], what a pre-activation must exceed; None for 0. jumprelu trains its logarithm,
            batchtopk and matryoshka have one only when trained (see `TrainState.best`).
        out_bias: float32 [d_out], added after decoding by a transcoder; None for `bias`.
    """

    encoder: Float[Array, "m d"]
    encoder_bias: Float[Array, " m"]
    atoms: Float[Array, "m d_out"]
    bias: Float[Array, " d"]
    threshold: Float[Array, " m"] | None = None
    out_bias: Float[Array, " d_out"] | None = None

    def has_atom_axis(self) -> SAEParams:
        """A tree of the same structure: whether the first axis of each array counts atoms."""
        yes: Any = True
        no: Any = False
        return SAEParams(
            encoder=yes,
            encoder_bias=yes,
            atoms=yes,
            bias=no,
            threshold=None if self.threshold is None else yes,
            out_bias=None if self.out_bias is None else no,
        )


def initial_params(
    key: Array, m: int, *, mean: Float[Array, " d"], out_mean: Float[Array, " d_out"] | None = None
) -> SAEParams:
    """Random unit atoms, the encoder as their transpose, the bias at the data's mean.

    A transcoder's atoms live at another site than its encoder, so the two are drawn apart.

    Args:
        key: JAX random key.
        m: number of atoms.
        mean: float32 [d], mean of the training rows in the autoencoder's own space.
        out_mean: float32 [d_out], mean of the rows that a transcoder predicts.

    Returns:
        parameters before training.

    Source: Gao et al. 2024.
    """

    def units(key: Array, d: int) -> Array:
        drawn = jax.random.normal(key, (m, d), jnp.float32)
        return drawn / jnp.linalg.norm(drawn, axis=1, keepdims=True)

    encoder, bias = units(key, mean.shape[0]), jnp.asarray(mean, jnp.float32)
    encoder_bias = jnp.zeros(m, jnp.float32)
    if out_mean is None:
        # A copy: two donated arguments may not share one buffer.
        return SAEParams(jnp.copy(encoder), encoder_bias, encoder, bias)
    atoms = units(jax.random.fold_in(key, 1), out_mean.shape[0])
    out_bias = jnp.asarray(out_mean, jnp.float32)
    return SAEParams(encoder, encoder_bias, atoms, bias, None, out_bias)


def unit_norm(params: SAEParams) -> SAEParams:
    """Scale every atom to unit norm; an atom of zeros stays as it is.

    Args:
        params: parameters after an optimizer step.

    Returns:
        the same, with atoms [m, d] of norm 1.
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
        the gradient, its `atoms` orthogonal to the atoms.

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
    in `params` and `x` through the active slots only. The indices of a row are all different; a slot of
    value 0 is empty.

    Args:
        params: the autoencoder; on a mesh, this device's share of its atoms.
        x: float32 [n, d], rows in its own space.
        k: active atoms a row.
        dead: bool [m], the features allowed in the second codes.
        k_aux: slots of the second codes; 0 for none.
        floor: float32 [m], what a pre-activation must exceed; None for 0. It gets no gradient.
        execution: precision, exactness of the selection, axes of the mesh.

    Returns:
        Codes [n, k], and Codes [n, k_aux] of `dead` features or None. On a mesh their indices
        count over all atoms, and all devices that share a row have the same codes.
    """
    affine = _Affine(params.encoder, params.encoder_bias, params.bias)
    out: Any = _encode(_Slots(k, k_aux, execution), affine, x, dead, floor)
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
        bias: float32 [d], or None for 0.
        execution: axes of the mesh.

    Returns:
        x_hat [n, d].
    """
    x_hat: Any = _decode(execution, codes.values, codes.indices, atoms)
    return x_hat if bias is None else x_hat + bias


def at_slots(
    table: Float[Array, " m"], indices: Int[Array, "n k"], execution: Execution = SINGLE_DEVICE
) -> Float[Array, "n k"]:
    """table[indices], differentiable in the table, even if the table is split over a mesh."""
    picked: Any = _at_slots(execution, table, indices)
    return picked


def own_slots(execution: Execution, indices: Array, m: int) -> tuple[Array, Array]:
    """Slots whose atoms lie on this device.

    Args:
        execution: axes of the mesh.
        indices: int32 [n, k], over all atoms.
        m: atoms of this device.

    Returns:
        local: int32 [n, k], indices among this device's atoms; from m on, and all different, for the slots
        of other devices.
        own: bool [n, k], whether the slot is this device's.
    """
    elsewhere = m + jnp.arange(indices.shape[1], dtype=jnp.int32)
    return own_indices(indices, m, execution.features, elsewhere=elsewhere)


class _Slots(NamedTuple):
    """What is fixed when codes are selected: slots a row, slots of the AuxK codes, precision and mesh."""

    k: int
    k_aux: int
    execution: Execution


class _Affine(NamedTuple):
    """The part of `SAEParams` that encoding differentiates."""

    encoder: Array
    encoder_bias: Array
    bias: Array


def _pre_activations(execution: Execution, affine: _Affine, x: Array) -> Float[Array, "n m"]:
    centred, encoder = x - affine.bias, affine.encoder
    if execution.bfloat16:
        centred, encoder = centred.astype(jnp.bfloat16), encoder.astype(jnp.bfloat16)
    return jnp.dot(centred, encoder.T, preferred_element_type=jnp.float32) + affine.encoder_bias


def _largest(pre: Float[Array, "n m"], k: int, execution: Execution) -> tuple[Array, Array]:
    """The k largest positive values of each row over all devices, and their indices over all atoms."""
    positive, local_k = jax.nn.relu(pre), min(k, pre.shape[1])
    if execution.recall:
        values, indices = jax.lax.approx_max_k(positive, local_k, recall_target=execution.recall)
    else:
        values, indices = top_k(positive, local_k)
    if execution.features is None:
        return values, indices
    indices = indices + jax.lax.axis_index(execution.features) * pre.shape[1]
    values, indices = (
        jax.lax.all_gather(part, execution.features, axis=1, tiled=True)
        for part in (values, indices)
    )
    values, place = whole_top_k(values, k)
    return values, jnp.take_along_axis(indices, place, axis=1)


def _sum_over_features(execution: Execution, value: Array) -> Array:
    """The sum over the devices that share the atoms."""
    return value if execution.features is None else jax.lax.psum(value, execution.features)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _encode(
    slots: _Slots, affine: _Affine, x: Array, dead: Array | None, floor: Array | None
) -> tuple:
    pre = _pre_activations(slots.execution, affine, x)
    above = pre if floor is None else jnp.where(pre > floor, pre, 0.0)
    values, indices = _largest(above, slots.k, slots.execution)
    if not slots.k_aux or dead is None:
        empty = jnp.zeros((x.shape[0], 0), jnp.float32)
        return values, indices, empty, empty.astype(jnp.int32)
    of_dead = jnp.where(dead, pre, 0.0)
    return values, indices, *_largest(of_dead, slots.k_aux, slots.execution)


def _encode_forward(
    slots: _Slots, affine: _Affine, x: Array, dead: Array | None, floor: Array | None
) -> tuple:
    out = _encode(slots, affine, x, dead, floor)
    return out, (affine, x, dead, floor, out)


def _encode_backward(slots: _Slots, residuals: tuple, cotangents: tuple) -> tuple:
    affine, x, dead, floor, (values, indices, aux_values, aux_indices) = residuals
    execution, m = slots.execution, affine.encoder.shape[0]
    active = [(indices, jnp.where(values > 0, cotangents[0], 0.0))]
    if slots.k_aux:
        active.append((aux_indices, jnp.where(aux_values > 0, cotangents[2], 0.0)))
    here = [(own_slots(execution, i, m), g) for i, g in active]
    local = [(i, jnp.where(own, g, 0.0)) for (i, own), g in here]
    centred = x - affine.bias
    d_encoder = sum(scatter_rows(i, g, centred, m) for i, g in local)
    d_encoder_bias = sum(jnp.zeros(m, jnp.float32).at[i].add(g, mode="drop") for i, g in local)
    d_rows: Any = sum(gather_rows(g, i, affine.encoder) for i, g in local)
    d_x = _sum_over_features(execution, d_rows)
    d_bias = -_sum_over_features(execution, d_encoder_bias @ affine.encoder)
    d_dead = None if dead is None else np.zeros(dead.shape, jax.dtypes.float0)
    d_floor = None if floor is None else jnp.zeros_like(floor)
    return _Affine(d_encoder, d_encoder_bias, d_bias), d_x, d_dead, d_floor  # pyright: ignore[reportArgumentType]


_encode.defvjp(_encode_forward, _encode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _decode(execution: Execution, values: Array, indices: Array, atoms: Array) -> Array:
    local, own = own_slots(execution, indices, atoms.shape[0])
    return _sum_over_features(execution, gather_rows(jnp.where(own, values, 0.0), local, atoms))


def _decode_forward(execution: Execution, values: Array, indices: Array, atoms: Array) -> tuple:
    return _decode(execution, values, indices, atoms), (values, indices, atoms)


def _decode_backward(execution: Execution, residuals: tuple, g: Array) -> tuple:
    values, indices, atoms = residuals
    m = atoms.shape[0]
    local, own = own_slots(execution, indices, m)
    d_values = jnp.where(own, inner_products(jnp.minimum(local, m - 1), g, atoms), 0.0)
    d_atoms = scatter_rows(local, jnp.where(own, values, 0.0), g, m)
    d_indices = np.zeros(indices.shape, jax.dtypes.float0)
    return _sum_over_features(execution, d_values), d_indices, d_atoms


_decode.defvjp(_decode_forward, _decode_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _at_slots(execution: Execution, table: Array, indices: Array) -> Array:
    local, own = own_slots(execution, indices, table.shape[0])
    return _sum_over_features(execution, jnp.where(own, table.at[local].get(mode="clip"), 0.0))


def _at_slots_forward(execution: Execution, table: Array, indices: Array) -> tuple:
    return _at_slots(execution, table, indices), (table.shape[0], indices)


def _at_slots_backward(execution: Execution, residuals: tuple, g: Array) -> tuple:
    m, indices = residuals
    local, own = own_slots(execution, indices, m)
    d_table = jnp.zeros(m, jnp.float32).at[local].add(jnp.where(own, g, 0.0), mode="drop")
    return d_table, np.zeros(indices.shape, jax.dtypes.float0)


_at_slots.defvjp(_at_slots_forward, _at_slots_backward)
