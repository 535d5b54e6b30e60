"""Comparing two stores: against NumPy on all rows at once, and what cannot be compared is refused."""

from dataclasses import replace

import numpy as np
import pytest

from harvest.store import StoreSpec, create_store, open_store
from harvest.store.differences import check_alike, compare_site

SITES = {"double.0.img": (6, 8), "single.0.txt": (3, 8)}
SPEC = StoreSpec(
    sites=SITES,
    images=9,
    steps=3,
    prompts=[f"prompt {i}" for i in range(9)],
    seeds=range(9),
    split=[0] * 9,
    sigmas=[1.0, 0.5, 0.25],
    timesteps=[1000.0, 500.0, 250.0],
    grid=(2, 3),
    images_per_shard=4,
)


def make(path, spec=SPEC, *, seed=0, noise=0.0):
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 1)
    values = {}
    for site, shape in spec.sites.items():
        values[site] = rng.normal(size=(spec.images, spec.steps, *shape))
        values[site] += noise * other.normal(size=values[site].shape)
        values[site][::3, 1, 0] = 0  # zero rows in both
    if noise:
        values["single.0.txt"][-1, 2, 1] = 0  # and one in one of them
    writer = create_store(path, spec)
    for shard in writer.pending():
        writer.write(shard, {site: rows[writer.images_of(shard)] for site, rows in values.items()})
    return open_store(path)


@pytest.fixture
def pair(tmp_path):
    small = replace(SPEC, images_per_shard=3, chunk_bytes=200)
    return make(tmp_path / "a"), make(tmp_path / "b", small, noise=0.1)


def reference(a, b):
    """Relative error and mean cosine of rows [..., d], all at once."""
    a, b = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (a, b))
    sizes = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    with np.errstate(invalid="ignore"):
        cosines = (a * b).sum(1) / sizes
    both = (a == 0).all(1) & (b == 0).all(1)
    cosines = np.where(sizes == 0, both, cosines)
    return np.linalg.norm(a - b) / np.linalg.norm(a), cosines.mean()


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("images", [range(9), [0, 2, 3, 7], [8]])
@pytest.mark.parametrize("at_once", [1, 700, 2**20])
def test_errors_and_cosines_are_those_of_all_rows_at_once(pair, site, images, at_once):
    first, second = pair
    images = np.array(images)
    seen = []
    found = compare_site(first, second, site, images, at_once=at_once, on_read=seen.append)
    a, b = first.read(site, images), second.read(site, images)
    assert sum(seen) == 2 * 2 * a.size
    assert found.rows.tolist() == [len(images) * SITES[site][0]] * 3
    for step in range(3):
        error, cosine = reference(a[:, step], b[:, step])
        assert found.error(step) == pytest.approx(error, rel=1e-12)
        assert found.cosine(step) == pytest.approx(cosine, rel=1e-12)
    assert (found.error(), found.cosine()) == pytest.approx(reference(a, b), rel=1e-12)
    assert 0.05 < found.error() < 0.5 and 0.8 < found.cosine() < 1


def test_a_store_is_like_itself(pair):
    found = compare_site(pair[0], pair[0], "double.0.img", np.arange(9))
    assert found.error() == 0 and found.cosine() == pytest.approx(1, abs=1e-12)


def test_a_site_of_zeros_has_no_relative_error(tmp_path):
    stores = []
    for name, value in (("zero", 0.0), ("one", 1.0)):
        writer = create_store(tmp_path / name, SPEC)
        for shard in writer.pending():
            count = writer.images_of(shard)
            shape = (count.stop - count.start, 3)
            writer.write(shard, {s: np.full((*shape, *size), value) for s, size in SITES.items()})
        stores.append(open_store(tmp_path / name))
    zero, one = stores
    images = np.arange(9)
    found = compare_site(zero, one, "double.0.img", images)
    assert found.error() is None and found.error(1) is None and found.cosine() == 0
    assert compare_site(one, zero, "double.0.img", images).error() == 1
    found = compare_site(zero, zero, "double.0.img", images)
    assert found.error() == 0 and found.cosine() == 1


def check(tmp_path, **changes):
    first, second = make(tmp_path / "a"), make(tmp_path / "b", replace(SPEC, **changes))
    check_alike(first, second, first.sites, second.sites)


def test_stores_that_differ_in_how_they_were_made_are_alike(tmp_path):
    check(
        tmp_path,
        images_per_shard=5,
        chunk_bytes=100,
        compress="zstd",
        attrs={"model": {"name": "toy", "quantization": "nf4"}},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"prompts": [f"prompt {i}" for i in range(8)] + ["new"]},
            r"the prompt of image 8 is 'prompt 8' in .*a and 'new' in .*b",
        ),
        (
            {"seeds": [0, 1, 2, 3, 4, 55, 6, 7, 8]},
            r"the seed of image 5 is 5 in .*a and 55 in .*b",
        ),
        (
            {"step_numbers": (0, 1, 3), "denoising_steps": 4},
            r"the steps captured is \[0, 1, 2\] in .*a and \[0, 1, 3\] in .*b",
        ),
        ({"sigmas": [1.0, 0.6, 0.25]}, r"the sigma of the steps is \[1.0, 0.5, 0.25\] in .*0.6"),
        (
            {"sites": {"double.0.img": (6, 8), "single.0.txt": (3, 4)}},
            r"the shape of single.0.txt is \(3, 3, 8\) in .*a and \(3, 3, 4\) in .*b",
        ),
        (
            {"sites": {"double.0.img": (6, 8), "single.1.txt": (3, 8)}},
            r"single.0.txt is in .*a and not in .*b .*choose what both have by --sites",
        ),
    ],
)
def test_what_differs_is_named_with_both_values(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check(tmp_path, **changes)


def test_numbers_of_images_and_of_steps_must_be_the_same(tmp_path):
    first = make(tmp_path / "a")
    few = {name: getattr(SPEC, name)[:8] for name in ("prompts", "seeds", "split")}
    second = make(tmp_path / "b", replace(SPEC, images=8, **few))
    with pytest.raises(ValueError, match=r"the number of images is 9 in .*a and 8 in .*b"):
        check_alike(first, second, first.sites, second.sites)
    two = {"steps": 2, "sigmas": [1.0, 0.5], "timesteps": [1000.0, 500.0]}
    second = make(tmp_path / "c", replace(SPEC, **two))
    with pytest.raises(ValueError, match=r"the number of captured steps is 3 in .*a and 2 in .*c"):
        check_alike(first, second, first.sites, second.sites)


def test_samples_of_tokens_must_be_the_same(tmp_path):
    sites = {"double.0.img": (2, 8), "single.0.txt": (3, 8)}
    where = np.tile([1, 4], (9, 1))
    spec = replace(SPEC, sites=sites, positions={"img": where})
    first, same = make(tmp_path / "a", spec), make(tmp_path / "b", spec, noise=0.1)
    check_alike(first, same, first.sites, same.sites)
    moved = where.copy()
    moved[3] = [1, 5]
    other = make(tmp_path / "c", replace(spec, positions={"img": moved}))
    with pytest.raises(
        ValueError,
        match=r"that double.0.img keeps of image 3 is \[1, 4\] in .*a and \[1, 5\] in .*c",
    ):
        check_alike(first, other, first.sites, other.sites)
