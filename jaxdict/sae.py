"""TopK sparse autoencoder: pure functions over four arrays, and a thin Flax module around them.

    e = TopK_k(ReLU(encoder (x - bias) + encoder_bias)),    x_hat = sum_j e_j atoms_j + bias

Only x @ encoder.T is a dense product. Everything after it, gradients included, touches the k active
atoms of each row: no [n, m] gradient and no [n, k, d] tensor exists.

Source: Gao et al. 2024 (arXiv 2406.04093).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxdict import codes as sparse
from jaxdict.codes import Codes

# Two-stage top-k, by the median of 7 on 2 CPU cores: lax.top_k 35 ms, two stages 19 ms at
# (n, m, k) = (1024, 12288, 32); 74 and 43 at (1024, 24576, 64); 5.7 and 5.5 at (1024, 1024, 16).
_GROUP = 16
_GROUPED_FROM = 4096


class SAEParams(NamedTuple):
    """What a TopK autoencoder learns.

    Attributes:
        encoder: float32 [m, d].
        encoder_bias: float32 [m].
        atoms: float32 [m, d], decoder rows of unit norm.
        bias: float32 [d], subtracted before encoding and added after decoding.
    """

    encoder: Float[Array, "m d"]
    encoder_bias: Float[Array, " m"]
    atoms: Float[Array, "m d"]
    bias: Float[Array, " d"]


def initial_params(key: Array, m: int, *, mean: Float[Array, " d"]) -> SAEParams:
    """Random unit atoms, the encoder as their transpose, the bias at the data's mean.

    Args:
        key: JAX random key.
        m: number of atoms.
        mean: float32 [d], mean of the training rows in the autoencoder's own space.

    Returns:
        Fresh parameters.

    Source: Gao et al. 2024.
    """
    atoms = jax.random.normal(key, (m, mean.shape[0]), jnp.float32)
    atoms = atoms / jnp.linalg.norm(atoms, axis=1, keepdims=True)
    # A copy: two donated arguments may not share one buffer.
    return SAEParams(jnp.copy(atoms), jnp.zeros(m), atoms, jnp.asarray(mean, jnp.float32))


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


def top_k(x: Float[Array, "n m"], k: int) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The k largest of each row, exactly as `jax.lax.top_k`, but faster for wide rows.

    Wide rows go in two stages: the k groups of 16 with the largest maxima hold the k largest
    elements, and among equal ones those of lowest index as long as the groups are searched in the
    order of their index.

    Args:
        x: float [n, m].
        k: how many, at most m.

    Returns:
        values [n, k] in descending order, indices int32 [n, k], all different within a row.
    """
    n, m = x.shape
    if m < _GROUPED_FROM or m % _GROUP or m // _GROUP < 4 * k:
        return jax.lax.top_k(x, k)  # pyright: ignore[reportReturnType]
    groups = x.reshape(n, m // _GROUP, _GROUP)
    chosen = jnp.sort(jax.lax.top_k(jnp.max(groups, axis=2), k)[1], axis=1)
    candidates = jnp.take_along_axis(groups, chosen[:, :, None], axis=1).reshape(n, k * _GROUP)
    values, place = jax.lax.top_k(candidates, k)
    group = jnp.take_along_axis(chosen, place // _GROUP, axis=1)
    return values, group * _GROUP + place % _GROUP


def encode(
    params: SAEParams,
    x: Float[Array, "n d"],
    k: int,
    *,
    dead: Bool[Array, " m"] | None = None,
    k_aux: int = 0,
) -> tuple[Codes, Codes | None]:
    """Codes of rows, and for AuxK the codes that dead features alone would give.

    e = TopK_k(ReLU(encoder (x - bias) + encoder_bias)); differentiable in `params` and `x` through
    the active slots only. Indices of a row are all different; a slot of value 0 is empty.

    Args:
        params: the autoencoder.
        x: float32 [n, d], rows in its own space.
        k: active atoms a row.
        dead: bool [m], the features allowed in the second codes.
        k_aux: slots of the second codes; 0 for none.

    Returns:
        Codes [n, k], and Codes [n, k_aux] over `dead` features or None.
    """
    small = (params.encoder, params.encoder_bias, params.bias)
    out: Any = _encode(k, k_aux, small, x, dead)
    values, indices, aux_values, aux_indices = out
    aux = Codes(aux_indices, aux_values) if k_aux else None
    return Codes(indices, values), aux


def decode(codes: Codes, atoms: Float[Array, "m d"], bias: Array | None) -> Float[Array, "n d"]:
    """x_hat = sum_j values_j atoms[indices_j] + bias, differentiable without an [n, k, d] tensor.

    Args:
        codes: n rows of k slots; the indices of a row are all different.
        atoms: float32 [m, d].
        bias: float32 [d], or None.

    Returns:
        x_hat [n, d].
    """
    x_hat = _decode(codes.values, codes.indices, atoms)
    return x_hat if bias is None else x_hat + bias


def _select(pre: Float[Array, "n m"], k: int) -> tuple[Array, Array]:
    return top_k(jax.nn.relu(pre), k)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _encode(k: int, k_aux: int, small: tuple, x: Array, dead: Array | None) -> tuple:
    encoder, encoder_bias, bias = small
    pre = (x - bias) @ encoder.T + encoder_bias
    values, indices = _select(pre, k)
    if not k_aux or dead is None:
        empty = jnp.zeros((x.shape[0], 0))
        return values, indices, empty, empty.astype(jnp.int32)
    return values, indices, *_select(jnp.where(dead, pre, 0.0), k_aux)


def _encode_forward(k: int, k_aux: int, small: tuple, x: Array, dead: Array | None) -> tuple:
    out = _encode(k, k_aux, small, x, dead)
    return out, (small, x, dead, out)


def _encode_backward(k: int, k_aux: int, kept: tuple, cotangents: tuple) -> tuple:
    (encoder, _, bias), x, dead, (values, indices, aux_values, aux_indices) = kept
    slots = [(indices, jnp.where(values > 0, cotangents[0], 0.0))]
    if k_aux:
        slots.append((aux_indices, jnp.where(aux_values > 0, cotangents[2], 0.0)))
    m = encoder.shape[0]
    centred = x - bias
    d_encoder = sum(_scatter_rows(i, g, centred, m) for i, g in slots)
    d_encoder_bias = sum(jnp.zeros(m).at[i].add(g, mode="promise_in_bounds") for i, g in slots)
    d_x = sum(_gather_rows(g, i, encoder) for i, g in slots)
    d_bias = -(d_encoder_bias @ encoder)
    none = None if dead is None else np.zeros(dead.shape, jax.dtypes.float0)
    return (d_encoder, d_encoder_bias, d_bias), d_x, none


_encode.defvjp(_encode_forward, _encode_backward)


@jax.custom_vjp
def _decode(values: Array, indices: Array, atoms: Array) -> Array:
    return _gather_rows(values, indices, atoms)


def _decode_forward(values: Array, indices: Array, atoms: Array) -> tuple:
    return _decode(values, indices, atoms), (values, indices, atoms)


def _decode_backward(kept: tuple, g: Array) -> tuple:
    values, indices, atoms = kept

    def inner(index: Array) -> Array:
        return jnp.sum(g * atoms.at[index].get(mode="promise_in_bounds"), axis=1)

    d_values = jax.lax.map(inner, indices.T).T
    d_atoms = _scatter_rows(indices, values, g, atoms.shape[0])
    return d_values, np.zeros(indices.shape, jax.dtypes.float0), d_atoms


_decode.defvjp(_decode_forward, _decode_backward)


def _gather_rows(weights: Array, indices: Array, table: Array) -> Array:
    """sum_j weights_j table[indices_j] for each row: [n, d]."""
    return sparse.decode(Codes(indices, weights), table)


def _scatter_rows(
    indices: Int[Array, "n k"], weights: Float[Array, "n k"], rows: Float[Array, "n d"], m: int
) -> Float[Array, "m d"]:
    """out[indices[i, j]] += weights[i, j] rows[i]; the indices of a row are all different.

    On a CPU row by row, each a scatter of k rows: 0.5 ms at (n, d, m, k) = (1024, 128, 1024, 16)
    and 20 ms at (1024, 768, 12288, 32), where a scan over slots takes 1.6 and 27, sorted segments
    5.9 and 30, and the dense product 13 and 420. Elsewhere n small steps would be slow: slots.
    """
    zero = jnp.zeros((m, rows.shape[1]), rows.dtype)

    def by_row(total: Array, slot: tuple) -> tuple[Array, None]:
        i, w, row = slot
        new = w[:, None] * row[None, :]
        return total.at[i].add(new, unique_indices=True, mode="promise_in_bounds"), None

    def by_slot(total: Array, slot: tuple) -> tuple[Array, None]:
        i, w = slot
        return total.at[i].add(w[:, None] * rows, mode="promise_in_bounds"), None

    if jax.default_backend() == "cpu":
        return jax.lax.scan(by_row, zero, (indices, weights, rows))[0]
    return jax.lax.scan(by_slot, zero, (indices.T, weights.T))[0]


class TopKSAE(nnx.Module):
    """A TopK autoencoder as a Flax module: holds the arrays, leaves the mathematics to this file.

    x_hat = decode(encode(x)), in the autoencoder's own (normalized) space.
    """

    def __init__(self, params: SAEParams, k: int) -> None:
        """Wrap parameters.

        Args:
            params: arrays, see `SAEParams`.
            k: active atoms a row.
        """
        self.encoder = nnx.Param(params.encoder)
        self.encoder_bias = nnx.Param(params.encoder_bias)
        self.atoms = nnx.Param(params.atoms)
        self.bias = nnx.Param(params.bias)
        self.k = k

    @property
    def params(self) -> SAEParams:
        """The arrays as a plain tuple."""
        return SAEParams(self.encoder[...], self.encoder_bias[...], self.atoms[...], self.bias[...])

    def encode(self, x: Float[Array, "n d"]) -> Codes:
        """Codes of rows, empty slots as (0, 0.0)."""
        codes, _ = encode(self.params, x, self.k)
        return Codes(jnp.where(codes.values > 0, codes.indices, 0), codes.values)

    def decode(self, codes: Codes) -> Float[Array, "n d"]:
        """Rows rebuilt from codes."""
        return sparse.decode(codes, self.atoms[...], self.bias[...])

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """x_hat of rows."""
        return self.decode(self.encode(x))
