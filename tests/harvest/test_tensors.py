"""Arrays in safetensors files: what is written is what is read, in memory that JAX takes as it is, or it is refused."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harvest.hashing import NAME
from harvest.tensors import TensorFile, write_tensors
from tests.damage import flipped


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "atoms": rng.normal(size=(5, 7)).astype(np.float32),
        "wide": rng.normal(size=(3, 4)).T,
        "source": rng.integers(-9, 9, (4, 3)).astype(np.int32),
        "none": np.zeros((0, 3), np.float32),
    }


def same(one, other):
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert (array.dtype, array.shape) == (other[name].dtype, other[name].shape)
        np.testing.assert_array_equal(array, other[name])


def test_what_is_written_is_what_is_read_here_and_by_safetensors(tmp_path):
    whole = write_tensors(tmp_path / "x", arrays(), {"kind": "rms"})
    file = TensorFile(tmp_path / "x")
    assert (file.metadata, file.hash, sorted(file.names)) == (
        {"kind": "rms"},
        whole,
        sorted(arrays()),
    )
    same(file.read_all(), arrays())
    same(load_file(tmp_path / "x"), arrays())
    assert all(file.read(name).ctypes.data % 64 == 0 for name in ("atoms", "wide", "source"))


def test_files_without_hashes_are_read(tmp_path):
    save_file({"atoms": arrays()["atoms"]}, tmp_path / "x", {"kind": "rms"})
    file = TensorFile(tmp_path / "x")
    assert (file.metadata, file.hash) == ({"kind": "rms"}, None)
    np.testing.assert_array_equal(file.read("atoms"), arrays()["atoms"])


def test_every_turned_bit_is_told_and_none_is_looked_for_where_nobody_asks(tmp_path):
    path = tmp_path / "x"
    write_tensors(path, arrays(), {"kind": "rms"})
    quiet = 0
    for where in flipped(path, 400):
        try:
            read = TensorFile(path, remedy="train again").read_all()
        except ValueError as error:
            assert str(path) in str(error) and "train again" in str(error), where
        else:  # the name of the hashes itself was hit: a file without hashes, and nothing else is damaged
            assert NAME.encode() not in path.read_bytes(), where
            same(read, arrays())
            quiet += 1
    assert quiet < 20
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"expected .* with the hash .*, got"):
        TensorFile(path).read_all()
    assert TensorFile(path, verify=False).read_all().keys() == arrays().keys()


def test_an_array_alone_is_read_and_checked_alone(tmp_path):
    """Damage elsewhere is none of its business."""
    path = tmp_path / "x"
    write_tensors(path, arrays())
    file = TensorFile(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # in the array that comes last
    path.write_bytes(content)
    for name in file.names[:-1]:
        if name != "none":
            np.testing.assert_array_equal(file.read(name), arrays()[name])
    with pytest.raises(ValueError, match=f"expected {file.names[-1]} with the hash"):
        [file.read(name) for name in file.names]


def test_a_cut_file_is_told(tmp_path):
    write_tensors(tmp_path / "x", arrays())
    content = (tmp_path / "x").read_bytes()
    for size in (0, 7, 40, len(content) - 1):
        (tmp_path / "x").write_bytes(content[:size])
        with pytest.raises(ValueError, match="expected safetensors, found a damaged file"):
            TensorFile(tmp_path / "x")
