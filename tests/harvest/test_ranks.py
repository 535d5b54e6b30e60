"""Several real processes fill one store: the same bits as one process leaves."""

import os
import subprocess
import sys

import pytest

from harvest.ranks import Ranks, joined_ranks
from harvest.store import open_store
from tests.harvest.synthetic import same_files

ARGUMENTS = (
    *("harvest", "--model", "shapes", "--sites", "double.2.img", "double.2.txt", "--images", "22"),
    *("--steps", "2", "--batch", "2", "--images-per-shard", "4", "--max-sequence-length", "16"),
    *("--device", "cpu"),
)


def start(out, processes):
    launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m")
    module = ("jaxdict",) if processes == 1 else (*launcher, "jaxdict")
    return subprocess.run(
        [sys.executable, "-m", *module, *ARGUMENTS, "--out", str(out)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "store"
    done = start(out, 1)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("processes", [2, 3])
def test_the_same_store_as_one_process(alone, tmp_path, processes):
    done = start(tmp_path / "store", processes)
    assert done.returncode == 0, done.stderr
    same_files(alone, tmp_path / "store")
    assert done.stdout.count("22 images (22 images made, 0 were there already)") == 1
    store = open_store(tmp_path / "store")
    assert store.statistics("double.2.img").count == 22 * 2 * 64


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_ranks() as ranks:
        assert ranks == Ranks(0, 1, 0) and ranks.device("cpu") == "cpu"
        ranks.wait()


def test_half_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="expected RANK, WORLD_SIZE"), joined_ranks():
        pass
