"""A training asks for huge pages by starting anew, as the same process, once, unless the user said otherwise."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdict.devices import huge_pages

CODE = """
import os, sys
from jaxdict.devices import huge_pages
huge_pages.ask()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES", "unset"), *sys.argv[1:])
"""


def told(**env):
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "a word", "--and-a=flag"],
        env={**{k: v for k, v in os.environ.items() if k != huge_pages.VARIABLE}, **env},
        stdout=subprocess.PIPE,
        text=True,
    )
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return out.split(maxsplit=2), process.pid


def test_it_starts_anew_as_the_same_process_with_the_same_words():
    (pid, setting, words), own = told()
    wanted = huge_pages.SETTING if huge_pages._useful() else "unset"
    assert (int(pid), setting, words.strip()) == (own, wanted, "a word --and-a=flag")


@pytest.mark.parametrize("chosen", ["", "glibc.malloc.hugetlb=0"])
def test_the_users_own_setting_stays(chosen):
    (pid, *rest), own = told(GLIBC_TUNABLES=chosen)
    assert int(pid) == own
    assert " ".join(rest).strip().startswith(f"{chosen} a word".strip())


@pytest.mark.skipif(not huge_pages._useful(), reason="needs glibc and a kernel that can be asked")
def test_a_training_has_them(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != huge_pages.VARIABLE}
    words = [
        "train",
        "sae",
        "--store",
        tmp_path,
        "--site",
        "double.2.img",
        "--out",
        tmp_path / "run",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxdict", *words], env=env, stderr=subprocess.PIPE, text=True
    )
    found = False
    while not found and process.poll() is None:
        with contextlib.suppress(OSError):
            seen = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            found = f"{huge_pages.VARIABLE}={huge_pages.SETTING}".encode() in seen
    _, complaint = process.communicate(timeout=60)
    assert found and process.returncode == 2 and "store" in complaint
