"""Scanning a store: a sound one passes, and each way to be unsound is found and named."""

import hashlib
import shutil

import numpy as np
import pytest
import zarr

from harvest.store import create_store, open_store, to_bits
from harvest.store.verify import verify_store
from tests.harvest.synthetic import SITES, content, make_spec, write

SITE = "double.2.img"


def fill(path, spec, shards=None, change=None):
    activations, pictures = content(spec)
    if change is not None:
        change(activations, pictures)
    writer = create_store(path, spec)
    for shard in writer.pending() if shards is None else shards:
        write(writer, shard, activations, pictures)
    return path


def picked(images, count, total, seed=0):
    rng = np.random.default_rng(seed)
    return np.sort([rng.choice(total, count, replace=False) for _ in range(images)]).astype(int)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A store with an inner chunk for each image: 3 steps x 12 tokens x 8 x 2 bytes."""
    spec = make_spec(chunk_bytes=576)
    return fill(tmp_path_factory.mktemp("verify") / "sound", spec)


@pytest.fixture
def path(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "store")
    return tmp_path / "store"


def verify(path):
    return verify_store(open_store(path), progress=False)


@pytest.mark.parametrize(
    ("change", "shards"),
    [
        ({}, None),
        ({}, [1]),
        ({}, []),
        ({"compress": "zstd"}, None),
        ({"picture": None, "words": None}, None),
        ({"denoising_steps": 6, "step_numbers": (0, 2, 5)}, None),
        (
            {
                "sites": {"double.2.img": (4, 8), "double.2.txt": (5, 8)},
                "positions": {"img": picked(11, 4, 12)},
            },
            None,
        ),
    ],
)
def test_a_sound_store_has_no_problem(tmp_path, change, shards):
    spec = make_spec(**change)
    activations, pictures = content(spec)
    writer = create_store(tmp_path / "s", spec)
    for shard in writer.pending() if shards is None else shards:
        where = writer.images_of(shard)
        writer.write(
            shard,
            {site: values[where] for site, values in activations.items()},
            None if spec.picture is None else pictures[where],
        )
    assert verify(tmp_path / "s") == []


def test_zeros_are_sound_though_zarr_may_leave_them_out(tmp_path):
    def clear(activations, pictures):
        activations[SITE][:] = 0
        activations["double.2.txt"][:4] = 0

    assert verify(fill(tmp_path / "s", make_spec(), change=clear)) == []


def test_the_bar_can_be_left_out(path, capfd):
    assert verify_store(open_store(path)) == []
    assert "verify: 100%" in capfd.readouterr().err
    assert verify_store(open_store(path), progress=False) == []
    assert capfd.readouterr().err == ""


def files(path):
    return sorted(p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json")


def test_each_file_that_is_damaged_or_missing_is_found(tmp_path):
    spec = make_spec(images=6, sites={SITE: (12, 8)})
    activations, pictures = content(spec)
    path = tmp_path / "s"
    writer = create_store(path, spec)
    for shard in writer.pending():
        write(writer, shard, activations, pictures)
    found = files(path)
    rooms = {file.relative_to(path).parts[0] for file in found}
    assert rooms == {"sites", "statistics", "norms", "images", "steps", "tokens", "shards"}
    rng = np.random.default_rng(0)
    for file in found:
        name = file.relative_to(path).as_posix()
        store = open_store(path)
        data = file.read_bytes()
        bad = bytearray(data)
        bad[rng.integers(len(bad))] ^= 1 << rng.integers(8)
        file.write_bytes(bad)
        problems = verify_store(store, progress=False)
        assert any(name in line for line in problems), name
        assert all("\n" not in line for line in problems)
        file.unlink()
        # Without its flags a shard counts as not made yet.
        assert bool(verify(path)) == (not name.startswith("images/done")), name
        file.write_bytes(data)
    assert verify(path) == []


def test_damage_is_narrowed_to_its_images(path):
    file = path / "sites" / SITE / "c/1/0/0/0"
    data = bytearray(file.read_bytes())
    for image in (1, 3):  # the chunks of a shard lie one after the other: 576 bytes and a checksum
        data[image * 580 + 100] ^= 1
    file.write_bytes(data)
    problems = verify(path)
    assert len(problems) == 2
    for line, image in zip(problems, (5, 7), strict=True):
        assert line.startswith(f"sites/{SITE}, image {image} cannot be read: ")
        assert f"sites/{SITE}/c/1/0/0/0 is damaged" in line and "checksum" in line


@pytest.mark.parametrize("keep", [0, 10, -1])
def test_a_file_that_was_cut_off_is_found(path, keep):
    file = path / "sites" / SITE / "c/2/0/0/0"
    file.write_bytes(file.read_bytes()[:keep])
    assert any(
        f"sites/{SITE}, images 8 to 10 cannot be read: sites/{SITE}/c/2/0/0/0" in line
        for line in verify(path)
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"sites/{SITE}/c/1/0/0/0", f"sites/{SITE}, images 4 to 7 is missing: "),
        (
            f"statistics/{SITE}/c/1/0/0/0",
            f"statistics/{SITE}, shard 1 (images 4 to 7) is missing: ",
        ),
        (f"norms/{SITE}/c/1/0/0", f"norms/{SITE}, shard 1 (images 4 to 7) is missing: "),
        ("images/picture/c/1/0/0/0", "images/picture, images 4 to 7 is missing: "),
    ],
)
def test_a_missing_file_is_named(path, name, message):
    (path / name).unlink()
    assert verify(path) == [message + name]


def test_done_flags_and_stamps_must_agree(path):
    group = zarr.open_group(path, mode="r+")
    group["images/done"][5] = 0
    group["shards/stamp"][2] = 0
    assert verify(path) == [
        "shard 1 (images 4 to 7) is done in part: image 5 is not",
        "shard 2 (images 8 to 10) is marked done, but has no stamp",
    ]
    group["images/done"][4:8] = 0  # cut off between its stamp and its flags: made again
    group["shards/stamp"][2] = group["shards/stamp"][0]
    assert verify(path) == []


def test_a_shard_of_another_store_is_found_though_it_came_later(path):
    store = open_store(path)
    zarr.open_group(path, mode="r+")["shards/stamp"][1] = 7
    assert verify_store(store, progress=False) == [
        "shard 1 (images 4 to 7) was written for another store"
    ]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_placed(path, value):
    array = zarr.open_group(path, mode="r+")[f"sites/{SITE}"]
    bits = array[:]
    bits[6, 2, 5, 3] = bits[7, 0, 1, 0] = to_bits(np.float32([value]))[0]
    array[:] = bits
    assert verify(path) == [
        f"sites/{SITE}, shard 1 (images 4 to 7), holds NaN or infinity in 2 rows: the first at "
        "image 6, captured step 2, token 5"
    ]


def test_statistics_that_are_not_those_of_the_rows_are_found(path):
    group = zarr.open_group(path, mode="r+")
    sums, counts = group[f"statistics/{SITE}"], group[f"norms/{SITE}"]
    right = sums[1, 2, 0, 3]
    sums[1, 2, 0, 3] = right * (1 + 1e-13)
    assert verify(path) == []
    sums[1, 2, 0, 3] = right + 0.01
    place = int(np.flatnonzero(counts[2, 1])[0])
    counts[2, 1, place] -= 1
    first, second = verify(path)
    assert first.startswith(
        f"statistics/{SITE}, shard 1 (images 4 to 7), disagrees with the rows: at captured step 2, "
        "dimension 3, the sum is "
    )
    assert second.startswith(
        f"norms/{SITE}, shard 2 (images 8 to 10), disagrees with the rows: at captured step 1, "
        f"bin {place} counts "
    )


def test_rows_that_were_exchanged_are_found(path):
    array = zarr.open_group(path, mode="r+")[f"sites/{SITE}"]
    array[0:4] = array[4:8]
    problems = verify(path)
    assert any(line.startswith(f"statistics/{SITE}, shard 0 (images 0 to 3)") for line in problems)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images/prompt", "another", "the fingerprint of the attributes, prompts and seeds is"),
        ("images/seed", 5, "the fingerprint of the attributes, prompts and seeds is"),
        ("steps/number", 5, r"steps/number is [5, 1, 2], but the attributes say [0, 1, 2]"),
    ],
)
def test_what_defines_the_store_must_be_as_it_was(path, name, value, message):
    zarr.open_group(path, mode="r+")[name][0] = value
    (problem,) = verify(path)
    assert problem.startswith(message)


def test_positions_must_be_as_they_were(tmp_path):
    where = picked(11, 4, 12)
    sites = {"double.2.img": (4, 8), "double.2.txt": (5, 8)}
    path = fill(tmp_path / "s", make_spec(sites=sites, positions={"img": where}))
    zarr.open_group(path, mode="r+")["images/picked_img"][3] = [0, 1, 2, 3]
    assert verify(path) == ["images/picked_img is not what the store was made with"]


def test_scanning_changes_nothing(path):
    before = {
        file: hashlib.sha256(file.read_bytes()).digest()
        for file in path.rglob("*")
        if file.is_file()
    }
    verify(path)
    after = {
        file: hashlib.sha256(file.read_bytes()).digest()
        for file in path.rglob("*")
        if file.is_file()
    }
    assert before == after and len(SITES) == 3
