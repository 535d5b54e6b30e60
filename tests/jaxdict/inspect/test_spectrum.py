"""Spectra: those of scikit-learn on the same rows, from rows that are spread over the whole store."""

import numpy as np
import pytest
from sklearn.decomposition import PCA

from harvest.store import StoreSpec, create_store, open_store
from jaxdict.inspect.spectrum import Spectrum, sample_rows, spectrum

SITE = "double.0.img"


def make(path, values, *, finished=None, **spec):
    """A store of one site that holds `values` [image, step, token, d]."""
    images, steps, tokens, d = values.shape
    writer = create_store(
        path,
        StoreSpec(
            sites={SITE: (tokens, d)},
            images=images,
            steps=steps,
            prompts=[str(i) for i in range(images)],
            seeds=range(images),
            split=[0] * images,
            sigmas=np.linspace(1, 0.1, steps),
            timesteps=np.linspace(1000, 100, steps),
            grid=(1, tokens),
            **{"images_per_shard": 4, **spec},
        ),
    )
    for shard in writer.pending() if finished is None else finished:
        writer.write(shard, {SITE: values[writer.images_of(shard)]})
    return open_store(path)


def places(images, steps, tokens):
    """Rows that say where they are: image, step and token (small whole numbers are exact)."""
    grid = np.meshgrid(np.arange(images), np.arange(steps), np.arange(tokens), indexing="ij")
    return np.stack([*grid, np.ones_like(grid[0])], -1).astype(float)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(12, 12)) * np.exp(-np.arange(12) / 2)[:, None]
    return rng.normal(size=(10, 3, 7, 12)) @ basis + 50 * rng.normal(size=12)


def test_of_all_rows_it_is_that_of_scikit_learn(tmp_path, rows):
    store = make(tmp_path / "s", rows)
    found = spectrum(store, SITE, rows=10**6)
    stored = store.read(SITE).reshape(-1, 12).astype(np.float64)
    expected = PCA().fit(stored)
    assert found.rows == 210 and found.variances.dtype == np.float64
    np.testing.assert_allclose(found.variances, expected.explained_variance_ * 209 / 210, rtol=1e-9)
    cumulated = np.cumsum(expected.explained_variance_ratio_)
    np.testing.assert_allclose(found.cumulated, cumulated, rtol=1e-9)
    assert found.powers == [1, 2, 4, 8]
    assert [found.share(n) for n in (1, 4, 12, 99)] == pytest.approx(
        list(cumulated[[0, 3, 11, 11]])
    )
    assert found.components(0.9) == np.flatnonzero(cumulated >= 0.9)[0] + 1
    assert found.components(cumulated[4]) == 5 and found.components(1.0) <= 12


def test_fewer_rows_than_dimensions(tmp_path, rows):
    store = make(tmp_path / "s", rows[:2, :1, :4])
    found = spectrum(store, SITE, rows=8)
    expected = PCA().fit(store.read(SITE).reshape(-1, 12).astype(np.float64)).explained_variance_
    assert len(found.variances) == 8
    np.testing.assert_allclose(found.variances, expected * 7 / 8, atol=1e-12 * expected[0])


def test_rows_that_do_not_vary_have_no_shares(tmp_path):
    found = spectrum(make(tmp_path / "s", np.ones((4, 2, 3, 5))), SITE, rows=100)
    assert (found.variances == 0).all() and found.share(5) == 0 and found.components(0.9) == 5
    assert Spectrum(3, np.zeros(1)).powers == [1]


@pytest.mark.parametrize("chunk_bytes", [64, 200, 10**6])
@pytest.mark.parametrize("count", [2, 60, 10**6])
def test_sampled_rows_are_spread_over_the_store(tmp_path, chunk_bytes, count):
    values = places(40, 4, 16)
    store = make(tmp_path / "s", values, chunk_bytes=chunk_bytes)
    rows = sample_rows(store, SITE, rows=count)
    assert min(count, 2560) <= len(rows) <= max(2 * count, 64)
    assert (rows[:, 3] == 1).all()
    seen = [set(rows[:, axis].astype(int)) for axis in range(3)]
    assert len({tuple(row) for row in rows.astype(int)}) == len(rows)  # none twice
    if count >= 60:
        assert max(np.diff(sorted(seen[0]))) <= 7 and min(seen[0]) <= 3 and max(seen[0]) >= 36
        assert len(seen[1]) == 4 and len(seen[2]) >= 12
    if count >= 2560:
        assert len(rows) == 2560
    np.testing.assert_array_equal(rows, sample_rows(store, SITE, rows=count))


def test_only_finished_images_are_read(tmp_path):
    values = places(10, 2, 3)
    store = make(tmp_path / "s", values, finished=[1, 2], chunk_bytes=24)
    rows = sample_rows(store, SITE, rows=10**6)
    assert sorted({int(image) for image in rows[:, 0]}) == [4, 5, 6, 7, 8, 9]
    assert len(rows) == 36
    with pytest.raises(ValueError, match="no finished image yet"):
        spectrum(make(tmp_path / "e", values, finished=[]), SITE, rows=5)


def test_damaged_rows_are_named(tmp_path, rows):
    store = make(tmp_path / "s", rows)
    file = tmp_path / "s/sites" / SITE / "c/1/0/0/0"
    data = bytearray(file.read_bytes())
    data[40] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=rf"sites/{SITE} of .* from image 4 on .*--verify"):
        spectrum(store, SITE, rows=10**6)
