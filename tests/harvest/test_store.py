"""The activation store on a real disk: what is written is read, resumed, refused, and never half there."""

import json
import subprocess
import sys

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from harvest.schema import VERSION, chunk_shape, from_bits, to_bits
from harvest.store import create_store, open_store
from tests.harvest.synthetic import SITES, content, make_spec, same_files, write


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "store"
    spec = make_spec()
    activations, pictures = content(spec)
    writer = create_store(path, spec)
    for shard in writer.pending():
        write(writer, shard, activations, pictures)
    rounded = {site: from_bits(to_bits(a)) for site, a in activations.items()}
    return open_store(path), spec, rounded, pictures


@settings(deadline=None)
@given(arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_bits_are_rounded_as_torch_rounds_them(values):
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bits(to_bits(values)), expected)


@settings(deadline=None)
@given(arrays(np.uint16, 30))
def test_bits_survive_a_round_trip(bits):
    values = from_bits(bits)
    np.testing.assert_array_equal(to_bits(values)[~np.isnan(values)], bits[~np.isnan(values)])


@settings(deadline=None)
@given(st.lists(st.integers(1, 700), min_size=2, max_size=4), st.sampled_from((1, 2)))
def test_an_inner_chunk_divides_its_shard(shape, itemsize):
    chunk = chunk_shape(tuple(shape), itemsize)
    assert all(n % c == 0 for n, c in zip(shape, chunk, strict=True))
    assert chunk[-1] == shape[-1]


def test_chunks_of_flux_are_of_a_good_size():
    for shard in ((16, 4, 4096, 3072), (16, 4, 512, 3072), (100, 4, 64, 128), (8, 4, 1024, 12288)):
        assert 0.5e6 < np.prod(chunk_shape(shard)) * 2 < 4e6


def test_everything_comes_back(full):
    store, spec, activations, pictures = full
    assert store.sites == tuple(SITES) and (store.images, store.steps) == (11, 3)
    for site in SITES:
        assert store.shape(site) == (11, 3, *SITES[site])
        np.testing.assert_array_equal(store.read(site), activations[site])
    np.testing.assert_array_equal(store.pictures(), pictures)
    assert store.prompts == spec.prompts and store.words == spec.words
    assert store.labels == spec.labels
    assert store.seeds.tolist() == spec.seeds and store.seeds.dtype == np.int64
    assert store.split.tolist() == spec.split and store.done.all()
    assert store.sigmas.tolist() == spec.sigmas and store.timesteps.tolist() == spec.timesteps
    assert store.grid == (3, 4) and store.attrs["model"] == {"name": "toy"}
    assert store.indices("validation").tolist() == [0, 4, 8]
    assert store.indices("train").tolist() == [1, 2, 3, 5, 6, 7, 9, 10]


@settings(deadline=None)
@given(data=st.data())
def test_any_selection_reads_as_numpy_would(full, data):
    store, _, activations, pictures = full
    number = st.integers(-11, 10)
    which = data.draw(
        st.one_of(
            st.builds(
                slice, st.none() | number, st.none() | number, st.sampled_from((None, 1, 3, -1))
            ),
            st.lists(number, max_size=9).map(lambda x: np.array(x, int)),
            arrays(bool, 11),
        )
    )
    steps = data.draw(
        st.none() | st.lists(st.integers(0, 2), max_size=4).map(lambda x: np.array(x, int))
    )
    expected = activations["double.2.img"][which]
    if steps is not None:
        expected = expected[:, steps]
    np.testing.assert_array_equal(store.read("double.2.img", which, steps), expected)
    np.testing.assert_array_equal(store.pictures(which), pictures[which])


def test_statistics_are_those_of_the_stored_rows(full):
    store, _, activations, _ = full
    for site, (_, d) in SITES.items():
        rows = activations[site].reshape(-1, d).astype(np.float64)
        got = store.statistics(site)
        assert got.count == len(rows)
        np.testing.assert_allclose(got.mean, rows.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_allclose(got.second, (rows**2).mean(0), rtol=1e-12)
        np.testing.assert_allclose(got.variance, rows.var(0), rtol=1e-10)
        np.testing.assert_array_equal(got.min, rows.min(0))
        np.testing.assert_array_equal(got.max, rows.max(0))
        np.testing.assert_allclose(got.norm, np.sqrt((rows**2).sum(1).mean()), rtol=1e-12)


def test_statistics_and_norms_by_step(full):
    store, _, activations, _ = full
    site = "double.2.img"
    for step in (0, 2):
        rows = activations[site][:, step].reshape(-1, 8).astype(np.float64)
        got = store.statistics(site, step)
        assert got.count == len(rows)
        np.testing.assert_allclose(got.mean, rows.mean(0), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(got.max, rows.max(0))
        assert got.largest == np.abs(rows).max()
        lengths = np.linalg.norm(rows, axis=1)
        norms = store.norms(site)
        expected = np.histogram(lengths, norms.edges)[0]
        np.testing.assert_array_equal(norms.counts[step], expected)
        for q in (0.1, 0.5, 0.9):  # to the width of a bin
            np.testing.assert_allclose(norms.quantile(q, step), np.quantile(lengths, q), rtol=0.1)


def test_massive_rows_are_counted(tmp_path):
    spec = make_spec(sites={"double.2.img": (12, 8)}, picture=None)
    rows = np.ones((11, 3, 12, 8), np.float32)
    rows[3, 1, :2] *= 1000  # two rows of the second step
    rows[0, 0, 0] = 0
    writer = create_store(tmp_path / "s", spec)
    for shard in writer.pending():
        writer.write(shard, {"double.2.img": rows[writer.images_of(shard)]})
    norms = open_store(tmp_path / "s").norms("double.2.img")
    assert norms.massive() == 2 / (11 * 3 * 12) and norms.massive(1) == 2 / (11 * 12)
    assert norms.massive(2) == 0 and norms.quantile(0.0) == 0
    np.testing.assert_allclose(norms.quantile(0.5), np.sqrt(8), rtol=0.1)


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_some_steps_and_tokens_compressed_or_not(tmp_path, compress):
    where = np.stack([np.sort(np.random.default_rng(i).permutation(12)[:5]) for i in range(11)])
    spec = make_spec(
        sites={"double.2.img": (5, 8), "double.2.txt": (5, 8)},
        denoising_steps=9,
        step_numbers=(0, 4, 8),
        positions={"img": where},
        compress=compress,
        chunk_bytes=100,
    )
    activations, pictures = content(spec)
    writer = create_store(tmp_path / "s", spec)
    for shard in writer.pending():
        write(writer, shard, activations, pictures)
    store = open_store(tmp_path / "s")
    assert store.sampled and store.step_numbers.tolist() == [0, 4, 8]
    np.testing.assert_array_equal(store.positions("double.2.img"), where)
    np.testing.assert_array_equal(store.positions("double.2.img", [3]), where[[3]])
    np.testing.assert_array_equal(store.positions("double.2.txt", [3]), [np.arange(5)])
    array = store.group["sites/double.2.img"]
    assert np.prod(array.chunks) * 2 <= 160
    expected = from_bits(to_bits(activations["double.2.img"]))
    np.testing.assert_array_equal(store.read("double.2.img"), expected)
    assert create_store(tmp_path / "s", spec).pending() == []
    moved = where.copy()
    moved[0] = np.setdiff1d(np.arange(12), where[0])[:5]
    with pytest.raises(ValueError, match=r"positions.img = "):
        create_store(tmp_path / "s", make_spec(**{**vars(spec), "positions": {"img": moved}}))


def test_any_zarr_tool_can_open_it(full):
    store = full[0]
    array = zarr.open_array(store.path, path="sites/double.2.img", mode="r")
    assert array.attrs["dtype"] == "bfloat16" and array.dtype == np.uint16
    assert array.metadata.dimension_names == ("image", "step", "token", "d")
    assert zarr.open_array(store.path, path="images/prompt", mode="r")[1] == "a café number 1"
    places = zarr.open_array(store.path, path="tokens/img", mode="r")[:]
    assert places[5].tolist() == [1, 1]


def test_writing_again_and_in_another_order_gives_the_same_bytes(full, tmp_path):
    spec = make_spec()
    activations, pictures = content(spec)
    writer = create_store(tmp_path / "again", spec)
    for shard in (2, 0, 2, 1, 0):
        write(writer, shard, activations, pictures)
    same_files(full[0].path, tmp_path / "again")


def test_a_resumed_store_lacks_only_what_was_not_written(tmp_path, full):
    spec = make_spec()
    activations, pictures = content(spec)
    write(create_store(tmp_path / "s", spec), 1, activations, pictures)
    (tmp_path / "s/sites/double.2.img/c/0.0f.partial").write_bytes(b"left by a kill")
    writer = create_store(tmp_path / "s", make_spec(attrs=spec.attrs | {"versions": {"x": "2"}}))
    assert writer.pending() == [0, 2]
    store = open_store(tmp_path / "s")
    assert store.indices().tolist() == [4, 5, 6, 7]
    assert store.statistics("double.2.img").count == 4 * 3 * 12
    with pytest.raises(ValueError, match=r"image 8 .* is not harvested yet \(4 of 11 are\)"):
        store.read("double.2.img", [4, 8])
    for shard in writer.pending():
        write(writer, shard, activations, pictures)
    writer.sweep()
    same_files(full[0].path, tmp_path / "s")


def test_a_writer_killed_at_any_moment_leaves_a_store_that_can_go_on(tmp_path, full):
    code = f"""
import os, sys, threading, time
sys.path[:0] = {sys.path!r}
from harvest.store import create_store
from tests.harvest.synthetic import content, make_spec, write
spec = make_spec(); activations, pictures = content(spec)
threading.Thread(target=lambda: (time.sleep(float(sys.argv[2])), os.kill(os.getpid(), 9))).start()
while True:
    writer = create_store(sys.argv[1], spec)
    for shard in range(3):
        write(writer, shard, activations, pictures)
"""
    spec = make_spec()
    activations, pictures = content(spec)
    for number, delay in enumerate((0.01, 0.06)):
        path = tmp_path / str(number)
        done = subprocess.run([sys.executable, "-c", code, str(path), str(delay)], check=False)
        assert done.returncode == -9
        writer = create_store(path, spec)
        for shard in writer.pending():
            write(writer, shard, activations, pictures)
        writer.sweep()
        same_files(full[0].path, path)


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
