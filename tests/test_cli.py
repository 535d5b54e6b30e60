"""The front door: help, one clear line for a user's mistake, exit statuses."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harvest.store import create_store
from jaxdict import cli
from jaxdict.flags import settings_of
from jaxdict.sae import TrainSAEConfig
from tests.harvest.synthetic import make_spec


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "jaxdict", *words], capture_output=True, text=True)


def test_help_lists_every_verb(capsys):
    cli.main(["--help"])
    text = capsys.readouterr().out
    for verb in cli.VERBS:
        assert f"  {verb} " in text


def test_a_group_lists_its_verbs(capsys):
    cli.main(["train"])
    text = capsys.readouterr().out
    assert "train sae" in text
    assert "train itda" in text
    assert "harvest" not in text


@pytest.mark.parametrize("words", [["stere"], ["train", "saee"]])
def test_an_unknown_verb_is_one_line(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "expected one of" in error
    assert " ".join(words) in error


def test_a_users_mistake_is_one_line_and_debug_shows_the_traceback(tmp_path: Path):
    words = ["inspect", str(tmp_path / "nothing")]
    plain = run(*words)
    assert plain.returncode == 2
    assert len(plain.stderr.strip().splitlines()) == 1
    assert "nothing" in plain.stderr
    full = run(*words, "--debug")
    assert full.returncode == 1
    assert "Traceback" in full.stderr


def test_a_wrong_setting_names_the_flag(tmp_path: Path):
    done = run("demo", "--out", str(tmp_path / "demo"), "--k", "0")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "--k: expected at least 1, got 0" in done.stderr
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("missing", "words", "extra"),
    [
        ("torch", ["steer", "--dictionary", "d", "--prompt", "p", "--out", "o.png"], "flux"),
        ("jinja2", ["interp", "report", "--index", "i", "--out", "o"], "interp"),
    ],
)
def test_a_missing_package_names_the_extra_of_the_verb(missing, words, extra):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom jaxdict import cli; cli.main({words})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    said = f"jaxdict: this needs the package {missing}; run: pip install 'jaxdict[{extra}]'\n"
    assert done.stderr == said


def test_flags_of_settings_in_groups_are_their_own_names(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "sae", "--help"])
    text = capsys.readouterr().out
    flags = {word.strip(",") for word in text.split() if word.startswith("--")}
    assert {f"--{name.replace('_', '-')}" for name in settings_of(TrainSAEConfig)} <= flags
    groups = [name for name, value in TrainSAEConfig.__dict__.items() if hasattr(value, "check")]
    assert groups and not [group for group in groups if f"--{group.replace('_', '-')}." in text]


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("jaxdict ")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "store"
    create_store(path, make_spec())
    return str(path)


def closed_pipe(words, *, env=None, both=False):
    """`jaxdict ... |` into a process that reads nothing and has ended; `both` sends it the errors too."""
    reads, writes = os.pipe()
    os.close(reads)
    try:
        return subprocess.run(
            [sys.executable, "-m", "jaxdict", *words],
            stdout=writes,
            stderr=subprocess.STDOUT if both else subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )
    finally:
        os.close(writes)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("words", [["inspect", "STORE"], ["--help"], ["inspect", "--help"]])
def test_output_that_nobody_reads_ends_it_quietly(store, words, unbuffered):
    """Unbuffered, each line is written at once; else nothing is before the end."""
    words = [store if word == "STORE" else word for word in words]
    done = closed_pipe(words, env={"PYTHONUNBUFFERED": unbuffered})
    assert (done.returncode, done.stderr) == (141, "")


def test_with_head_its_first_line_is_all_there_is(store):
    with subprocess.Popen(
        [sys.executable, "-m", "jaxdict", "inspect", store],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as inspect:
        head = subprocess.run(["head", "-n", "1"], stdin=inspect.stdout, capture_output=True)
        inspect.stdout.close()
        assert inspect.stderr.read() == b""
    assert head.stdout.decode() == f"{store}: activation store\n"
    assert inspect.returncode in (0, 141)  # 0 if it was done before head was


def test_a_mistake_is_told_though_nobody_reads_the_output(tmp_path):
    done = closed_pipe(["inspect", str(tmp_path / "nothing")])
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert closed_pipe(["inspect", str(tmp_path / "nothing")], both=True).returncode == 141


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="needs a pipe of a known size")
def test_another_pipe_that_breaks_is_an_error(tmp_path):
    sites = {f"double.{i}.img": (12, 8) for i in range(60)}  # their JSON is longer than the pipe
    create_store(tmp_path / "store", make_spec(sites=sites, words=None))
    os.mkfifo(tmp_path / "out.json")
    pipe = os.open(tmp_path / "out.json", os.O_RDWR)
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 4096)
    words = ["inspect", str(tmp_path / "store"), "--out", str(tmp_path / "out.json")]
    with subprocess.Popen(
        [sys.executable, "-m", "jaxdict", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as inspect:
        os.read(pipe, 1)
        os.close(pipe)
        assert inspect.stderr.read() == "jaxdict: [Errno 32] Broken pipe\n"
    assert inspect.returncode == 2


def ask_for_memory(config):
    """A verb that makes an array of `itda_atoms`, unchecked."""
    return np.zeros(config.itda_atoms)


def test_memory_that_does_not_suffice_is_one_line_that_names_the_largest_settings(
    monkeypatch, capsys
):
    verb = cli.Verb("jaxdict.demo.config:DemoConfig", "tests.test_cli:ask_for_memory", "")
    monkeypatch.setitem(cli.VERBS, "ask", verb)
    with pytest.raises(SystemExit) as stop:
        cli.main(["ask", "--itda-atoms", str(10**17), "--rows", "77000000"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert f"got --itda-atoms {10**17}, --rows 77000000, --itda-rows 100000; lower" in error
