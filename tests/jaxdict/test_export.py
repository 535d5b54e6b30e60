"""The dictionary artefact on a real disk: round trips, atomic writing, and what a bad file says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxdict.export import Dictionary, load_dictionary, save_dictionary


def make(flavour: str = "topk", m: int = 6, d: int = 4, **changes) -> Dictionary:
    """A small valid dictionary of either kind."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    atoms = normal(m, d)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    fields = {
        "kind": flavour,
        "k": 2,
        "atoms": atoms,
        "typical": np.abs(normal(m)),
        "card": {"site": "double.2.img", "metrics": {"fvu": 0.25}},
    }
    if flavour == "topk":
        fields |= {"bias": normal(d), "encoder": normal(m, d), "encoder_bias": normal(m)}
    else:
        scale = np.exp(normal(d))
        fields |= {"mean": normal(d), "transform": scale, "inverse": 1 / scale}
        fields |= {"source": rng.integers(0, 9, (m, 3)).astype(np.int32)}
    return Dictionary(**(fields | changes))


@pytest.mark.parametrize("kind", ["topk", "itda"])
def test_what_is_saved_is_what_is_loaded(tmp_path, kind):
    saved = make(kind)
    path = save_dictionary(saved, tmp_path / "deep" / "er" / "dictionary")
    loaded = load_dictionary(path)
    for field in dataclasses.fields(Dictionary):
        before, after = getattr(saved, field.name), getattr(loaded, field.name)
        if isinstance(before, np.ndarray):
            assert after.dtype == before.dtype
            np.testing.assert_array_equal(after, before)
        elif field.name == "card":
            assert after == {"kind": kind, "d": 4, "m": 6, "k": 2, **before}
        else:
            assert after == before
    assert sorted(p.name for p in path.iterdir()) == ["card.json", "dictionary.safetensors"]
    assert [p.name for p in path.parent.iterdir()] == ["dictionary"]


def test_the_card_says_what_the_file_is(tmp_path):
    path = save_dictionary(make(card={"n": np.int64(3), "at": tmp_path}), tmp_path / "x")
    card = json.loads((path / "card.json").read_text())
    assert (card["format"], card["version"]) == ("jaxdict-dictionary", 1)
    assert card["n"] == 3
    assert card["at"] == str(tmp_path)


def test_raw_atoms_undo_the_normalization():
    topk, itda = make("topk"), make("itda")
    np.testing.assert_array_equal(topk.raw_atoms, topk.atoms)
    np.testing.assert_allclose(itda.raw_atoms, itda.atoms @ np.diag(itda.inverse), rtol=1e-6)
    matrix = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32)
    whitened = make("itda", transform=np.linalg.inv(matrix), inverse=matrix)
    np.testing.assert_allclose(whitened.raw_atoms, whitened.atoms @ matrix, rtol=1e-6)


def test_a_dictionary_is_replaced_and_nothing_else_is(tmp_path):
    path = save_dictionary(make(k=1), tmp_path / "x")
    save_dictionary(make(k=3), path)
    assert load_dictionary(path).k == 3
    assert [p.name for p in tmp_path.iterdir()] == ["x"]

    (path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes"):
        save_dictionary(make(), path)
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"other things \(chapter1.tex\)"):
        save_dictionary(make(), other)
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="found a file"):
        save_dictionary(make(), file)
    assert (other / "chapter1.tex").read_text() == file.read_text() == "mine"


def test_a_failed_write_leaves_nothing_behind_and_keeps_the_old_one(tmp_path):
    path = save_dictionary(make(k=1), tmp_path / "x")
    with pytest.raises(ValueError, match="JSON"):
        save_dictionary(make(card={"fvu": float("nan")}), path)
    with pytest.raises(ValueError, match="JSON"):
        save_dictionary(make(card={"model": object()}), path)
    assert load_dictionary(path).k == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


ONES = np.ones
BAD_FIELDS = {
    "kind": ({"kind": "vae"}, "kind: expected one of topk, itda, got 'vae'"),
    "k zero": ({"k": 0}, "k: expected an integer of at least 1"),
    "k > m": ({"k": 7}, "k: expected at most m = 6, got 7"),
    "float64": ({"bias": ONES(4)}, "bias: expected float32, got float64"),
    "a list": ({"bias": [1.0] * 4}, "bias: expected a numpy array, got list"),
    "bias": ({"bias": ONES(5, np.float32)}, r"bias: expected \[4\].*got \[5\]"),
    "encoder": ({"encoder": ONES((4, 6), np.float32)}, r"encoder: expected \[6, 4\]"),
    "missing encoder": ({"encoder": None}, "encoder: expected an array for kind topk"),
    "topk mean": ({"mean": ONES(4, np.float32)}, "mean: expected none for kind topk"),
    "typical": ({"typical": None}, "typical: expected a float32 array"),
    "nan": ({"typical": np.full(6, np.nan, np.float32)}, "typical: expected finite"),
    "flat atoms": ({"atoms": ONES(4, np.float32)}, r"atoms: expected a shape \[m, d\]"),
}
BAD_ITDA_FIELDS = {
    "one way only": ({"inverse": None}, "expected both or neither"),
    "mixed ranks": ({"inverse": np.eye(4, dtype=np.float32)}, "inverse: expected the shape"),
    "encoder": ({"encoder": ONES((6, 4), np.float32)}, "encoder: expected none for kind itda"),
    "norm": ({"atoms": ONES((6, 4), np.float32)}, "expected unit norm for itda, got 2"),
    "source": ({"source": ONES((6, 2), np.int32)}, r"source: expected \[6, 3\]"),
}


@pytest.mark.parametrize("changes,message", BAD_FIELDS.values(), ids=BAD_FIELDS)
def test_a_bad_topk_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make("topk", **changes)


@pytest.mark.parametrize("changes,message", BAD_ITDA_FIELDS.values(), ids=BAD_ITDA_FIELDS)
def test_a_bad_itda_field_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make("itda", **changes)


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="found nothing"):
        load_dictionary(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="found a file"):
        load_dictionary(tmp_path / "file")
    path = save_dictionary(make(), tmp_path / "x")
    (path / "card.json").unlink()
    with pytest.raises(FileNotFoundError, match="card"):
        load_dictionary(path)


def edit_card(path, **changes):
    card = json.loads((path / "card.json").read_text()) | changes
    (path / "card.json").write_text(json.dumps(card))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"version": 2}, "expected version 1 to 1, got 2; install a newer jaxdict"),
        ({"format": "sae-lens"}, "expected format 'jaxdict-dictionary', got 'sae-lens'"),
        ({"m": 7}, "expected m = 6 as in the tensors, got 7"),
        ({"kind": "itda"}, "expected none for kind itda"),
        ({"k": "two"}, "expected an integer k, got 'two'"),
    ],
)
def test_a_card_that_disagrees_is_refused(tmp_path, changes, message):
    path = save_dictionary(make(), tmp_path / "x")
    edit_card(path, **changes)
    with pytest.raises(ValueError, match=message):
        load_dictionary(path)


def test_damaged_files_are_refused(tmp_path):
    path = save_dictionary(make(), tmp_path / "x")
    tensors = path / "dictionary.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="expected safetensors, found a damaged file"):
        load_dictionary(path)
    tensors.write_bytes(whole)
    extra = load_file(tensors) | {"threshold": np.ones(1, np.float32)}
    save_file(extra, tensors)
    with pytest.raises(ValueError, match="found threshold"):
        load_dictionary(path)
    tensors.write_bytes(whole)
    (path / "card.json").write_text("{")
    with pytest.raises(ValueError, match="expected JSON, found a damaged file"):
        load_dictionary(path)


def test_reading_a_dictionary_loads_neither_jax_nor_torch():
    code = "import sys, jaxdict.export; print(sorted({'jax', 'torch', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
