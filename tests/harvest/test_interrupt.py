"""What goes wrong in the middle: kills, full disks, wrong places. Nothing that was finished is lost."""

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from harvest.config import HarvestConfig
from harvest.run import harvest
from harvest.store import open_store
from tests.harvest.synthetic import same_files

PREPARE = """
import os, random, resource, signal, sys, time
sys.path[:0] = {path!r}
from pathlib import Path, PosixPath, WindowsPath
import torch
torch.set_num_threads(1)
import diffusers, transformers, zarr
from harvest.config import HarvestConfig
from harvest.run import harvest
from harvest.store import open_store
"""
KILLER = (
    PREPARE
    + """
def child(config):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        harvest(config)
        os._exit(0)
    return pid

random.seed({seed})
for out in sys.argv[1:]:
    config = {config!r}
    config = type(config)(**{{**vars(config), "out": Path(out)}})
    kills = 0
    while kills < 4:
        pid = child(config)
        time.sleep(random.uniform(0.0, {longest}))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):  # it was done before the kill: start over
            assert os.waitstatus_to_exitcode(status) == 0
            break
        kills += 1
    _, status = os.waitpid(child(config), 0)
    assert status == 0
    print("killed", kills, flush=True)
"""
)


@pytest.fixture
def config(tmp_path):
    return HarvestConfig(
        out=tmp_path / "whole",
        sites=("double.2.*", "single.0.img.update"),
        images=12,
        steps=2,
        batch=2,
        images_per_shard=4,
        max_sequence_length=16,
        device="cpu",
    )


def run(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(config, tmp_path):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        harvest(config)
    finally:
        torch.set_num_threads(threads)
    stores = [tmp_path / f"cut{i}" for i in range(4)]
    code = KILLER.format(path=sys.path, config=config, seed=7, longest=2.5)
    done = run(code, *stores)
    assert done.returncode == 0, done.stderr
    kills = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("killed")]
    assert len(kills) == 4 and sum(kills) >= 10, done.stdout
    for store in stores:
        same_files(config.out, store)


def test_a_full_disk_ends_in_one_line_and_loses_nothing(config, tmp_path):
    """A limit on the size of files stands in for the disk: the same call fails in the same way."""
    code = (
        PREPARE.format(path=sys.path)
        + f"""
config = {replace(config, images=8)!r}
harvest(config)
open_store(config.out)
(config.out.parent / "first.txt").write_text("8")
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    harvest(type(config)(**{{**vars(config), "out": Path(str(config.out) + "-full")}}))
except OSError as error:
    print("OSError:", error)
"""
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    line = done.stdout.strip().splitlines()[-1]
    assert line.startswith("OSError: images 0 to 3 could not be written to"), line
    assert "File too large" in line and "what was finished is kept" in line
    full = open_store(str(config.out) + "-full")
    assert not full.done.any() and not [
        p for p in full.path.rglob("*") if p.suffix in (".partial", ".tmp")
    ]
    again = harvest(replace(config, images=8, out=full.path))
    assert again["made"] == 8
    same_files(config.out, full.path)


@pytest.mark.parametrize(
    ("what", "limit", "line"),
    [
        ("making", 4_000, r"the store .*/store cannot be made: .*File too large"),
        (
            "text",
            20_000,
            r"encoded prompts could not be written to .*/\.store\.text: .*File too large",
        ),
    ],
)
def test_a_disk_that_is_full_before_the_first_image_is_told_in_one_line(
    tmp_path, what, limit, line
):
    letters = np.random.default_rng(0).integers(97, 123, (40, 9_000 if what == "making" else 50))
    (tmp_path / "p.txt").write_bytes(b"\n".join(row.astype(np.uint8).tobytes() for row in letters))
    flags = ["harvest", "--prompts", str(tmp_path / "p.txt"), "--steps", "1", "--device", "cpu"]
    flags += ["--images-per-shard", "1" if what == "making" else "8", "--offload", "text"]
    flags += ["--max-sequence-length", "16", "--no-pictures", "--out", str(tmp_path / "out/store")]
    code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from jaxdict.cli import main
main({flags!r})
"""
    done = run(code)
    assert done.returncode == 2
    told = [line for line in re.split(r"[\r\n]+", done.stderr) if line.strip() and "%|" not in line]
    assert told.pop(0).startswith("note: 40 of 40 prompts are longer"), done.stderr
    assert len(told) == 1 and re.match("jaxdict: " + line, told[0]), done.stderr
    left = [
        path.name
        for path in tmp_path.rglob("*")
        if path.name.endswith((".new", ".partial", ".tmp"))
    ]
    assert not left


def test_a_place_that_cannot_be_written_is_told_in_one_line(config, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match=r"file/store cannot be made: .*file is, or lies in, a file"):
        harvest(replace(config, out=tmp_path / "file" / "store"))


def test_another_store_is_refused_by_field_and_values(config):
    harvest(replace(config, images=2))
    with pytest.raises(ValueError, match=r"compress = \"none\", but \"zstd\" was asked for"):
        harvest(replace(config, images=2, compress="zstd"))
