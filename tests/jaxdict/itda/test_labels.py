"""Labels of atoms: from a run through save and load to words and pictures."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

from harvest.store import create_store, open_store
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.dictionary.files import load_dictionary, save_dictionary
from jaxdict.export.config import ExportConfig
from jaxdict.export.export import export
from jaxdict.inspect.config import InspectConfig
from jaxdict.inspect.inspect import inspect
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.labels import COLUMNS, label, pictures, select_sources, sources
from jaxdict.itda.saved_run import run_to_dictionary
from jaxdict.itda.train import train_itda
from tests.harvest.synthetic import content, make_spec, write

IMG, TXT, D = "double.2.img", "double.2.txt", 8


def made(path, **changes):
    spec = make_spec(denoising_steps=9, step_numbers=(0, 4, 8), **changes)
    activations, drawn = content(spec)
    writer = create_store(path, spec)
    for shard in writer.pending():
        write(writer, shard, activations, drawn)
    return open_store(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made(tmp_path_factory.mktemp("labels") / "store")


def dictionary_of(store, source, site=IMG):
    source = np.asarray(source, np.int32)
    card = {"site": site, "store_fingerprint": store.fingerprint}
    card["sources"] = sources(store, site, source)
    atoms = np.eye(len(source), D, dtype=np.float32)
    typical = np.ones(len(source), np.float32)
    return Dictionary("itda", 2, atoms, typical=typical, source=source, card=card)


def test_a_label_is_the_stores_own_words(store, tmp_path):
    made_of = [[7, 1, 4], [2, 0, 0], [7, 2, 1]]
    path = save_dictionary(dictionary_of(store, made_of), tmp_path / "x")
    loaded = load_dictionary(path)
    for atom, (image, step, token) in enumerate(made_of):
        told = label(loaded, atom)
        assert (told.image, told.step, told.token) == (image, step, token)
        assert (told.prompt, told.seed) == (store.prompts[image], store.seeds[image])
        assert (told.denoising_step, told.position) == ((0, 4, 8)[step], token)
    assert list(loaded.card["sources"]["columns"]) == list(COLUMNS)
    assert set(loaded.card["sources"]["prompts"]) == {"2", "7"}, "each prompt once"


def test_pictures_are_those_of_the_atoms_images(store):
    dictionary = dictionary_of(store, [[7, 1, 4], [2, 0, 0], [7, 2, 1]])
    found = pictures(dictionary, store, [2, 1, 0, 2])
    for picture, image in zip(found, (7, 2, 7, 7), strict=True):
        np.testing.assert_array_equal(picture, store.pictures([image])[0])


def test_some_of_the_atoms_keep_their_own_labels(store):
    source = np.array([[7, 1, 4], [2, 0, 0], [7, 2, 1]], np.int32)
    told = {**sources(store, IMG, source), "position": [40, 10, 20], "word": ["a", "b", "c"]}
    some = select_sources(told, source, np.array([1, 2]))
    assert (some["position"], some["word"]) == ([10, 20], ["b", "c"])
    assert set(select_sources(told, source, np.array([1]))["prompts"]) == {"2"}


def test_text_tokens_are_told_as_words(store):
    told = label(dictionary_of(store, [[3, 0, 1], [4, 2, 2]], TXT), 1)
    assert told.word == store.words[4][2] == "4"


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "itda"
    train_itda(TrainITDAConfig(store=store.path, site=IMG, out=out, k=2, threshold=0.5, batch=32))
    return out


def test_labels_outlive_the_store(run, store, tmp_path):
    first = run_to_dictionary(run)
    copy = shutil.copytree(store.path, tmp_path / "moved")
    assert label(first, 0).prompt == store.prompts[first.source[0, 0]]
    card = export(ExportConfig(run=run, out=tmp_path / "dictionary", store=copy))
    assert card["sources"] == first.card["sources"]
    assert set(card["sources"]["prompts"]) == {str(i) for i in np.unique(first.source[:, 0])}


def test_inspect_draws_where_the_most_used_atoms_came_from(run, store, tmp_path, capsys):
    export(ExportConfig(run=run, out=tmp_path / "dictionary"))
    facts = inspect(InspectConfig(str(tmp_path / "dictionary"), plot=tmp_path / "plots"))
    assert facts["plots"] == [str(tmp_path / "plots" / "atoms.png")]
    assert "most used atoms" in capsys.readouterr().out
    with Image.open(facts["plots"][0]) as sheet:
        drawn = np.asarray(sheet.convert("RGB"))
    dictionary = load_dictionary(tmp_path / "dictionary")
    columns = 6
    assert drawn.shape[1] == 16 + columns * 216
    assert drawn.shape[0] == 16 + -(-min(24, dictionary.m) // columns) * 300
    assert len(np.unique(drawn[16:216, 16:216].reshape(-1, 3), axis=0)) > 2, (
        "a picture, not a blank"
    )


def test_what_has_no_labels_or_pictures_is_refused(run, store, tmp_path):
    bare = Dictionary("itda", 2, np.eye(3, D, dtype=np.float32), typical=np.ones(3, np.float32))
    with pytest.raises(ValueError, match="whose atoms are rows of a store"):
        label(bare, 0)
    dictionary = dictionary_of(store, [[7, 1, 4]])
    with pytest.raises(ValueError, match="expected atoms from 0 to 0, got 1"):
        label(dictionary, 1)
    other = made(tmp_path / "other", seeds=list(range(900, 900 + store.images)))
    with pytest.raises(ValueError, match="expected the store that the dictionary was made from"):
        pictures(dictionary, other, [0])
    path = save_dictionary(bare, tmp_path / "bare")
    with pytest.raises(ValueError, match="--plot: expected a dictionary that `jaxdict train itda`"):
        inspect(InspectConfig(str(path), plot=tmp_path / "plots"))
    assert not (tmp_path / "plots").exists()
