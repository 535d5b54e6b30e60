"""The activation store on a real disk: what is written is read, resumed, and never half there."""

import subprocess
import sys

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from harvest.store import create_store, open_store
from harvest.store.bfloat16 import finite, from_bits, to_bits
from harvest.store.schema import chunk_shape
from tests.harvest.synthetic import SITES, content, make_spec, same_files, write


@settings(deadline=None)
@given(arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)))
def test_bits_are_rounded_as_torch_rounds_them(values):
    torch = pytest.importorskip("torch")
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bits(to_bits(values)), expected)


def test_every_pattern_of_bits_is_read_as_it_is_and_rounded_back():
    bits = np.arange(2**16, dtype=np.uint16)
    values = from_bits(bits)
    np.testing.assert_array_equal(values.view(np.uint32), bits.astype(np.uint32) << 16)
    np.testing.assert_array_equal(to_bits(values)[~np.isnan(values)], bits[~np.isnan(values)])
    assert set(to_bits(values)[np.isnan(values)].tolist()) == {0x7FC0}
    np.testing.assert_array_equal(finite(bits), np.isfinite(values))


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_each_value_is_rounded_to_the_nearest_and_ties_to_even(low):
    bits = np.arange(2**16, dtype=np.uint32)
    values = (bits << 16 | low).view(np.float32)
    up = (low > 0x8000) | ((low == 0x8000) & (bits & 1 == 1))
    number = ~np.isnan(values)
    np.testing.assert_array_equal(to_bits(values)[number], (bits + up)[number])


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
