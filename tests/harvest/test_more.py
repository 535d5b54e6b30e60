"""A finished store takes more images and more sites, to the same bits as one that was made so at once."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import zarr

from harvest.config import HarvestConfig
from harvest.run import harvest
from harvest.store import open_store, verify_store
from tests.harvest.synthetic import same_files
from tests.harvest.test_interrupt import PREPARE, run

IMG, TXT, MLP = "double.2.img", "double.1.txt", "single.0.img.mlp"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Processes that a test starts have one too, on which the bits depend."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return HarvestConfig(
        out=tmp_path_factory.mktemp("more") / "first",
        sites=(IMG,),
        images=5,
        steps=1,
        batch=2,
        images_per_shard=4,
        max_sequence_length=16,
        device="cpu",
    )


@pytest.fixture(scope="module")
def whole(base):
    """What the tests end with: a store of 11 images at three sites, made at once."""
    config = replace(base, out=base.out.with_name("whole"), sites=(IMG, TXT, MLP), images=11)
    harvest(config)
    return config


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tokens_per_image": 20, "compress": "zstd", "offload": "text", "pictures": False},
        {"quantize": "nf4", "batch": 0, "images_per_shard": 0},
    ],
)
def test_images_then_sites_then_both_are_what_one_harvest_makes(base, whole, tmp_path, change):
    config = replace(base, out=tmp_path / "s", **change)
    harvest(config)
    assert harvest(replace(config, images=7))["made"] == 2
    summary = harvest(replace(config, images=7, sites=(TXT,)))
    assert (summary["made"], summary["added"]) == (0, [TXT])
    summary = harvest(replace(config, images=11, sites=(MLP, TXT, IMG)))
    assert (summary["made"], summary["added"]) == (4, [MLP])
    once = whole.out
    if change:
        once = tmp_path / "once"
        harvest(replace(whole, out=once, **change))
    same_files(once, tmp_path / "s")
    assert harvest(replace(config, images=0, sites=(IMG, TXT, MLP)))["made"] == 0
    assert not list(tmp_path.glob(".*"))
    assert verify_store(open_store(config.out), progress=False) == []
    passes = json.loads((tmp_path / "s.passes.json").read_text())["passes"]
    assert [(p["images"], p["made"], p["added"]) for p in passes] == [
        *((5, 5, []), (7, 2, []), (7, 0, [TXT]), (11, 4, [MLP])),
    ]
    assert all(p["finished"] and p["differs"] is None for p in passes)


def test_sites_that_are_there_are_not_made_again(base, tmp_path):
    config = replace(base, out=tmp_path / "s")
    harvest(config)
    before = {p: p.stat().st_mtime_ns for p in config.out.rglob(f"{IMG}/c/*") if p.is_file()}
    before |= {p: p.stat().st_mtime_ns for p in config.out.rglob("picture/c/**/*") if p.is_file()}
    harvest(replace(config, sites=(IMG, TXT)))
    assert before and {p: p.stat().st_mtime_ns for p in before} == before


def test_more_prompts_in_the_file_are_more_images(base, tmp_path):
    file = tmp_path / "p.txt"
    file.write_text("a ring\na star\na cross\n")
    config = replace(base, out=tmp_path / "s", prompts=str(file), images=0, validation=0.5)
    harvest(config)
    split = open_store(config.out).split
    file.write_text("a ring\na star\na cross\na disk\na square\n")
    harvest(config)
    harvest(replace(config, out=tmp_path / "once"))
    same_files(tmp_path / "once", tmp_path / "s")
    np.testing.assert_array_equal(open_store(config.out).split[:3], split)
    file.write_text("a ring\na star\na dot\na disk\na square\nsix\n")
    with pytest.raises(ValueError, match=r'prompts.* = .*"a cross".*, but .*"a dot".* was asked'):
        harvest(config)
    assert open_store(config.out).images == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 10}, r"a store with images = 11, but 10 was asked for; it takes more images"),
        (
            {"images": 12, "sites": (IMG,)},
            r'a store with sites = \["double.1.txt", .* it takes more',
        ),
        ({"images": 12, "validation": 0.3}, r"config.validation = 0.2, but 0.3"),
        ({"images": 12, "seed": 1}, r"config.seed = 0, but 1"),
        ({"sites": ("double.0.img",), "batch": 3}, r"config.batch = 2, but 3"),
    ],
)
def test_a_smaller_or_contradicting_request_is_refused(whole, change, message):
    before = {p: p.stat().st_mtime_ns for p in whole.out.rglob("*")}
    for dry in (False, True):
        with pytest.raises(ValueError, match=message):
            harvest(replace(whole, dry_run=dry, **change))
    assert {p: p.stat().st_mtime_ns for p in whole.out.rglob("*")} == before


def test_a_reader_that_held_the_store_open_reads_on(base, tmp_path):
    config = replace(base, out=tmp_path / "s")
    harvest(config)
    store = open_store(config.out)
    before, count = store.read(IMG), store.statistics(IMG).count
    assert count == 5 * 64
    harvest(replace(config, images=11, sites=(IMG, TXT)))
    np.testing.assert_allclose(store.read(IMG), before, rtol=0.01, atol=0.01)
    np.testing.assert_array_equal(store.read(IMG, slice(4)), before[:4])
    assert len(store.prompts) == len(store.done) == len(store.indices()) == 5
    statistics = store.statistics(IMG)
    assert statistics.count == 8 * 64  # its last shard has them now
    rows = open_store(config.out).read(IMG, slice(8)).reshape(-1, 128)
    np.testing.assert_allclose(statistics.mean, rows.mean(0, dtype=np.float64), atol=1e-6)


KILLER = (
    PREPARE
    + """
import numpy as np
first, more = {first!r}, {more!r}
rows = open_store(first.out).read("double.2.img", slice(4))

def child(config):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        harvest(config)
        os._exit(0)
    return pid

random.seed(3)
killed = 0
for out in sys.argv[1:]:
    config = type(more)(**{{**vars(more), "out": Path(out)}})
    for _ in range(6):
        pid = child(config)
        time.sleep(random.uniform(0.0, {longest}))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            break
        killed += 1
        store = open_store(out)  # as it was, or finished just before the kill
        assert store.images in (5, 11) and np.array_equal(store.read("double.2.img", slice(4)), rows)
    _, status = os.waitpid(child(config), 0)
    assert status == 0
print("killed", killed, flush=True)
"""
)


@pytest.mark.slow
def test_killed_at_random_moments_a_pass_ends_with_the_same_bits(base, whole, tmp_path):
    harvest(base)
    stores = [tmp_path / f"cut{i}" for i in range(3)]
    for store in stores:
        subprocess.run(["cp", "-r", base.out, store], check=True)
    more = replace(whole, out=tmp_path / "none")
    done = run(KILLER.format(path=sys.path, first=base, more=more, longest=1.5), *stores)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 6, done.stdout
    for store in stores:
        same_files(whole.out, store)


def test_rows_that_another_machine_would_make_otherwise_are_told(base, tmp_path, capsys):
    config = replace(base, out=tmp_path / "s")
    harvest(config)
    capsys.readouterr()
    file = tmp_path / "s.passes.json"
    file.write_text(file.read_text().replace('"threads": 1', '"threads": 64'))
    harvest(replace(config, images=6))
    assert "differ" not in capsys.readouterr().out  # looked at, and the same
    assert json.loads(file.read_text())["passes"][-1]["differs"] == 0
    array = zarr.open_group(config.out)[f"sites/{IMG}"]
    array[1, 0, 0, :8] = 0
    harvest(replace(config, images=6, sites=(TXT,)))
    line = [line for line in capsys.readouterr().out.splitlines() if "differ" in line]
    assert len(line) == 1 and f"rows of {IMG} made here differ from those stored by" in line[0]


def test_a_dry_run_tells_what_a_second_pass_would_add(whole, capsys):
    expected = harvest(
        replace(whole, images=15, sites=(IMG, TXT, MLP, "double.0.img"), dry_run=True)
    )
    out = capsys.readouterr().out
    assert "not added to (--dry-run)" in out and "images   4 more, 15 in all, of 1 step" in out
    assert "at 4 sites, double.0.img added" in out
    assert (expected["images"], expected["sites"]) == (4, ("double.0.img",))
    assert expected["rows"] == 15 * 64 + 4 * (64 + 16 + 64)
    values = 15 * 64 * 128 + 4 * (64 * 128 + 16 * 128 + 64 * 512)
    assert expected["store_bytes"] == 2 * values + 4 * 64 * 64 * 3


def test_a_second_start_says_who_is_at_work_and_a_killed_one_leaves_nothing_in_the_way(
    base, tmp_path
):
    config = replace(base, out=tmp_path / "s", images=20, offload="text")
    flags = (
        f"harvest --sites {IMG} --images 20 --steps 1 --batch 2 --images-per-shard 4 --device cpu"
    )
    more = ("--offload", "text", "--max-sequence-length", "16", "--out", str(config.out))
    first = subprocess.Popen(
        [sys.executable, "-m", "jaxdict", *flags.split(), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    lock = tmp_path / ".s.lock"
    try:
        for there in (lock, tmp_path / "s"):  # while it loads, and while it works
            while not there.exists() or not lock.read_text():
                assert first.poll() is None
                time.sleep(0.01)
            who = rf"process {first.pid} on \S+ since 20"
            with pytest.raises(ValueError, match=rf"s is being harvested by {who}.*; wait until"):
                harvest(config)
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert lock.exists() and open_store(config.out).images == 20
    harvest(config)
    harvest(replace(config, out=tmp_path / "once"))
    same_files(tmp_path / "once", config.out)
    assert not list(tmp_path.glob(".*"))
