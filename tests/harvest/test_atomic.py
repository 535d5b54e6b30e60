"""Files and folders stay whole: through exceptions, kills and full disks."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from harvest.atomic import read_json, whole_file, whole_folder, write_json

PREPARE = f"""
import os, resource, sys, time
sys.path[:0] = {sys.path!r}
from pathlib import Path
from harvest.atomic import whole_file, whole_folder, write_json
path = Path(sys.argv[1])
"""
FILE = """
with whole_file(path) as draft:
    with draft.open("wb") as file:
        file.write(bytes(50_000))
        file.flush()
        print("half", flush=True)
        time.sleep({seconds})
        file.write(bytes(50_000))
"""
FOLDER = """
with whole_folder(path) as draft:
    (draft / "first").write_bytes(bytes(5_000))
    print("half", flush=True)
    time.sleep({seconds})
    (draft / "second").write_bytes(bytes(50_000))
"""
JSON = "write_json(path, list(range(50_000)))"


def make(kind: str, folder: Path) -> Path:
    """What is there before."""
    path = folder / "old"
    if kind == "folder":
        path.mkdir()
        (path / "first").write_text("[1]")
    else:
        path.write_text("[1]")
    return path


def old(path: Path) -> str:
    return (path / "first" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_exception_leaves_the_old_one_and_nothing_else(tmp_path, kind, error):
    path = make(kind, tmp_path)
    with (
        pytest.raises(type(error)),
        (whole_file if kind == "file" else whole_folder)(path) as draft,
    ):
        (draft if kind == "file" else draft / "first").write_text("[1, ")
        raise error
    assert old(path) == "[1]" and os.listdir(tmp_path) == ["old"]


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = make("json", tmp_path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")}, allow_nan=False)
    assert old(path) == "[1]" and os.listdir(tmp_path) == ["old"]


@pytest.mark.parametrize(("kind", "code"), [("file", FILE), ("folder", FOLDER)])
def test_killed_in_the_middle_the_old_one_can_be_read_and_replaced(tmp_path, kind, code):
    path = make(kind, tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE + code.format(seconds=60), str(path)], stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"half\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert old(path) == "[1]"
    left = [name for name in os.listdir(tmp_path) if name != "old"]
    assert left and all(name.startswith(".old.") and name.endswith(".tmp") for name in left)

    again = PREPARE + code.format(seconds=0)
    subprocess.run([sys.executable, "-c", again, str(path)], check=True, capture_output=True)
    file = path / "second" if kind == "folder" else path
    assert file.read_bytes() == bytes(100_000 if kind == "file" else 50_000)


@pytest.mark.parametrize(("kind", "code"), [("file", FILE), ("folder", FOLDER), ("json", JSON)])
def test_a_full_disk_leaves_the_old_one_and_nothing_else(tmp_path, kind, code):
    """A limit on the size of files stands in for the disk: the same call fails in the same way."""
    path = make(kind, tmp_path)
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + limit + code.format(seconds=0), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "File too large" in done.stderr.splitlines()[-1]
    assert old(path) == "[1]" and os.listdir(tmp_path) == ["old"]


@pytest.fixture(params=[0o022, 0o002, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_permissions_are_those_that_the_umask_gives(tmp_path, umask):
    tensors = {"x": np.arange(3.0)}
    with whole_file(tmp_path / "file") as draft:
        save_file(tensors, draft)
    for _ in range(2):  # new, and in place of another
        with whole_folder(tmp_path / "folder") as draft:
            (draft / "inner").mkdir()
            save_file(tensors, draft / "inner" / "file")
            (draft / "card.json").write_text("{}")
    write_json(tmp_path / "json", {})
    np.testing.assert_array_equal(load_file(tmp_path / "file")["x"], tensors["x"])
    for path in tmp_path.rglob("*"):
        assert permissions(path) == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_folder_takes_the_place_of_all_that_was_there(tmp_path):
    path = make("folder", tmp_path)
    with whole_folder(path) as draft:
        (draft / "second").write_text("2")
        assert old(path) == "[1]"
    assert os.listdir(path) == ["second"] and os.listdir(tmp_path) == ["old"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path):
    path = make("folder", tmp_path)
    with pytest.raises(FileNotFoundError), whole_folder(path) as draft:
        draft.rename(tmp_path / "lost")
    assert old(path) == "[1]" and sorted(os.listdir(tmp_path)) == ["lost", "old"]


def test_json_is_read_as_it_was_written(tmp_path):
    value = {"b": [1.5, None, "ä"], "a": {"path": tmp_path}}
    path = write_json(tmp_path / "x.json", value)
    assert read_json(path) == {"b": [1.5, None, "ä"], "a": {"path": str(tmp_path)}}
    assert list(json.loads(path.read_text())) == ["b", "a"] and "ä" in path.read_text("utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1', r"expected JSON in .*x\.json, got a damaged file \(Expecting"),
        (b"\xff\xfe", r"expected JSON in .*x\.json, got a damaged file \('utf-8' codec"),
        (b"[1]", r"expected a JSON object in .*x\.json, got list"),
    ],
)
def test_json_that_is_none_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "x.json")


def test_a_pipe_or_a_device_is_written_to_and_stays_one(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reads = os.open(pipe, os.O_RDWR)
    try:
        write_json(pipe, {"a": 1})
        assert json.loads(os.read(reads, 100)) == {"a": 1}
    finally:
        os.close(reads)
    assert pipe.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_symbolic_link_stays_one(tmp_path):
    (tmp_path / "inner").mkdir()
    path = make("file", tmp_path / "inner")
    (tmp_path / "link").symlink_to(path)
    write_json(tmp_path / "link", [2])
    assert (tmp_path / "link").is_symlink() and json.loads(old(path)) == [2]
    assert os.listdir(path.parent) == ["old"]
