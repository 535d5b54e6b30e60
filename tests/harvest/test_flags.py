"""Checks of settings, and of what they would take."""

import re
from pathlib import Path

import pytest

from harvest.flags import in_memory, machine_memory

MEMINFO = Path("/proc/meminfo")


def test_what_fits_passes_and_what_does_not_names_every_flag():
    in_memory(["batch"], 8, machine_memory(), "the pictures")
    said = (
        "--batch: expected what fits into this machine's .* of memory (the pictures would take 4 PB), "
        "got 1000000; lower --batch or --num-steps"
    )
    pattern = re.escape(said).replace(r"\.\*", ".*")
    with pytest.raises(ValueError, match=pattern):
        in_memory(["batch", "num_steps"], 1_000_000, 4e15, "the pictures")


@pytest.mark.skipif(not MEMINFO.is_file(), reason="needs Linux's /proc")
def test_the_machines_memory_is_what_the_system_says():
    meminfo = MEMINFO.read_text()
    kilobytes = int(re.search(r"MemTotal:\s+(\d+)", meminfo)[1])
    assert machine_memory() == pytest.approx(kilobytes * 1024, rel=0.02)
