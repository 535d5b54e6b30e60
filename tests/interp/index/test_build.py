from __future__ import annotations

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
import torch

from harvest.store import StoreSpec, create_store, open_store
from interp.config import IndexConfig
from interp.index.arrays import FILES, load_index
from interp.index.build import build_index
from interp.index.examples import HeatMaps, example_ranks
from interp.index.postings import CodeStatistics
from interp.index.words import split_words, telling_words
from jaxdict.dictionary.arrays import Dictionary
from jaxdict.dictionary.files import save_dictionary
from steer.coder import Coder
from tests.reference import coder as slow


def dense_codes(world, name, site, images):
    """The obvious way: every code of every row, [images, steps, tokens, m]."""
    coder = Coder.from_pretrained(world.root / name)
    return coder.encode(torch.from_numpy(world.activations[site][images])).dense(coder.m).numpy()


@pytest.fixture(scope="module")
def dense(world):
    return dense_codes(world, "sae_img", "double.0.img", world.store.indices("validation"))


def test_statistics_equal_the_dense_ones(world, dense):
    index = world.index
    active = dense > 0
    np.testing.assert_allclose(index.density, active.mean((0, 1, 2)))
    np.testing.assert_array_equal(index.image_count, active.any((1, 2)).sum(0))
    np.testing.assert_array_equal(index.maximum, dense.max((0, 1, 2)))
    count = np.maximum(active.sum((0, 1, 2)), 1)
    np.testing.assert_allclose(
        index.mean, dense.sum((0, 1, 2), dtype=np.float64) / count, rtol=1e-5
    )
    np.testing.assert_allclose(index.step_mean.T, dense.mean((0, 2), dtype=np.float64), rtol=1e-5)
    np.testing.assert_allclose(index.step_density.T, active.mean((0, 2)), rtol=1e-6)
    for feature in range(index.m):
        values = dense[..., feature][active[..., feature]]
        bins = index.histogram.shape[1]
        top = max(index.maximum[feature], np.float32(1e-30))
        place = np.minimum((values / top * bins).astype(int), bins - 1)
        np.testing.assert_array_equal(index.histogram[feature], np.bincount(place, minlength=bins))


def test_examples_are_the_strongest_images_once_each(world, dense):
    index, images = world.index, world.store.indices("validation")
    for feature in range(index.m):
        best = dense[..., feature].max((1, 2))
        order = np.lexsort((images, -best))[: index.facts["top"]]
        expected = [int(images[place]) for place in order if best[place] > 0]
        found = index.example_image[feature]
        top = found[: index.facts["top"]]
        assert top[top >= 0].tolist() == expected
        assert len(set(found[found >= 0])) == (found >= 0).sum()
        for column in index.examples(feature):
            image, step = found[column], index.example_step[feature, column]
            heat = dense[int(np.flatnonzero(images == image)[0]), step, :, feature]
            np.testing.assert_array_equal(index.heat(feature, int(column)), heat)
            token = index.example_token[feature, column]
            assert heat[token] == index.example_value[feature, column] == heat.max() > 0


def test_planted_features_are_found(world):
    summary, names = world.summary, world.names
    assert summary["features"] == 12 and summary["alive"] == len(names)
    for attribute, values in (
        ("colour", names[:3]),
        ("background", names[3:5]),
        ("position", names[5:]),
    ):
        found = summary["attributes"][attribute]
        assert found["median_auroc"] == 1
        for value in values:
            assert found["tags"][value]["feature"] == names.index(value)
    assert len(summary["clearest"]) == 5
    assert len({entry["value"] for entry in summary["clearest"]}) == 5
    assert 0 < summary["fvu"] < 0.2
    assert summary == json.loads((world.root / "index" / "summary.json").read_text())


def test_fvu_and_l0_equal_the_direct_formula(world, dense):
    images = world.store.indices("validation")
    x = world.activations["double.0.img"][images].astype(np.float64).reshape(-1, 16)
    atoms = Coder.from_pretrained(world.root / "sae_img").dictionary.atoms
    error = ((x - dense.reshape(-1, 12) @ atoms) ** 2).sum()
    assert world.summary["fvu"] == pytest.approx(error / ((x - x.mean(0)) ** 2).sum(), rel=1e-5)
    assert world.summary["l0"] == pytest.approx((dense > 0).sum(-1).mean())


def test_words_go_with_their_features(world):
    index = world.index
    for feature, name in enumerate(world.names):
        assert index.facts["words"][index.word[feature, 0]] == name
        prompts = dict(zip(index.facts["images"], index.facts["prompts"], strict=True))
        have = sum(name in split_words(prompt) for prompt in prompts.values())
        assert index.word_with[feature, 0] + index.word_without[feature, 0] == have
    assert (index.word[len(world.names) :] == -1).all()


def test_word_counts_and_log_odds_by_hand():
    prompts = ["red disc", "red star", "RED; disc red", "blue disc", "blue star", "blue disc"]
    few = telling_words(prompts, np.zeros(3, int), np.arange(3), m=2, keep=3)
    assert few.vocabulary == ["blue", "disc", "red", "star"]
    assert (few.word == -1).all()  # three images are not enough for a word to be listed
    many = prompts * 4
    strong = np.flatnonzero(["red" in prompt.lower() for prompt in many])
    words = telling_words(many, np.zeros(12, int), strong, m=2, keep=3)
    assert [words.vocabulary[place] for place in words.word[0] if place >= 0] == ["red"]
    assert (words.inside[0, 0], words.outside[0, 0]) == (12, 0)
    assert words.log_odds[0, 0] == pytest.approx(np.log(12.5 / 0.5) - np.log(0.5 / 12.5))
    assert words.z[0, 0] == pytest.approx(words.log_odds[0, 0] / np.sqrt(2 / 12.5 + 2 / 0.5))
    assert (words.word[1] == -1).all()


def test_words_are_split_in_any_script():
    assert split_words("A l'été, a Cat-fish's 漢字!") == ["a", "l'été", "cat-fish's", "漢字"]


def test_batches_of_any_size_give_the_same_arrays(world):
    """Growing in small steps loses nothing, and ties stay in the order of the images."""
    rng = np.random.default_rng(0)
    indices = np.argsort(rng.random((9, 2, 3, 5)), -1)[..., :2].astype(np.int32)
    values = rng.integers(0, 3, indices.shape).astype(np.float32)
    results = []
    for size in (9, 1, 4):
        statistics = CodeStatistics(5, 2, 3)
        for low in range(0, 9, size):
            statistics.add(indices[low : low + size], values[low : low + size])
        postings = statistics.postings()
        ranks = example_ranks(postings.start, top=3, quantiles=2)
        entry = ranks[ranks >= 0]
        maps = HeatMaps(
            postings.feature[entry],
            postings.image[entry],
            postings.row[entry] // 3,
            maximum=statistics.maximum,
            steps=2,
            bins=4,
        )
        for low in range(0, 9, size):
            maps.add(indices[low : low + size], values[low : low + size])
        results.append(
            [*postings, ranks, statistics.active, statistics.total, maps.histogram, *maps.result()]
        )
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)
    statistics = CodeStatistics(5, 2, 3)
    statistics.add(indices, values)
    found = statistics.postings()
    for feature in range(5):
        part = slice(found.start[feature], found.start[feature + 1])
        key = list(zip(-found.value[part], found.image[part], strict=True))
        assert key == sorted(key)


def test_example_ranks_spread_evenly():
    start = np.asarray([0, 0, 2, 5, 6, 103])
    ranks = example_ranks(start, top=3, quantiles=4)
    assert ranks[0].tolist() == [-1] * 7
    assert ranks[1].tolist() == [0, 1, -1, -1, -1, -1, -1]
    assert ranks[2].tolist() == [2, 3, 4, -1, -1, -1, -1]
    assert ranks[4, :3].tolist() == [6, 7, 8]
    weaker = ranks[4, 3:] - 9
    assert (np.diff(weaker) > 0).all() and 0 < weaker[0] < 20 and 80 < weaker[3] < 97 - 3
    assert example_ranks(np.asarray([0, 5]), top=3, quantiles=4)[0].tolist() == [
        0,
        1,
        2,
        3,
        4,
        -1,
        -1,
    ]
    assert example_ranks(np.asarray([0, 5]), top=2, quantiles=0)[0].tolist() == [0, 1]


def test_itda_keeps_its_sources(world, tmp_path):
    config = IndexConfig(
        dictionary=world.root / "itda", store=world.root / "store", out=tmp_path / "index"
    )
    build_index(config)
    index = load_index(tmp_path / "index")
    source = Coder.from_pretrained(world.root / "itda").dictionary.source
    np.testing.assert_array_equal(index.source, source)
    assert index.facts["source_prompts"] == [world.store.prompts[i] for i in source[:, 0]]


def test_a_transcoder_is_indexed_at_its_input_and_measured_at_its_target(tmp_path):
    rng = np.random.default_rng(3)
    site, target, shape = "double.0.img", "double.0.img.mlp", (10, 2, 4)
    x, y = (rng.standard_normal((*shape, d)).astype(np.float32) for d in (5, 7))
    spec = StoreSpec(
        sites={site: (4, 5), target: (4, 7)},
        images=10,
        steps=2,
        prompts=[f"prompt {image}" for image in range(10)],
        seeds=list(range(10)),
        split=[image % 2 for image in range(10)],
        sigmas=[1.0, 0.5],
        timesteps=[1000.0, 500.0],
        grid=(2, 2),
    )
    store_path = tmp_path / "store"
    writer = create_store(store_path, spec)
    for shard in writer.pending():
        part = writer.images_of(shard)
        writer.write(shard, {site: x[part], target: y[part]})
    encoder, atoms = (rng.standard_normal((12, d)).astype(np.float32) for d in (5, 7))
    zeros, bias = np.zeros(12, np.float32), np.ones(7, np.float32)

    def index_of(target):
        threshold = np.linspace(0, 2, 12, dtype=np.float32)
        card = {"site": site, "target": target}
        dictionary = Dictionary(
            "jumprelu", 6, atoms, bias, encoder, zeros, threshold, typical=zeros, card=card
        )
        save_dictionary(dictionary, tmp_path / "transcoder")
        out = tmp_path / "index"
        build_index(IndexConfig(dictionary=tmp_path / "transcoder", store=store_path, out=out))
        return dictionary, load_index(out)

    dictionary, index = index_of(target)
    store = open_store(store_path)
    held = store.indices("validation")
    dense = slow.encode(dictionary, store.read(site, images=held).reshape(-1, 5))
    np.testing.assert_allclose(index.maximum, dense.max(0), rtol=1e-5)
    rows = store.read(target, images=held).reshape(-1, 7).astype(np.float64)
    error = np.square(rows - slow.decode(dictionary, dense)).sum()
    wanted = error / np.square(rows - rows.mean(0)).sum()
    assert index.facts["fvu"] == pytest.approx(wanted, rel=1e-5)
    # A store without the target says when features fire all the same.
    _, other = index_of("double.9.img")
    assert other.facts["fvu"] is None
    np.testing.assert_array_equal(other.maximum, index.maximum)


def test_text_stream(world, tmp_path):
    config = IndexConfig(
        dictionary=world.root / "sae_txt", store=world.root / "store", out=tmp_path / "index"
    )
    build_index(config)
    index = load_index(tmp_path / "index")
    assert index.facts["stream"] == "txt" and index.facts["tokens"] == 9
    red = [
        world.store.words[image][token]
        for image, token in zip(index.example_image[0], index.example_token[0], strict=True)
    ]
    assert Counter(red) == {"red": len(red)}


def test_every_option_does_something(world, tmp_path):
    base = IndexConfig(
        dictionary=world.root / "sae_img", store=world.root / "store", out=tmp_path / "index"
    )

    def index_with(**changes):
        build_index(dataclasses.replace(base, **changes))
        return load_index(tmp_path / "index")

    small = index_with(images=30, steps=(1,), top=3, quantiles=2, bins=5, words=1, batch=1)
    assert len(small.facts["images"]) == 30 and small.facts["rows"] == 30 * 16
    assert small.facts["steps"] == [1] and set(small.example_step[0]) == {1}
    assert small.example_image.shape == (12, 5) and small.histogram.shape == (12, 5)
    assert small.word.shape == (12, 1)
    np.testing.assert_array_equal(
        small.maximum,
        dense_codes(world, "sae_img", "double.0.img", small.facts["images"])[:, 1].max((0, 1)),
    )
    other = index_with(images=30, seed=1)
    assert other.facts["images"] != small.facts["images"]
    train = index_with(split="train")
    assert train.facts["images"] == world.store.indices("train").tolist()
    assert len(index_with(split="all", device="cpu", quantiles=0, words=0).facts["images"]) == 120


def test_the_folder_holds_four_files_and_is_replaced_whole(world, tmp_path):
    config = IndexConfig(
        dictionary=world.root / "sae_img", store=world.root / "store", out=tmp_path / "x" / "index"
    )
    for _ in range(2):
        build_index(config)
        assert {file.name for file in config.out.iterdir()} == set(FILES)
        assert [file.name for file in config.out.parent.iterdir()] == ["index"]
    (config.out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"notes\.txt"):
        build_index(config)
    assert (config.out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"site": "double.9.img"}, "expected a site of the store"),
        ({"steps": (2,)}, r"captured indices below 2 \(of the denoising steps 0, 1\), got \[2\]"),
        *(
            ({name: 10**12}, f"^--{name}: expected what fits .* would take .*, got {10**12}; lower")
            for name in ("bins", "top", "quantiles", "words")
        ),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(world, tmp_path, changes, message):
    config = IndexConfig(
        dictionary=world.root / "sae_img",
        store=world.root / "store",
        out=tmp_path / "out" / "index",
        **changes,
    )
    with pytest.raises(ValueError, match=message):
        build_index(config)
    assert not config.out.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"top": 0},
        {"images": -1},
        {"steps": (0, 0)},
        {"bins": 1},
        {"split": "test"},
        {"device": "x"},
    ],
)
def test_bad_settings_name_the_flag(world, changes):
    name = next(iter(changes))
    with pytest.raises(ValueError, match=f"--{name}: expected .*, got .*; "):
        IndexConfig(dictionary=world.root, store=world.root, out=world.root, **changes)
