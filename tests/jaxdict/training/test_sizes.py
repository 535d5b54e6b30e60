"""Sizes that no machine holds are refused in one line, and nothing is left behind."""

from __future__ import annotations

import pytest

from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.train import train_itda
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training.train import train_sae
from tests.jaxdict.planted import SITE, write_planted_store

HUGE = 999_999_999_999
MEMORY = (
    r"expected what fits into this machine's \S+ GB of memory \(.* would take \S+ [TPG]B\), got"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("sizes") / "store", images=10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"atoms": HUGE}, rf"^--atoms: {MEMORY} {HUGE}; lower --atoms$"),
        ({"batch": HUGE, "rows": HUGE}, rf"^--batch: {MEMORY} {HUGE}; lower --batch or --atoms$"),
        ({"atoms": 10**9, "sweep": ("seed=0,1",)}, rf"^--atoms: {MEMORY}"),
        ({"k": HUGE, "atoms": 0}, r"^--k: expected at most the number of atoms"),
        ({"rows": 2**31 * 1024}, r"^--rows: expected at most 2,147,483,647 optimizer steps"),
        ({"dead_rows": HUGE}, r"^--dead-rows: expected a number of at most 2147483647, got"),
        ({"warmup": HUGE}, r"^--warmup: expected at most 2147483647 optimizer steps, got"),
        ({"seed": 2**63}, r"^--seed: expected a number below 2\^63, got"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_of_an_autoencoder(settings, message, store, tmp_path):
    whole = {"site": SITE, "atoms": 48, "k": 4, "batch": 1024, "rows": 1024, **settings}
    with pytest.raises(ValueError, match=message):
        train_sae(TrainSAEConfig.of(store=store, out=tmp_path / "run", **whole))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"atoms": HUGE, "threshold": 0.0},
            r"^--atoms: expected at most the 256 rows that are loo",
        ),
        ({"batch": HUGE}, r"^--batch: expected what fits .*; lower --batch$"),
        ({"k": HUGE}, r"^--k: expected what fits .*; lower --k or --batch$"),
    ],
    ids=lambda one: next(iter(one)) if isinstance(one, dict) else "",
)
def test_of_an_itda(settings, message, store, tmp_path):
    whole = {"site": SITE, "k": 4, "threshold": 0.3, **settings}
    with pytest.raises(ValueError, match=message):
        train_itda(TrainITDAConfig(store=store, out=tmp_path / "run", **whole))
    assert not (tmp_path / "run").exists()
