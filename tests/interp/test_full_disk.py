"""A full disk ends index and report in one line, and nothing is left where they were to be."""

from __future__ import annotations

import pytest

from tests.full_disk import everything, refused


@pytest.mark.parametrize("size", [0, 2000, 20_000])
def test_index(world, tmp_path, capsys, size):
    words = ["--dictionary", str(world.root / "sae_img"), "--store", str(world.root / "store")]
    refused(["interp", "index", *words, "--out", f"{tmp_path}/x"], size, capsys)
    assert not everything(tmp_path)


@pytest.mark.parametrize("size", [0, 1000])
def test_report(world, tmp_path, capsys, size):
    words = ["--index", str(world.root / "index"), "--out", f"{tmp_path}/x"]
    refused(["interp", "report", *words], size, capsys)
    assert not everything(tmp_path)
