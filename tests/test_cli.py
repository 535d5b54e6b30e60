"""The front door: help, one clear line for a user's mistake, exit statuses."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxdict import cli


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


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out.startswith("jaxdict ")
