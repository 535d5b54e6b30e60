from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from hashlib import sha256

import numpy as np
import pytest

from harvest.atomic import with_hash
from interp.index.arrays import ARRAYS, FORMAT, FeatureIndex, load_index, save_index
from tests.damage import flipped


@pytest.fixture
def folder(world, tmp_path):
    shutil.copytree(world.root / "index", tmp_path / "index")
    return tmp_path / "index"


def edit(folder, **changes):
    file = folder / "index.json"
    """Change the facts as one who means it, so that their hash is that of the new values."""
    file.write_text(json.dumps(with_hash(json.loads(file.read_text()) | changes)))


def test_round_trip(world, tmp_path):
    index = world.index
    save_index(index, tmp_path)
    again = load_index(tmp_path)
    assert again.facts == index.facts
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name))


def test_every_array_is_named_and_every_field_an_array():
    fields = [field.name for field in dataclasses.fields(FeatureIndex)]
    assert fields == ["facts", *ARRAYS]


def test_opens_with_numpy_and_json_alone(world):
    folder = world.root / "index"
    facts = json.loads((folder / "index.json").read_text())
    assert facts["format"] == FORMAT and facts["version"] == 1
    with np.load(folder / "index.npz", allow_pickle=False) as arrays:
        assert set(arrays.files) == set(ARRAYS)


def test_reading_loads_neither_torch_nor_jax(world):
    code = (
        "import sys; from interp.index.arrays import load_index; import interp.config; "
        f"load_index({str(world.root / 'index')!r}); "
        "sys.exit(bool({'torch', 'jax', 'PIL', 'jinja2'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.json.*jaxdict interp index"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "zip"}, "expected format 'jaxdict-index', got 'zip'"),
        ({"version": 2}, "expected version 1 to 1, got 2; install a newer jaxdict"),
        ({"arrays_xxh3_128": "0"}, "found others or a damaged file"),
        ({"m": 13}, r"density: expected float64 \[13\], got float64 \[12\]"),
        ({"grid": None}, "grid: expected it among the facts"),
        ({"seeds": []}, "images, prompts, seeds"),
        ({"top": 99}, "top: expected 1 to 16"),
        ({"tokens": 3}, "heat_token: expected indices below 3"),
    ],
)
def test_bad_facts_are_refused(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_index(folder)


def test_damaged_files_are_refused(folder):
    arrays = (folder / "index.npz").read_bytes()
    (folder / "index.npz").write_bytes(arrays[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_index(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON"):
        load_index(folder)


def test_wrong_dtype_and_offsets_are_refused(world):
    index = world.index
    with pytest.raises(ValueError, match=r"mean: expected float32 \[12\], got float64"):
        dataclasses.replace(index, mean=index.mean.astype(np.float64))
    start = index.heat_start.copy()
    start[0, 1] = -5
    with pytest.raises(ValueError, match="heat_start"):
        dataclasses.replace(index, heat_start=start)


@pytest.mark.parametrize("name", ["index.json", "index.npz"])
def test_a_turned_bit_is_told(folder, name):
    before, quiet = load_index(folder), 0
    for where in flipped(folder / name, 40):
        try:
            again = load_index(folder)
        except ValueError as error:
            assert str(folder) in str(error), where
        else:  # the name of the hash itself was hit
            quiet += 1
            np.testing.assert_array_equal(again.mean, before.mean)
    assert quiet <= 2


def test_damage_is_read_where_nobody_asks(folder):
    file = folder / "index.json"
    file.write_text(file.read_text().replace('"top": 12', '"top": 11'))
    with pytest.raises(ValueError, match=r"index.json is damaged or was edited"):
        load_index(folder)
    assert load_index(folder, verify=False).facts["top"] == 11


def test_an_index_of_an_earlier_version_is_read_and_its_arrays_are_checked(folder):
    """With SHA-256 of its arrays, and no hash of its own."""
    file, arrays = folder / "index.json", folder / "index.npz"
    facts = json.loads(file.read_text())
    old = {name: value for name, value in facts.items() if "xxh3" not in name}
    assert len(facts) - len(old) == 2
    file.write_text(json.dumps(old | {"arrays_sha256": sha256(arrays.read_bytes()).hexdigest()}))
    assert "arrays_sha256" not in load_index(folder).facts
    for _ in flipped(arrays, 10):
        with pytest.raises(ValueError, match="found others or a damaged file"):
            load_index(folder)
