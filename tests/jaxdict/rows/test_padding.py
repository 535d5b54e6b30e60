"""Rows that are padding of the text are left out: which, in which order, and what a user is told of them."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from harvest.store import open_store
from jaxdict.rows import Loader, SinglePass, print_padding, side_by_side, source_of
from jaxdict.rows import source as source_file
from tests.jaxdict.texts import IMAGE, OTHER, SITE, STEPS, TOKENS, lengths, write_text_store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(write_text_store(tmp_path_factory.mktemp("texts") / "store"))


def unpadded(store, site, images, steps=(0, 1)):
    """The rows that are no padding, in store order: uint16 [n, d], and their places."""
    bits, real = store.read_bits(site), lengths()
    places = [(i, s, t) for i in images for s in steps for t in range(real[i])]
    return np.stack([bits[place] for place in places]), np.array(places)


def take(loader, count, start=0):
    batches = loader.batches(start)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def test_rows_are_those_before_the_padding_in_store_order(store, monkeypatch):
    monkeypatch.setattr(source_file, "_BLOCK_BYTES", 700)  # several blocks
    source = source_of(store, SITE)
    rows, places = unpadded(store, SITE, source.images)
    assert source.rows == len(rows) and source.rows + source.left_out == 32 * STEPS * TOKENS
    np.testing.assert_array_equal(source.read(source.images), rows)
    np.testing.assert_array_equal(source.places(source.images), places)
    some = source.images[[9, 2, 4]]
    np.testing.assert_array_equal(source.read(some), unpadded(store, SITE, some)[0])
    blocks = list(source.blocks())
    assert len(blocks) > 2
    np.testing.assert_array_equal(np.concatenate([block.bits for block in blocks]), rows)
    for place, step in enumerate(source.steps):
        found = np.concatenate([block.at_step(place) for block in blocks])
        np.testing.assert_array_equal(found, unpadded(store, SITE, source.images, [step])[0])
    second = source_of(store, SITE, split="all", steps=(1,)).spread(30)
    assert 0 < abs(second.rows - 30) < 15 and second.steps == (1,)
    wanted = unpadded(store, SITE, second.images, [1])[0]
    np.testing.assert_array_equal(second.read(second.images), wanted)
    (both,) = itertools.islice(side_by_side(second.blocks(), second.beside(OTHER)), 1)
    target = unpadded(store, OTHER, both.images, [1])[0]
    np.testing.assert_array_equal(both.bits[:, second.d :], target)


def test_an_epoch_is_every_unpadded_row_once_whatever_the_memory_and_goes_on_anywhere(store):
    source = source_of(store, SITE)
    options = {"batch": 13, "seed": 3, "pool": 60}
    resident, blocks = (Loader(source, memory=memory, **options) for memory in (2**30, 0))
    assert resident.pools > 2 and resident.resident and not blocks.resident
    wanted = take(resident, 60)
    np.testing.assert_array_equal(take(blocks, 60), wanted)
    stream = np.concatenate(wanted)
    rows = Counter(row.tobytes() for row in unpadded(store, SITE, source.images)[0])
    for epoch in range(2):
        part = stream[epoch * source.rows : (epoch + 1) * source.rows]
        assert Counter(row.tobytes() for row in part) == rows
    assert not np.array_equal(stream[: source.rows], stream[source.rows : 2 * source.rows])
    for start in (1, 5, 17, 18, 40, 57):
        np.testing.assert_array_equal(take(blocks, 3, start), wanted[start : start + 3])


def test_a_single_pass_gives_exactly_the_rows_that_are_asked_for_and_none_twice(store):
    source = source_of(store, SITE)
    bits, real = store.read_bits(SITE), lengths()
    for asked, count in ((0, source.rows), (50, 50)):
        once = SinglePass(
            source, batch=16, seed=0, pool=60, rows=asked, target=source.beside(OTHER)
        )
        batches = list(once.read())
        places = np.concatenate([batch.places[: batch.count] for batch in batches])
        assert once.rows == len(places) == len(np.unique(places, axis=0)) == count
        assert (places[:, 2] < real[places[:, 0]]).all()
        rows = np.concatenate([batch.bits[: batch.count] for batch in batches])
        np.testing.assert_array_equal(rows, bits[tuple(places.T)])
        partner = np.concatenate([batch.target[: batch.count] for batch in batches])
        np.testing.assert_array_equal(partner, store.read_bits(OTHER)[tuple(places.T)])
        rest = list(once.read(2))
        np.testing.assert_array_equal(rest[0].bits, batches[2].bits)


def test_kept_and_image_rows_and_those_of_a_store_that_cannot_tell_are_all_rows(
    store, tmp_path, capsys
):
    silent = open_store(write_text_store(tmp_path / "silent", words=False))
    for one, site, padding in (
        (store, SITE, "keep"),
        (store, IMAGE, "drop"),
        (silent, SITE, "drop"),
    ):
        source = source_of(one, site, padding=padding)
        assert source.tokens is None and source.left_out == 0
        np.testing.assert_array_equal(
            source.read(source.images).ravel(), one.read_bits(site, source.images).ravel()
        )
        print_padding([source])
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"padding: kept at {SITE}"
    assert len(told) == 2 and f"{silent.path} does not say which" in told[1]
    print_padding([source_of(store, site) for site in (SITE, OTHER, IMAGE)])
    rows = 2 * source_of(store, SITE).rows
    (line,) = capsys.readouterr().out.splitlines()
    assert (
        f"{2 * 32 * STEPS * TOKENS - rows:,} of {2 * 32 * STEPS * TOKENS:,} rows of 2 text" in line
    )


def test_of_a_sample_of_tokens_those_that_are_padding_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    picked = np.stack([np.sort(rng.permutation(TOKENS)[:5]) for _ in range(40)]).astype(np.int32)
    store = open_store(write_text_store(tmp_path / "store", picked=picked))
    source = source_of(store, SITE)
    real = picked < lengths()[:, None]
    assert not real.any(1).all()
    np.testing.assert_array_equal(store.unpadded(SITE), real.sum(1))
    train = [i for i in range(40) if i % 5 and real[i].any()]
    np.testing.assert_array_equal(source.images, train)
    bits = store.read_bits(SITE)
    wanted = np.concatenate([bits[i, s, real[i]] for i in train for s in range(STEPS)])
    np.testing.assert_array_equal(source.read(source.images), wanted)
