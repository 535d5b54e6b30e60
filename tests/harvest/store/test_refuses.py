"""What a store refuses: another store's parts, damage and loss, values and settings that cannot be."""

import json

import numpy as np
import pytest
import zarr

from harvest.store import create_store, open_store
from harvest.store.schema import VERSION
from tests.harvest.synthetic import SITES, content, make_spec, write


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attrs": {"model": {"name": "other"}, "guidance": 0.0, "config": {"seed": 3}}},
            r'model.name = "toy", but "other"',
        ),
        (
            {"attrs": {"model": {"name": "toy"}, "guidance": 0.0, "config": {"seed": 4}}},
            "config.seed = 3, but 4",
        ),
        (
            {"prompts": [f"a café number {i}" for i in range(10)] + ["new"]},
            r'prompts\[10\] = "a café number 10", but "new"',
        ),
        (
            {"sites": {"double.2.img": (12, 8)}},
            r'sites = \["double.2.img", "double.2.txt", "single.0.img.mlp"\], but \["double.2.img"\]',
        ),
        (
            {"sites": SITES | {"double.2.txt": (5, 9)}},
            r"sites.double.2.txt = \[5, 8\], but \[5, 9\]",
        ),
        ({"picture": None}, r"picture = \[6, 4\], but null"),
        ({"images_per_shard": 5}, "images_per_shard = 4, but 5"),
        ({"sigmas": [1.0, 0.5, 0.2]}, "sigmas"),
    ],
)
def test_another_store_at_the_same_place_is_refused_with_both_values(full, change, message):
    with pytest.raises(ValueError, match=message):
        create_store(full[0].path, make_spec(**change))


def test_something_else_at_that_place_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="expected an activation store"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match=r"a store, but .* holds other files"):
        create_store(tmp_path, make_spec())
    with pytest.raises(ValueError, match="expected --out to be a folder"):
        create_store(tmp_path / "notes.txt", make_spec())
    with pytest.raises(ValueError, match="nothing is there"):
        open_store(tmp_path / "missing")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(ValueError, match="expected a Zarr group of format"):
        open_store(tmp_path / "other")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def finished(tmp_path):
    spec = make_spec()
    activations, pictures = content(spec)
    writer = create_store(tmp_path / "s", spec)
    for shard in writer.pending():
        write(writer, shard, activations, pictures)
    return tmp_path / "s"


def test_another_version_is_refused(tmp_path):
    path = finished(tmp_path)
    meta = json.loads((path / "zarr.json").read_text())
    for version, remedy in ((VERSION + 1, "upgrade jaxdict"), (VERSION - 1, "harvest it again")):
        meta["attributes"]["version"] = version
        (path / "zarr.json").write_text(json.dumps(meta))
        message = f"of version {version}, but this jaxdict reads version {VERSION}; {remedy}"
        with pytest.raises(ValueError, match=message):
            open_store(path)


def test_a_mixed_store_is_refused_by_the_shard(tmp_path, full):
    path = finished(tmp_path)
    other = create_store(tmp_path / "other", make_spec(seeds=list(range(11))))
    activations, pictures = content(make_spec(), seed=1)
    write(other, 1, activations, pictures)
    for part in ("sites/double.2.img/c/1/0/0/0", "shards/stamp/c/1"):
        (path / part).write_bytes((tmp_path / "other" / part).read_bytes())
    with pytest.raises(ValueError, match="mixed: its shard 1 was written for another store"):
        open_store(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = finished(tmp_path)
    shard = path / "sites/double.2.img/c/1/0/0/0"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    store = open_store(path)
    store.read("double.2.img", [0, 1])
    with pytest.raises(ValueError, match=r"sites/double.2.img, image 5, .* --verify"):
        store.read("double.2.img", [5])


def test_a_lost_file_is_noticed_and_rows_of_zeros_are_not_taken_for_one(tmp_path):
    spec = make_spec()
    activations, pictures = content(spec)
    activations["double.2.img"][:] = 0
    writer = create_store(tmp_path / "s", spec)
    for shard in writer.pending():
        write(writer, shard, activations, pictures)
    store = open_store(tmp_path / "s")
    assert not store.read("double.2.img").any()
    for name in ("sites/double.2.img", "sites/double.2.txt", "images/picture"):
        (tmp_path / "s" / name / "c/1/0/0/0").unlink()
    for site in ("double.2.img", "double.2.txt"):
        with pytest.raises(ValueError, match=rf"sites/{site}, .*c/1/0/0/0 is missing.*--verify"):
            store.read(site, [0, 6])
        store.read(site, [0, 9])
    with pytest.raises(ValueError, match=r"images/picture, .*c/1/0/0/0 is missing"):
        store.pictures([0, 6])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_by_its_place(tmp_path, value):
    spec = make_spec()
    activations, pictures = content(spec)
    activations["double.2.txt"][6, 2, 1, 3] = value
    writer = create_store(tmp_path / "s", spec)
    with pytest.raises(
        ValueError, match=r"site double.2.txt, step 2, image 6, prompt 'a café number 6'"
    ):
        write(writer, 1, activations, pictures)
    assert writer.pending() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ["one"]}, "expected 11 prompts, got 1"),
        ({"grid": (2, 2)}, r"has 12 tokens, but the grid is \(2, 2\)"),
        ({"words": [["a"]] * 11}, "has 5 tokens, but 1 words"),
        ({"words": [["a"] * (1 + i % 2) for i in range(11)]}, "pad them to one length"),
        ({"attrs": {"images": 3}}, r"got \['images'\]"),
        ({"sites": {}}, "at least one site"),
        ({"step_numbers": (0, 2, 3)}, r"3 ascending numbers of 3 denoising steps, got \[0, 2, 3\]"),
        ({"compress": "lz4"}, "compress to be one of"),
        ({"positions": {"img": np.zeros((11, 5))}}, r"positions of shape \(11, 12\)"),
    ],
)
def test_a_spec_that_disagrees_with_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_spec(**change)


def test_questions_that_have_no_answer_are_refused(full, tmp_path):
    store = full[0]
    with pytest.raises(ValueError, match=r"holds no site 'double.9.img'; it holds double.2.img"):
        store.read("double.9.img")
    with pytest.raises(ValueError, match="expected images from 0 to 10"):
        store.read("double.2.img", [11])
    with pytest.raises(ValueError, match="expected train, validation or all, got 'test'"):
        store.indices("test")
    with pytest.raises(ValueError, match="a mask of 11 images"):
        store.read("double.2.img", np.ones(4, bool))
    bare = create_store(tmp_path / "s", make_spec(picture=None, words=None))
    empty = open_store(bare.place.path)
    assert empty.words == [[]] * 11 and len(empty.indices()) == 0
    with pytest.raises(ValueError, match="keeps no pictures"):
        empty.pictures()
    with pytest.raises(ValueError, match="no finished image yet"):
        empty.statistics("double.2.img")
    activations, _ = content(make_spec())
    with pytest.raises(ValueError, match="expected sites"):
        bare.write(0, {"double.2.img": activations["double.2.img"][:4]})
    with pytest.raises(
        ValueError, match=r"expected double.2.img of shape \(4, 3, 12, 8\), got \(3"
    ):
        bare.write(0, {s: a[:3] for s, a in activations.items()})
