"""Shards read without zarr hold what zarr reads, and damage is told."""

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec

from harvest.schema import chunk_shape
from harvest.shards import Shards, is_plain
from harvest.store import create_store, open_store
from tests.harvest.synthetic import make_spec

SITE = "double.2.img"


def make(path, *, images=11, chunk_bytes=200, **changes):
    spec = make_spec(
        images, sites={SITE: (12, 8)}, chunk_bytes=chunk_bytes, picture=None, **changes
    )
    writer = create_store(path, spec)
    rng = np.random.default_rng(0)
    for shard in writer.pending():
        where = writer.images_of(shard)
        bits = rng.integers(0, 2**14, (where.stop - where.start, 3, 12, 8)).astype(np.uint16)
        writer.write(shard, {SITE: bits})
    return open_store(path)


@pytest.fixture(scope="module", params=[32, 200, 600, 1200, 10**6], ids="chunks of {} bytes".format)
def store(request, tmp_path_factory):
    """Chunks of a third of an image's tokens, of a step, of an image, of two, and of a whole shard."""
    return make(tmp_path_factory.mktemp("shards") / "s", chunk_bytes=request.param)


@settings(deadline=None, max_examples=60)
@given(
    images=st.lists(st.integers(0, 10), min_size=1, max_size=14),
    steps=st.none() | st.lists(st.integers(0, 2), min_size=1, max_size=4),
)
def test_any_images_and_steps_in_any_order_are_what_zarr_reads(store, images, steps):
    array = store.group[f"sites/{SITE}"]
    assert is_plain(array)
    expected = array[:][images]
    if steps is not None:
        expected = expected[:, steps]
    np.testing.assert_array_equal(store.read_bits(SITE, images, steps), expected)


def test_each_layout_is_there():
    """The chunks that the fixture asks for do differ."""
    shapes = [chunk_shape((4, 3, 12, 8), target=n) for n in (32, 200, 600, 1200, 10**6)]
    assert shapes == [(1, 1, 2, 8), (1, 1, 12, 8), (1, 3, 12, 8), (2, 3, 12, 8), (4, 3, 12, 8)]


def test_what_was_never_written_is_zero(tmp_path):
    holes = zarr.create_array(
        tmp_path / "holes",
        shape=(4, 3, 12, 8),
        chunks=(1, 1, 12, 8),
        shards=(4, 3, 12, 8),
        dtype="uint16",
        filters=None,
        compressors=(Crc32cCodec(),),
    )
    holes[1, 2] = 7
    out, two = np.ones((2, 3, 12, 8), np.uint16), np.array([0, 1])
    Shards(holes, tmp_path / "holes", np.arange(3)).read(two, out, two)
    assert (out == holes[0:2]).all() and out.sum() == 7 * 12 * 8


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_only_plain_shards_are_read_so(tmp_path, compress):
    store = make(tmp_path / "s", compress=compress)
    assert is_plain(store.group[f"sites/{SITE}"]) == (compress == "none")
    assert not is_plain(store.group["images/seed"])


def damage_chunk(data):
    data[50] ^= 1


def damage_index(data):
    data[-10] ^= 1


def cut(data):
    del data[10:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage_chunk, "checksum do not match"),
        (damage_index, "checksum do not match"),
        (cut, "the file ends too early"),
        (None, "No such file"),
    ],
)
def test_damage_is_told_by_site_and_image(tmp_path, change, message):
    store = make(tmp_path / "s")
    path = tmp_path / "s/sites" / SITE / "c/1/0/0/0"
    data = bytearray(path.read_bytes())
    if change is None:
        path.unlink()
    else:
        change(data)
        path.write_bytes(data)
    with pytest.raises(
        ValueError, match=rf"sites/{SITE}, image 4, .* cannot be read \(.*{message}"
    ):
        store.read(SITE, [0, 4, 9])
    assert store.read(SITE, [0, 9]).shape == (2, 3, 12, 8)
