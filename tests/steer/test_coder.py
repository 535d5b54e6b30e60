"""The torch coder against JAX, against slow definitions, and on bad input."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from jaxdict.dictionary.arrays import Dictionary, kinds
from jaxdict.dictionary.files import save_dictionary
from steer import coder as coder_module
from steer.coder import Coder, Codes
from steer.pursuit import gradient_pursuit
from tests.reference import coder as slow

TARGET = "double.1.img.mlp"
KINDS = {
    "topk": {"kind": "topk"},
    "batchtopk": {"kind": "batchtopk"},
    "jumprelu": {"kind": "jumprelu"},
    "matryoshka": {"kind": "matryoshka"},
    "relu": {"kind": "relu"},
    "transcoder": {"kind": "topk", "d_out": 20, "target": TARGET},
    "jumprelu transcoder": {"kind": "jumprelu", "d_out": 50, "target": TARGET},
    "transcoder of one width": {"kind": "batchtopk", "target": TARGET},
    "itda": {"kind": "itda", "transform": "none"},
    "itda diagonal": {"kind": "itda", "transform": "diagonal"},
    "itda full": {"kind": "itda", "transform": "full"},
    "itda transcoder": {"kind": "itda", "transform": "full", "d_out": 20, "target": TARGET},
    "itda transcoder of one width": {"kind": "itda", "transform": "diagonal", "target": TARGET},
}
assert {options["kind"] for options in KINDS.values()} == set(kinds())
each_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def rows_of(dictionary, n=200, seed=1):
    """Rows that are part sparse combinations of what features read (the raw atoms, but for a
    transcoder), part noise, at several scales, one zero."""
    rng = np.random.default_rng(seed)
    codes = rng.random((n, dictionary.m)) * (rng.random((n, dictionary.m)) < 0.1)
    read = dictionary.encoder if dictionary.transcoder else dictionary.raw_atoms
    x = codes @ read + 0.1 * rng.standard_normal((n, dictionary.d))
    x *= rng.choice([0.01, 1, 30], (n, 1))
    x[0] = 0
    return x.astype(np.float32)


@each_kind
def test_same_codes_and_reconstruction_as_jax(random_dictionary, options):
    import jaxdict.dictionary.coder as jax_coder

    k = 7
    dictionary = random_dictionary(**options, k=k)
    x = rows_of(dictionary)
    theirs = jax_coder.encode(dictionary, x)
    ours = Coder(dictionary).encode(torch.from_numpy(x))
    assert ours.values.shape == (len(x), k)
    scale = np.abs(theirs.values).max(-1, keepdims=True) + 1e-6
    dense = np.asarray(theirs.dense(dictionary.m))
    np.testing.assert_allclose(ours.dense(dictionary.m) / scale, dense / scale, atol=2e-5)
    x_hat = np.asarray(jax_coder.decode(dictionary, theirs))
    assert x_hat.shape == (len(x), dictionary.d_out)
    size = np.abs(x_hat).max(-1, keepdims=True) + 1e-6
    np.testing.assert_allclose(Coder(dictionary).decode(ours) / size, x_hat / size, atol=2e-5)


@each_kind
def test_codes_are_what_the_formulas_say(random_dictionary, options):
    dictionary = random_dictionary(**options, k=9)
    x = rows_of(dictionary, n=40).astype(np.float64)
    coder = Coder(dictionary, dtype=torch.float64)
    codes = coder.encode(torch.from_numpy(x))
    expected = slow.encode(dictionary, x)
    np.testing.assert_allclose(codes.dense(dictionary.m), expected, atol=1e-6)
    np.testing.assert_array_equal(codes.l0, (expected > 0).sum(1))
    np.testing.assert_allclose(coder.decode(codes), slow.decode(dictionary, expected), atol=1e-5)
    assert (coder.d, coder.d_out) == (dictionary.d, dictionary.d_out)
    if dictionary.threshold is not None:
        # Thresholds decide in some rows, and the number of slots in others.
        bare = dataclasses.replace(dictionary, kind="relu", threshold=None)
        l0, loose = (expected > 0).sum(1), (slow.encode(bare, x) > 0).sum(1)
        assert (l0 < loose).any() and (l0 == 9).any()


@each_kind
def test_slots_are_sorted_and_empty_ones_are_zero(random_dictionary, options):
    dictionary = random_dictionary(**options, k=12)
    x = torch.from_numpy(rows_of(dictionary))
    # Few features fire on rows that point away from every atom of the encoder.
    codes = Coder(dictionary).encode(torch.cat([x, -x]))
    values, indices = codes.values, codes.indices
    assert (values >= 0).all() and (values.diff(dim=-1) <= 0).all()
    assert (indices[values == 0] == 0).all()
    assert torch.equal(codes.l0, (values > 0).sum(-1))
    for row in range(0, len(indices), 7):
        active = indices[row][values[row] > 0]
        assert len(active.unique()) == len(active)


@each_kind
def test_shapes_dtypes_and_blocks_do_not_change_the_answer(random_dictionary, options, monkeypatch):
    dictionary = random_dictionary(**options)
    coder = Coder(dictionary)
    x = torch.from_numpy(rows_of(dictionary, n=24))
    whole = coder.encode(x)
    shaped = coder.encode(x.reshape(2, 3, 4, -1))
    assert torch.equal(shaped.values.reshape(24, -1), whole.values)
    assert coder.decode(shaped).shape == (2, 3, 4, coder.d_out)
    monkeypatch.setattr(coder_module, "_BLOCK", 5 * coder.m)
    blocked = coder.encode(x)
    torch.testing.assert_close(blocked.dense(coder.m), whole.dense(coder.m))
    assert coder.encode(x.bfloat16()).values.dtype == torch.float32
    assert coder.encode(x[:0]).values.shape == (0, coder.k)
    assert coder.decode(coder.encode(x[:0])).shape == (0, coder.d_out)


@each_kind
def test_activation_and_raw_atom(random_dictionary, options):
    dictionary = random_dictionary(**options)
    coder = Coder(dictionary)
    x = torch.from_numpy(rows_of(dictionary)).reshape(2, 100, -1)
    dense = coder.encode(x).dense(coder.m)
    feature = int(dense.sum((0, 1)).argmax())
    torch.testing.assert_close(coder.activation(x, feature), dense[..., feature])
    np.testing.assert_allclose(
        coder.raw_atom(feature), dictionary.raw_atoms[feature], rtol=1e-4, atol=1e-5
    )
    # One unit more of a feature moves the reconstruction by its raw atom.
    one, two = (Codes(torch.tensor([[feature]]), torch.tensor([[v]])) for v in (1.0, 2.0))
    moved = coder.decode(two) - coder.decode(one)
    torch.testing.assert_close(moved[0], coder.raw_atom(feature), rtol=1e-4, atol=1e-4)


def test_a_pre_activation_at_its_threshold_is_not_active():
    one, zeros = np.ones((2, 1), np.float32), np.zeros(2, np.float32)
    at = np.array([0.5, 2.0], np.float32)
    dictionary = Dictionary("jumprelu", 2, one, zeros[:1], one, zeros, threshold=at, typical=zeros)
    codes = Coder(dictionary).encode(torch.tensor([[-3], [0.5], [0.75], [2], [2.25]]))
    expected = torch.tensor([[0, 0], [0, 0], [0.75, 0], [2, 0], [2.25, 2.25]])
    assert torch.equal(codes.dense(2), expected)


def test_pursuit_of_orthogonal_atoms_is_a_projection():
    x = torch.tensor([[3.0, 0.0, -1.0, 2.0]])
    indices, values = gradient_pursuit(x, torch.eye(4), 4)
    assert indices.tolist() == [[0, 3, 0, 0]]
    torch.testing.assert_close(values, torch.tensor([[3.0, 2.0, 0.0, 0.0]]))


def test_pursuit_survives_what_could_divide_by_zero():
    atoms = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [float("nan"), 1.0], [3e30, 0.0]])
    indices, values = gradient_pursuit(x, atoms, 5)
    assert values.isfinite().all()
    expected = torch.tensor([0.0, 2.0, 0.0, 0.0, 3e30])
    torch.testing.assert_close(values.sum(-1), expected)
    assert (indices != 2).all()


@pytest.mark.parametrize("options", [KINDS["itda full"], KINDS["jumprelu transcoder"]])
def test_round_trip_through_a_folder(random_dictionary, tmp_path, options):
    dictionary = random_dictionary(**options)
    save_dictionary(dictionary, tmp_path / "dict")
    loaded = Coder.from_pretrained(tmp_path / "dict")
    x = torch.from_numpy(rows_of(dictionary))
    assert torch.equal(loaded.encode(x).values, Coder(dictionary).encode(x).values)
    torch.testing.assert_close(loaded.typical, torch.from_numpy(dictionary.typical))


def test_bad_input_says_what_was_expected(random_dictionary):
    coder = Coder(random_dictionary("topk"))
    with pytest.raises(ValueError, match=r"width d = 32.*\[3, 31\].*double\.1\.img"):
        coder.encode(torch.zeros(3, 31))
    with pytest.raises(ValueError, match=r"feature from 0 to 47.*got 48"):
        coder.raw_atom(48)
    with pytest.raises(ValueError, match="got -1"):
        coder.activation(torch.zeros(32), -1)


def test_moving_to_the_same_device_is_free(random_dictionary):
    coder = Coder(random_dictionary("topk"))
    assert coder.to("cpu") is coder
    assert coder.to(torch.device("cpu", 0)).m == coder.m
