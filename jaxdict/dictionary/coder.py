"""Encode and decode raw rows with an exported dictionary of any kind, in JAX.

    itda            z = (x - mean) * transform;  e = gradient pursuit of z, k steps, non-negative;
                    x_hat = (sum_j e_j atoms_j) * inverse + mean
                    (with a target: pursuit on encoder, bias in place of mean)
    any other kind  pre = x @ encoder.T + encoder_bias;
                    e = TopK_k(where(pre > threshold, ReLU(pre), 0));
                    x_hat = sum_j e_j atoms_j + bias

A kind without a threshold has 0 there. A transcoder reads rows x [n, d] of one site and rebuilds
the rows [n, d_out] of another. This is what the exported file means: the torch coder computes the
same numbers.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from jaxdict.codes import Codes, top_k
from jaxdict.codes import codes as sparse
from jaxdict.devices import FULL_PRECISION
from jaxdict.dictionary.arrays import ENCODER_KINDS, Dictionary
from jaxdict.pursuit import PreparedAtoms, choose_method, gradient_pursuit, prepare_atoms


class OnDevice(NamedTuple):
    """A dictionary's arrays on the device; None where the dictionary has none."""

    atoms: Array
    bias: Array | None
    encoder: Array | None
    encoder_bias: Array | None
    threshold: Array | None
    mean: Array | None
    transform: Array | None
    inverse: Array | None


# Arrays move to the device once a dictionary, not once a batch; they go when it goes.
_arrays: WeakKeyDictionary[Dictionary, OnDevice] = WeakKeyDictionary()
_prepared: WeakKeyDictionary[Dictionary, PreparedAtoms] = WeakKeyDictionary()


def encode(dictionary: Dictionary, x: ArrayLike, *, memory_mb: int = 512) -> Codes:
    """Codes of raw rows.

    Args:
        dictionary: any kind.
        x: [n, d] raw rows, of a transcoder's input site; computed in float32.
        memory_mb: rows go in chunks so that what is dense in m takes about this much memory, in MB.

    Returns:
        Codes [n, k], slots sorted by value, values in the dictionary's own units.

    Raises:
        ValueError: rows of another width.
    """
    rows = _rows(dictionary, x)
    arrays = _on_device(dictionary)
    if dictionary.kind in ENCODER_KINDS:
        most = max(1, (memory_mb << 20) // (8 * dictionary.m))
        chunks = max(1, -(-len(rows) // most))
        return _encode_linear(arrays, rows, k=int(dictionary.k), chunk=-(-len(rows) // chunks))
    z = _own_space(arrays, rows)
    atoms = _prepared_atoms(dictionary)
    return gradient_pursuit(z, atoms, int(dictionary.k), memory_mb=memory_mb).codes


def decode(dictionary: Dictionary, codes: Any) -> Float[Array, "n d_out"]:
    """Rebuild raw rows from codes: of the site that was read, or of a transcoder's target.

    Args:
        dictionary: the one that made the codes.
        codes: indices int [n, k], each below m, and values float [n, k]; edited ones are fine.

    Returns:
        x_hat float32 [n, d_out].

    Raises:
        ValueError: indices and values that are not of one shape [n, k].
    """
    indices, values = jnp.asarray(codes.indices), jnp.asarray(codes.values, jnp.float32)
    if indices.ndim != 2 or indices.shape != values.shape:
        raise ValueError(
            f"expected codes of indices and values [n, k], got {list(indices.shape)} and "
            f"{list(values.shape)}"
        )
    return _decode(_on_device(dictionary), Codes(indices, values))


def _rows(dictionary: Dictionary, x: ArrayLike) -> Float[Array, "n d"]:
    rows = jnp.asarray(x)
    if rows.ndim != 2 or rows.shape[1] != dictionary.d:
        raise ValueError(
            f"expected rows [n, {dictionary.d}] for this dictionary, got {list(rows.shape)}; "
            "give one activation a row, from the dictionary's own site"
        )
    return rows.astype(jnp.float32)


def _on_device(dictionary: Dictionary) -> OnDevice:
    if dictionary not in _arrays:
        # Concrete even when the first call happens inside somebody's jit.
        with jax.ensure_compile_time_eval():
            fields = {name: getattr(dictionary, name) for name in OnDevice._fields}
            on_device = {k: None if a is None else jax.device_put(a) for k, a in fields.items()}
            _arrays[dictionary] = OnDevice(**on_device)  # pyright: ignore[reportArgumentType]
    return _arrays[dictionary]


def _prepared_atoms(dictionary: Dictionary) -> PreparedAtoms:
    """Unit atoms, with their Gram matrix once: it pays over the many batches of a dictionary."""
    if dictionary not in _prepared:
        d, m, k = dictionary.d, dictionary.m, int(dictionary.k)
        gram = choose_method(1000 * m, d, m, k) == "gram"
        with jax.ensure_compile_time_eval():
            arrays = _on_device(dictionary)
            atoms = arrays.atoms if arrays.encoder is None else arrays.encoder
            _prepared[dictionary] = prepare_atoms(atoms, gram=gram)
    return _prepared[dictionary]


@jax.jit
def _own_space(arrays: OnDevice, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    z = x if arrays.mean is None else x - arrays.mean
    if arrays.transform is None:
        return z
    if arrays.transform.ndim == 1:
        return z * arrays.transform
    return jnp.dot(z, arrays.transform, precision=FULL_PRECISION)


@partial(jax.jit, static_argnames=("k", "chunk"))
def _encode_linear(arrays: OnDevice, x: Float[Array, "n d"], *, k: int, chunk: int) -> Codes:
    encoder, bias, threshold = arrays.encoder, arrays.encoder_bias, arrays.threshold
    assert encoder is not None and bias is not None

    def one(rows: Array) -> Codes:
        pre = jnp.dot(rows, encoder.T, precision=FULL_PRECISION) + bias
        # A threshold is never below 0: what exceeds it is its own ReLU.
        active = jax.nn.relu(pre) if threshold is None else jnp.where(pre > threshold, pre, 0.0)
        values, indices = top_k(active, k)
        return Codes(jnp.where(values > 0, indices, 0), values)

    n, d = x.shape
    if chunk >= n:
        return one(x)
    padded = jnp.pad(x, ((0, -n % chunk), (0, 0))).reshape(-1, chunk, d)
    indices, values = lax.map(one, padded)
    return Codes(indices.reshape(-1, k)[:n], values.reshape(-1, k)[:n])


@jax.jit
def _decode(arrays: OnDevice, codes: Codes) -> Float[Array, "n d_out"]:
    own = sparse.decode(codes, arrays.atoms)
    if arrays.inverse is not None:
        flat = arrays.inverse.ndim == 1
        own = (
            own * arrays.inverse if flat else jnp.dot(own, arrays.inverse, precision=FULL_PRECISION)
        )
    # An itda dictionary with a target has both: its mean belongs to the rows it reads.
    offset = arrays.mean if arrays.bias is None else arrays.bias
    return own if offset is None else own + offset
