"""A full disk ends each verb in one line, and nothing half-written is left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from jaxdict import cli
from tests.full_disk import everything, refused
from tests.jaxdict.planted import SITE, write_planted_store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store, a run of each sort, and what is exported of them."""
    root = tmp_path_factory.mktemp("full")
    store = write_planted_store(root / "store")
    where = ["--store", str(store), "--site", SITE]
    sizes = ["--atoms", "32", "--k", "2", "--rows", "128", "--batch", "64"]
    cli.call(["train", "sae", *where, *sizes, "--out", str(root / "sae")])
    cli.call(["train", "itda", *where, *BUILT, "--out", str(root / "itda0")])
    shutil.copytree(root / "itda0", root / "itda1")
    cli.call(["export", str(root / "sae"), "--out", str(root / "dictionary")])
    return root


BUILT = ["--k", "2", "--threshold", "0.5"]


def verbs(root, out):
    dictionary, store = str(root / "dictionary"), ["--store", str(root / "store")]
    itda = [str(root / "itda0"), str(root / "itda1")]
    return {
        "export": ["export", str(root / "sae"), "--out", f"{out}/x"],
        "export itda": ["export", itda[0], "--out", f"{out}/x"],
        "prune": ["prune", dictionary, *store, "--keep", "8", "--out", f"{out}/x"],
        "eval": ["eval", dictionary, *store, "--no-random", "--out", f"{out}/x.json"],
        "compare": ["compare", *itda, "--out", f"{out}/x"],
        "inspect": ["inspect", *store[1:], "--plot", f"{out}/x"],
        "inspect json": ["inspect", dictionary, "--out", f"{out}/x.json"],
        "train itda": ["train", "itda", *store, "--site", SITE, *BUILT, "--out", f"{out}/x"],
    }


@pytest.mark.parametrize(
    ("name", "size"), [(name, 600) for name in verbs(Path(), Path())] + [("export", 0), ("eval", 0)]
)
def test_a_full_disk_is_one_line_and_leaves_nothing(made, tmp_path, capsys, name, size):
    refused(verbs(made, tmp_path)[name], size, capsys)
    left = {path for path in everything(tmp_path) if path.is_file()}
    assert not [path for path in left if path.name.startswith(".")]
    if name.split()[0] in ("export", "prune"):
        assert not everything(tmp_path)


def test_what_was_there_stays(made, tmp_path, capsys):
    words = verbs(made, tmp_path)["export"]
    cli.call(words)
    before = {path: path.read_bytes() for path in everything(tmp_path) if path.is_file()}
    refused(words, 600, capsys)
    after = {path: path.read_bytes() for path in everything(tmp_path) if path.is_file()}
    assert after == before and len(before) == 2
