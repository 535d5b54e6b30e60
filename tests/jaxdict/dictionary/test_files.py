"""The dictionary artefact on a real disk: round trips, atomic writing, and what a bad file says."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harvest.atomic import with_hash
from harvest.tensors import TensorFile
from jaxdict.dictionary.arrays import ENCODER_KINDS, Dictionary, kinds
from jaxdict.dictionary.files import (
    FORMAT,
    VERSION,
    load_dictionary,
    open_tensors,
    read_facts,
    save_dictionary,
)
from tests.damage import flipped

TARGET = {"site": "double.2.img", "target": "double.2.img.mlp"}


def make(flavour: str = "topk", m: int = 6, d: int = 4, out: int = 4, **changes) -> Dictionary:
    """A small valid dictionary of any kind; atoms are `out` wide."""
    rng = np.random.default_rng(3)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    atoms = normal(m, out)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    fields = {
        "kind": flavour,
        "k": 2,
        "atoms": atoms,
        "typical": np.abs(normal(m)),
        "card": {"site": "double.2.img", "metrics": {"fvu": 0.25}},
    }
    if flavour != "itda":
        fields |= {"bias": normal(out), "encoder": normal(m, d), "encoder_bias": normal(m)}
        if flavour in ("batchtopk", "matryoshka"):
            fields |= {"threshold": np.full(m, 0.25, np.float32)}
        if flavour == "jumprelu":
            fields |= {"threshold": np.abs(normal(m))}
    else:
        scale = np.exp(normal(d))
        fields |= {"mean": normal(d), "transform": scale, "inverse": 1 / scale}
        fields |= {"source": rng.integers(0, 9, (m, 3)).astype(np.int32)}
    return Dictionary(**(fields | changes))


@pytest.mark.parametrize("kind", kinds())
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
    assert (card["format"], card["version"]) == ("jaxdict-dictionary", 2)
    assert card["n"] == 3
    assert card["at"] == str(tmp_path)


@pytest.mark.parametrize("kind", ENCODER_KINDS)
def test_a_transcoder_has_two_widths(tmp_path, kind):
    saved = make(kind, d=4, out=7, card=TARGET)
    assert (saved.d, saved.d_out, saved.transcoder) == (4, 7, True)
    assert saved.raw_atoms.shape == (6, 7)
    loaded = load_dictionary(save_dictionary(saved, tmp_path / "x"))
    assert loaded.card == {"kind": kind, "d": 4, "m": 6, "k": 2, "d_out": 7, **TARGET}
    for name in ("atoms", "bias", "encoder", "encoder_bias", "threshold"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))


@pytest.mark.parametrize("kind", kinds())
def test_other_dictionaries_have_one(kind):
    for target in ({}, {"target": None}, {"target": ""}):
        dictionary = make(kind, card=target)
        assert (dictionary.d, dictionary.d_out, dictionary.transcoder) == (4, 4, False)


def test_a_transcoder_may_keep_the_width():
    dictionary = make(card=TARGET)
    assert (dictionary.d, dictionary.d_out, dictionary.transcoder) == (4, 4, True)


def test_version_1_folders_are_read(tmp_path):
    """Written here by hand, as version 1 wrote it."""
    made = make()
    names = ("atoms", "bias", "encoder", "encoder_bias", "typical")
    tensors = {name: getattr(made, name) for name in names}
    facts = {"format": "jaxdict-dictionary", "version": 1, "kind": "topk", "d": 4, "m": 6, "k": 2}
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "card.json").write_text(json.dumps(facts | {"site": "double.2.img"}))
    metadata = {"format": "jaxdict-dictionary", "version": "1"}
    save_file(tensors, tmp_path / "x" / "dictionary.safetensors", metadata)
    loaded = load_dictionary(tmp_path / "x")
    assert (loaded.kind, loaded.k, loaded.threshold, loaded.transcoder) == ("topk", 2, None, False)
    for name in names:
        np.testing.assert_array_equal(getattr(loaded, name), tensors[name])


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
    "kind": ({"kind": "vae"}, "kind: expected one of topk, .*, itda, got 'vae'"),
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
    "other width": (
        {"encoder": ONES((6, 5), np.float32)},
        r"encoder: expected \[6, 4\] .* got \[6, 5\]; a transcoder names the site",
    ),
    "topk threshold": (
        {"threshold": ONES(6, np.float32)},
        "threshold: expected none for kind topk",
    ),
    "target": (
        {"card": {"target": 3}},
        "card: expected target to be the name of the site .* got 3",
    ),
    "flat atoms": ({"atoms": ONES(4, np.float32)}, r"atoms: expected a shape \[m, d\]"),
}
BAD_ITDA_FIELDS = {
    "one way only": ({"inverse": None}, "expected both or neither"),
    "mixed ranks": ({"inverse": np.eye(4, dtype=np.float32)}, "inverse: expected the shape"),
    "encoder": ({"encoder": ONES((6, 4), np.float32)}, "encoder: expected none for kind itda"),
    "norm": ({"atoms": ONES((6, 4), np.float32)}, "expected unit norm for itda, got 2"),
    "source": ({"source": ONES((6, 2), np.int32)}, r"source: expected \[6, 3\]"),
}


BAD_TRANSCODER_FIELDS = {
    "atoms' width": ({"bias": ONES(4, np.float32)}, r"bias: expected \[7\] beside atoms \[6, 7\]"),
    "encoder": ({"encoder": ONES((5, 4), np.float32)}, r"encoder: expected \[6, 4\].*got \[5, 4\]"),
    "flat encoder": ({"encoder": ONES(4, np.float32)}, r"encoder: expected \[6, 7\].*got \[4\]"),
    "no width": ({"encoder": ONES((6, 0), np.float32)}, r"encoder: expected \[6, 1\]"),
    "no encoder": ({"encoder": None}, "encoder: expected an array for kind topk"),
    "no target": ({"card": {}}, "names the site that it rebuilds as the card's target"),
    "itda": ({"kind": "itda"}, "encoder_bias: expected none for kind itda, got an array"),
    "d_out": ({"card": TARGET | {"d_out": 4}}, "card: expected d_out = 7 .* got 4"),
}
NOTHING, NEGATIVE = None, np.array([0, 1, -0.5, 0, 0, 0], np.float32)
BAD_THRESHOLDS = {
    "jumprelu none": ("jumprelu", NOTHING, "threshold: expected an array for kind jumprelu"),
    "batchtopk none": ("batchtopk", NOTHING, "threshold: expected an array for kind batchtopk"),
    "matryoshka none": ("matryoshka", NOTHING, "expected an array for kind matryoshka"),
    "relu": ("relu", ONES(6, np.float32), "threshold: expected none for kind relu"),
    "itda": ("itda", ONES(6, np.float32), "threshold: expected none for kind itda"),
    "negative": ("jumprelu", NEGATIVE, "threshold: expected 0 or more, got -0.5 at atom 2"),
    "infinite": ("jumprelu", np.full(6, np.inf, np.float32), "threshold: expected finite numbers"),
    "one number": ("jumprelu", ONES(1, np.float32), r"threshold: expected \[6\].*got \[1\]"),
    "many": ("batchtopk", np.arange(6, dtype=np.float32), "same number for every .* got 0 to 5"),
}


@pytest.mark.parametrize("kind,threshold,message", BAD_THRESHOLDS.values(), ids=BAD_THRESHOLDS)
def test_a_bad_threshold_is_named(kind, threshold, message):
    with pytest.raises(ValueError, match=message):
        make(kind, threshold=threshold)


@pytest.mark.parametrize(
    "changes,message", BAD_TRANSCODER_FIELDS.values(), ids=BAD_TRANSCODER_FIELDS
)
def test_a_bad_transcoder_field_is_named(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        save_dictionary(make(out=7, **{"card": TARGET} | changes), tmp_path / "x")
    assert not any(tmp_path.iterdir())


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
    """Change a card as one who means it, so that its hash is that of the new values."""
    card = json.loads((path / "card.json").read_text()) | changes
    (path / "card.json").write_text(json.dumps(with_hash(card)))


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"version": 3}, "expected version 1 to 2, got 3; install a newer jaxdict"),
        ({"target": ["double.3.img"]}, "card: expected target to be the name of the site"),
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
    extra = load_file(tensors) | {"codebook": np.ones(1, np.float32)}
    save_file(extra, tensors)
    with pytest.raises(ValueError, match="found codebook"):
        load_dictionary(path)
    tensors.write_bytes(whole)
    (path / "card.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON in .*card\.json, got a damaged file"):
        load_dictionary(path)


def test_reading_a_dictionary_loads_neither_jax_nor_torch():
    code = "import sys, jaxdict.dictionary.files; print(sorted({'jax', 'torch', 'flax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("kind", ["topk", "itda"])
@pytest.mark.parametrize("name", ["dictionary.safetensors", "card.json"])
def test_a_turned_bit_is_told(tmp_path, kind, name):
    path = save_dictionary(make(kind), tmp_path / "x")
    before = [
        getattr(load_dictionary(path), field.name) for field in dataclasses.fields(Dictionary)
    ]
    quiet = 0
    for where in flipped(path / name):
        try:
            loaded = load_dictionary(path)
        except ValueError as error:
            assert str(path) in str(error), where
            continue
        # Only the names of the hashes can be hit unnoticed: then all that they are the hashes of is whole.
        quiet += 1
        for field, value in zip(dataclasses.fields(Dictionary), before, strict=True):
            if field.name != "card":
                np.testing.assert_array_equal(getattr(loaded, field.name), value, where)
    assert quiet <= 12


def test_damage_is_read_where_nobody_asks(tmp_path):
    path = save_dictionary(make(), tmp_path / "x")
    tensors = path / "dictionary.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    with pytest.raises(
        ValueError, match=r"dictionary.safetensors is damaged: .*export its run again"
    ):
        load_dictionary(path)
    assert load_dictionary(path, verify=False).m == 6
    card = path / "card.json"
    card.write_text(card.read_text().replace('"fvu": 0.25', '"fvu": 0.26'))
    with pytest.raises(ValueError, match=r"card.json is damaged or was edited: .* take its line"):
        load_dictionary(path)
    assert load_dictionary(path, verify=False).card["metrics"] == {"fvu": 0.26}


def test_tensors_of_another_card_are_told(tmp_path):
    one, other = (save_dictionary(make(k=k), tmp_path / str(k)) for k in (1, 2))
    save_dictionary(make(typical=np.ones(6, np.float32)), other)
    (one / "dictionary.safetensors").write_bytes((other / "dictionary.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"expected the tensors of the card.json beside it"):
        load_dictionary(one)


def test_a_card_alone_is_read_without_weights(tmp_path):
    """With weights that nobody could read, and a single tensor of them without the others."""
    path = save_dictionary(make("itda"), tmp_path / "x")
    file = path / "dictionary.safetensors"
    content = bytearray(file.read_bytes())
    start = content.index(make("itda").atoms.tobytes())
    content[start] ^= 1
    file.write_bytes(content)
    card = read_facts(path / "card.json", format=FORMAT, version=VERSION)
    source = open_tensors(path, card).read("source")
    np.testing.assert_array_equal(source, make("itda").source)
    file.unlink()
    again = read_facts(path / "card.json", format=FORMAT, version=VERSION)
    assert (again["kind"], again["m"]) == ("itda", 6) and again == card


def test_hashes_are_of_what_is_saved_and_not_of_what_was_loaded(tmp_path):
    loaded = load_dictionary(save_dictionary(make(), tmp_path / "x"))
    assert not [name for name in loaded.card if "xxh3" in name]
    changed = dataclasses.replace(loaded, typical=np.ones(6, np.float32))
    path = save_dictionary(changed, tmp_path / "y")
    np.testing.assert_array_equal(load_dictionary(path).typical, 1)
    file = TensorFile(path / "dictionary.safetensors")
    assert json.loads((path / "card.json").read_text())["tensors_xxh3_128"] == file.hash
