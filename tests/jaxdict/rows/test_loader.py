"""The loader's order: pure, complete, mixed, independent of memory, restartable anywhere."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from harvest.store import open_store
from jaxdict.rows.loader import Loader
from jaxdict.rows.prefetch import ahead
from jaxdict.rows.source import floats, side_by_side, source_of
from tests.jaxdict.planted import SITE, write_planted_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(write_planted_store(tmp_path_factory.mktemp("data") / "store"))


def take(loader, count, start=0):
    batches = loader.batches(start)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def rows_of(batches):
    return [row.tobytes() for batch in batches for row in batch]


def test_an_epoch_is_every_training_row_once_and_no_validation_row(store):
    source = source_of(store, SITE)
    loader = Loader(source, batch=64, seed=0, pool=300)
    assert source.rows == 32 * 2 * 16 and loader.pools > 2
    seen = Counter(rows_of(take(loader, source.rows // 64)))
    train = store.read_bits(SITE, images=store.indices("train")).reshape(-1, source.d)
    assert seen == Counter(row.tobytes() for row in train)
    held = store.read_bits(SITE, images=store.indices("validation")).reshape(-1, source.d)
    assert not seen.keys() & {row.tobytes() for row in held}


def test_order_depends_on_seed_and_epoch_only_not_on_memory(store):
    source = source_of(store, SITE)
    options = {"batch": 48, "pool": 300}
    wanted = take(Loader(source, seed=3, **options), 60)
    resident = Loader(source, seed=3, memory=2**30, **options)
    blocks = Loader(source, seed=3, memory=0, **options)
    assert resident.resident and not blocks.resident
    np.testing.assert_array_equal(take(resident, 60), wanted)
    np.testing.assert_array_equal(take(blocks, 60), wanted)
    assert not np.array_equal(take(Loader(source, seed=4, **options), 1), wanted[:1])
    per_epoch = source.rows // 16
    loader = Loader(source, batch=16, seed=3, pool=300)
    first, second = take(loader, 4), take(loader, 4, start=per_epoch)
    assert not np.array_equal(first, second), "the second epoch should be shuffled anew"


@pytest.mark.parametrize("start", [1, 5, 6, 21, 22, 100, 1003])
def test_any_batch_is_reached_without_the_ones_before(store, start):
    loader = Loader(source_of(store, SITE), batch=48, seed=1, pool=300)
    everything = take(loader, start + 3)
    np.testing.assert_array_equal(take(loader, 3, start=start), everything[start:])


def test_a_batch_mixes_images_and_steps(store):
    source = source_of(store, SITE)
    place = {}
    bits = store.read_bits(SITE, images=source.images)
    for image, step, token in np.ndindex(bits.shape[:3]):
        place[bits[image, step, token].tobytes()] = (image, step)
    batch = take(Loader(source, batch=64, seed=0, pool=300), 1)
    images, steps = zip(*(place[row] for row in rows_of(batch)), strict=True)
    assert len(set(images)) >= 7 and set(steps) == {0, 1}


def test_steps_filter_and_spread(store):
    source = source_of(store, SITE, steps=(1,))
    rows = set(rows_of(take(Loader(source, batch=64, seed=0, pool=300), 16)))
    wanted = store.read_bits(SITE, images=source.images, steps=[1]).reshape(-1, source.d)
    assert rows == {row.tobytes() for row in wanted}
    few = source_of(store, SITE).spread(5 * 32)
    assert len(few.images) == 5 and few.images[0] == source.images[0]
    assert few.images[-1] == source.images[-1]


def test_floats_are_the_stores_floats(store):
    bits = store.read_bits(SITE, images=[0, 3])
    np.testing.assert_array_equal(
        floats(bits), store.read(SITE, images=[0, 3]).reshape(-1, bits.shape[-1])
    )


def test_bad_requests_say_what_is_there(store, tmp_path):
    with pytest.raises(ValueError, match=r"double\.2\.img.*got 'double\.9\.img'"):
        source_of(store, "double.9.img")
    with pytest.raises(ValueError, match=r"below 2.*got \[7\]"):
        source_of(store, SITE, steps=(0, 7))
    empty = open_store(write_planted_store(tmp_path / "s", images=8, validation=0))
    with pytest.raises(ValueError, match="validation images"):
        source_of(empty, SITE, split="validation")


def test_ahead_keeps_order_raises_errors_and_stops_its_thread():
    with ahead(iter(range(100)), depth=3) as items:
        assert list(items) == list(range(100))

    def broken():
        yield 1
        raise OSError("disk gone")

    with ahead(broken()) as items, pytest.raises(OSError, match="disk gone"):
        list(items)
    closed = []

    def endless():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    with ahead(endless()) as items:
        next(items)
    assert closed == [True]


def test_a_row_and_its_target_are_read_side_by_side(tmp_path):
    path = write_planted_store(tmp_path / "pair", images=8, more={"double.3.img.mlp": (16, 9)})
    store = open_store(path)
    source = source_of(store, SITE, steps=(1,))
    target = source.beside("double.3.img.mlp")
    (both,) = side_by_side(source.blocks(), target)
    np.testing.assert_array_equal(both.images, source.images)
    np.testing.assert_array_equal(both.bits[:, : source.d], source.read(both.images))
    np.testing.assert_array_equal(both.bits[:, source.d :], target.read(both.images))
    (alone,) = side_by_side(source.blocks(), None)
    np.testing.assert_array_equal(alone.bits, source.read(alone.images))
