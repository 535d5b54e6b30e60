"""Memory in huge pages, where glibc's malloc has to be asked for them.

A training step allocates and frees arrays of tens of MB, each time in fresh 4 KiB pages, and page faults then take
a large share of its time. glibc reads the setting when a process begins, hence the restart.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

VARIABLE = "GLIBC_TUNABLES"
SETTING = "glibc.malloc.hugetlb=1"
_MODE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask() -> None:
    """Restart this process (same process id, arguments and open files) with malloc asking for huge pages.

    Does nothing if it would not help: on other systems, before glibc 2.35, if the kernel gives huge pages always
    or never, and if the user has set GLIBC_TUNABLES, even to nothing.
    """
    if VARIABLE in os.environ or not _useful():
        return
    os.environ[VARIABLE] = SETTING
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _useful() -> bool:
    if sys.platform != "linux" or not sys.executable:
        return False
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        major, minor = version.split(".")[:2]
        new = name == "glibc" and (int(major), int(minor)) >= (2, 35)
        return new and "[madvise]" in _MODE.read_text()
    except (ValueError, OSError):  # another C library, or no such file
        return False
