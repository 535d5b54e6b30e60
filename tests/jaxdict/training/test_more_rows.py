"""A run that goes on for more rows than it was given at first."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from jaxdict.runs.folder import read_lines, read_run
from jaxdict.sae import ScheduleConfig, learning_rate_schedule
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.training.train import train_sae
from tests.jaxdict.command import raw, weights
from tests.jaxdict.planted import SITE, write_planted_store

SMALL = {"site": SITE, "atoms": 48, "k": 4, "batch": 64, "warmup": 5, "log_every": 1}
SMALL |= {"dead_rows": 300, "eval_rows": 64, "save_every": 4}
N = 64 * 10


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_planted_store(tmp_path_factory.mktemp("more") / "store")


def config(store, out, **settings):
    return TrainSAEConfig.of(store=store, out=out, **{**SMALL, "rows": N, **settings})


def rates(run):
    """Learning rates of the steps of a run, as shares of the largest."""
    found = [line["lr"] for line in read_lines(run / "metrics.jsonl") if line["kind"] == "train"]
    return np.asarray(found) / max(found)


def test_with_a_constant_rate_it_equals_a_run_of_all_rows_at_once(store, tmp_path, capsys):
    settings = {"decay": 0.0, "resample": 5, "ema": 0.9}
    at_once = config(store, tmp_path / "at-once", **settings, rows=2 * N)
    train_sae(at_once)
    first = config(store, tmp_path / "run", **settings)
    train_sae(first)
    capsys.readouterr()
    train_sae(first.replace(resume=True, rows=2 * N))
    assert "10 of 20 steps were there, 10 come\n" in capsys.readouterr().err
    (step, more), (_, whole) = weights(first.out), weights(at_once.out)
    assert step == 20 and raw(more) == raw(whole)
    assert read_run(first.out)["legs"] == [{"step": 10, "rows": N}]
    assert read_run(first.out)["config"]["data"]["rows"] == 2 * N

    train_sae(first.replace(resume=True, rows=2 * N))
    assert "20 of 20 steps were there, none come; a larger --rows" in capsys.readouterr().err
    assert raw(weights(first.out)[1]) == raw(more)
    with pytest.raises(ValueError, match=rf"--rows: expected at least the {2 * N} of .*got {N};"):
        train_sae(first.replace(resume=True))


def test_after_a_decay_the_rate_rises_again_and_falls_at_the_end_of_all(store, tmp_path, capsys):
    first = config(store, tmp_path / "run", decay=0.4)
    train_sae(first)
    np.testing.assert_allclose(rates(first.out)[5:], [1, 1, 0.75, 0.5, 0.25])
    longer = first.replace(resume=True, rows=3 * N)
    train_sae(longer)
    assert "fallen to 0% of its peak" in capsys.readouterr().err
    shares = rates(first.out)
    np.testing.assert_allclose(shares[10:15], [0.2, 0.4, 0.6, 0.8, 1], rtol=1e-6)
    np.testing.assert_allclose(shares[15:], [1, 1, 1, *np.linspace(1, 1 / 12, 12)], rtol=1e-6)


def test_killed_on_its_way_it_ends_at_the_same_bits(store, tmp_path):
    first = config(store, tmp_path / "run", sweep=("decay=0,0.4",), keep=9)
    train_sae(first)
    longer = first.replace(resume=True, rows=2 * N)
    train_sae(longer)
    names = ("decay=0", "decay=0.4")
    before = [raw(weights(first.out / name)[1]) for name in names]
    # What a kill after step 12 would have left.
    for step in first.out.glob("**/checkpoints/*"):
        if step.name.isdecimal() and int(step.name) > 12:
            shutil.rmtree(step)
    train_sae(longer)
    assert [raw(weights(first.out / name)[1]) for name in names] == before
    assert read_run(first.out / names[1])["legs"] == [{"step": 10, "rows": N}]


def test_a_new_run_with_resume_says_so(store, tmp_path, capsys):
    train_sae(config(store, tmp_path / "run", resume=True, rows=64 * 2))
    assert "0 of 2 steps were there, 2 come" in capsys.readouterr().err


def test_the_schedule_before_more_rows_came_is_the_old_one():
    schedule = ScheduleConfig(steps=100, warmup=10, decay=0.2)
    plain = learning_rate_schedule(schedule)
    again = learning_rate_schedule(schedule._replace(since=50, share=0.5))
    assert [float(again(step)) for step in (50, 54, 59, 60, 95)] == pytest.approx(
        [0.55, 0.75, 1, 1, float(plain(95))]
    )
