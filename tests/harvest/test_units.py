"""Sizes and times as a person reads them."""

import pytest

from harvest.units import duration, size


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1.5e9, "1.5 GB"),
        (2e12, "2 TB"),
        (3e15, "3 PB"),
        (4e18, "4e+03 PB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (59, "59 s"), (60, "1 min"), (3599, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_times(seconds, text):
    assert duration(seconds) == text
