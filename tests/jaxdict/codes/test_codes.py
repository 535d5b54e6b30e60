"""Codes: slots, order, and decoding against a dense product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdict.codes.codes import Codes, combine, decode, sort_slots


def random_codes(n=7, k=5, m=11, seed=0) -> Codes:
    """Distinct atoms a row, some slots empty."""
    rng = np.random.default_rng(seed)
    indices = np.stack([rng.permutation(m)[:k] for _ in range(n)]).astype(np.int32)
    values = rng.normal(size=(n, k)).astype(np.float32)
    values[rng.random((n, k)) < 0.3] = 0
    return Codes(jnp.asarray(indices), jnp.asarray(values))


def test_sorting_puts_large_values_first_and_empty_slots_last():
    codes = Codes(jnp.array([[3, 9, 1, 4]]), jnp.array([[0.5, 0.0, -2.0, 1.0]]))
    done = sort_slots(*codes)
    assert done.indices.tolist() == [[1, 4, 3, 0]]
    assert done.values.tolist() == [[-2.0, 1.0, 0.5, 0.0]]
    assert done.indices.dtype == jnp.int32


def test_dense_and_l0_count_the_same_slots():
    codes = sort_slots(*random_codes())
    dense = np.asarray(codes.dense(11))
    np.testing.assert_array_equal((dense != 0).sum(1), codes.l0)
    for row in range(codes.n):
        for index, value in zip(codes.indices[row], codes.values[row], strict=True):
            assert value == 0 or dense[row, index] == value


@pytest.mark.parametrize("k", [1, 3, 8, 11])
@pytest.mark.parametrize("bias", [False, True])
def test_decode_equals_the_dense_product(k, bias):
    rng = np.random.default_rng(1)
    codes = random_codes(k=k)
    atoms = rng.normal(size=(11, 6)).astype(np.float32)
    offset = rng.normal(size=6).astype(np.float32) if bias else None
    expected = np.asarray(codes.dense(11)) @ atoms + (offset if bias else 0)
    np.testing.assert_allclose(decode(codes, atoms, offset), expected, atol=1e-5)
    with jax.disable_jit():
        np.testing.assert_allclose(decode(codes, atoms, offset), expected, atol=1e-5)


def test_combine_stops_after_the_slots_it_is_told():
    table = jnp.eye(20)
    weights, indices = jnp.arange(1.0, 21.0), jnp.arange(20)
    out = combine(weights, indices, table, jnp.int32(9))
    # Whole groups of 8 are added: a caller's later slots must be zero, as the contract says.
    assert out.tolist() == [*range(1, 17), 0, 0, 0, 0]


def test_decode_never_holds_a_row_of_atoms_per_slot():
    n, k, d, m = 64, 32, 128, 256
    codes = Codes(jnp.zeros((n, k), jnp.int32), jnp.ones((n, k)))
    memory = decode.lower(codes, jnp.ones((m, d))).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * k * d * 4 / 4
