"""Sweeps: many dictionaries from one pass over the rows, each the one it would be on its own."""

from __future__ import annotations

import json
import signal
import sys

import numpy as np
import pytest

from harvest.store import open_store
from jaxdict import cli
from jaxdict.dictionary.files import load_dictionary
from jaxdict.runs.folder import CONFIG, SUMMARY
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.sae.state import Metrics
from jaxdict.sae.step_config import Execution
from jaxdict.training import pareto
from jaxdict.training import sweep as members
from tests.jaxdict.command import Command, curve, last_step, raw, weights, words
from tests.jaxdict.planted import SITE, write_planted_store

OTHER = "double.5.img"
SMALL = {"site": SITE, "atoms": 48, "batch": 128, "rows": 128 * 120, "warmup": 5, "pool": 300}
SMALL |= {"memory": 0, "dead_rows": 1000, "log_every": 1, "save_every": 10, "eval_every": 60}
SWEEP = ("lr=1e-3,4e-3", "k=2,4", "seed=0,1")
NAMES = [
    f"lr={lr}_k={k}_seed={seed}" for lr in ("0.001", "0.004") for k in (2, 4) for seed in (0, 1)
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "store"
    return write_planted_store(path, more={OTHER: (16, 10)})


class Opens:
    """Counts how often files of activations are opened, as Python reports it."""

    def __init__(self) -> None:
        self.seen: list[str] | None = None
        sys.addaudithook(self.hear)

    def hear(self, event, arguments):
        if event == "open" and self.seen is not None:
            path = str(arguments[0]).replace("\\", "/")
            if "/store/sites/" in path and "/c/" in path:
                self.seen.append(path)

    def count(self, act):
        self.seen = []
        try:
            act()
            return len(self.seen)
        finally:
            self.seen = None


@pytest.fixture(scope="module")
def opens():
    return Opens()


def train(out, store, **settings):
    return cli.call(["train", "sae", *words(store=store, out=out, **{**SMALL, **settings})])


@pytest.fixture(scope="module")
def swept(store, opens, tmp_path_factory):
    """Eight dictionaries, and how often the store's files were opened for them."""
    out = tmp_path_factory.mktemp("sweep") / "swept"
    return out, opens.count(lambda: train(out, store, sweep=SWEEP))


@pytest.fixture(scope="module")
def alone(store, opens, tmp_path_factory):
    """Three of the eight on their own, and how often the store's files were opened for the last."""
    folder = tmp_path_factory.mktemp("sweep")
    found, times = {}, 0
    for lr, k, seed in ((1e-3, 4, 1), (4e-3, 2, 0), (4e-3, 4, 1)):
        out = folder / f"lr={lr:g}_k={k}_seed={seed}"
        settings = {"lr": lr, "k": k, "seed": seed, "order_seed": 0}
        times = opens.count(lambda o=out, s=settings: train(o, store, **s))
        found[out.name] = out
    return found, times


def test_every_combination_has_a_folder_as_a_run_of_its_own_has(swept, alone):
    out, _ = swept
    assert [path.name for path in out.iterdir() if path.is_dir() and "=" in path.name]
    assert json.loads((out / CONFIG).read_text())["members"] == NAMES
    for name, own in alone[0].items():
        assert {p.name for p in (out / name).iterdir()} == {p.name for p in own.iterdir()}
        ours, theirs = (json.loads((at / CONFIG).read_text()) for at in (out / name, own))
        assert ours["config"].pop("out") != theirs["config"].pop("out")
        assert ours["config"] == theirs["config"] and ours["resolved"] == theirs["resolved"]


def test_members_are_what_they_would_be_on_their_own(swept, alone):
    out, _ = swept
    for name, own in alone[0].items():
        assert weights(out / name)[0] == weights(own)[0] == 120
        for got, wanted in zip(weights(out / name)[1], weights(own)[1], strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-4)
        assert len(curve(out / name)) == len(curve(own))
        for got, wanted in zip(curve(out / name), curve(own), strict=True):
            keys = Metrics._fields if got["kind"] == "train" else ("fvu", "l0")
            one, other = ([line[key] for key in keys] for line in (got, wanted))
            assert one == pytest.approx(other, rel=1e-3, abs=1e-6), (name, got["step"])
    every = [raw(weights(out / name)[1]) for name in NAMES]
    assert len({b"".join(one) for one in every}) == 8, "all should differ"


def test_a_member_without_dead_features_has_no_auxk_loss_beside_one_that_has(swept):
    lines = [[line for line in curve(swept[0] / name) if line["kind"] == "train"] for name in NAMES]
    # AuxK of a step is for the features that were dead after the one before.
    before = [[one["dead"] for one in member[:-1]] for member in lines]
    after = [[one["aux"] for one in member[1:]] for member in lines]
    for dead, aux in zip(before, after, strict=True):
        assert [value > 0 for value in aux] == [share > 0 for share in dead]
    for k in (2, 4):
        together = [dead for name, dead in zip(NAMES, before, strict=True) if f"k={k}_" in name]
        mixed = [0 < sum(share > 0 for share in at) < 4 for at in zip(*together, strict=True)]
        assert any(mixed), "one of a vmapped step should have some while another has none"


def test_a_member_has_a_score_and_is_its_own_best_as_a_run_alone_is(swept, alone):
    out, _ = swept
    for run in [out / name for name in NAMES] + list(alone[0].values()):
        score = json.loads((run / "checkpoints" / "120" / "metrics" / "metrics").read_text())
        held = json.loads((run / SUMMARY).read_text())["heldout"]
        assert score == {"score": pytest.approx(held["fvu"], rel=1e-6)}
    step, best = weights(out / NAMES[0], checkpoint="best")
    assert step == 120 and raw(best) == raw(weights(out / NAMES[0])[1])


def test_rows_are_read_once_for_all_of_them(swept, alone):
    assert alone[1] > 100, "the store should be read again and again, not from memory"
    assert swept[1] == alone[1]


def test_a_member_is_exported_like_any_run_and_the_whole_says_which_there_are(swept, tmp_path):
    out, _ = swept
    cli.call(["export", str(out / NAMES[-1]), *words(out=tmp_path / "dictionary")])
    dictionary = load_dictionary(tmp_path / "dictionary")
    assert (dictionary.m, int(dictionary.k)) == (48, 4)
    assert dictionary.card["config"]["optimizer"]["lr"] == 4e-3
    with pytest.raises(ValueError, match=rf"holds several \({NAMES[0]}, .*name the folder"):
        cli.call(["export", str(out), *words(out=tmp_path / "none")])


def test_summary_and_plot_show_who_is_best(swept):
    out, _ = swept
    summary = json.loads((out / SUMMARY).read_text())
    assert list(summary["members"]) == NAMES
    for name, one in summary["members"].items():
        assert one["heldout"] == json.loads((out / name / SUMMARY).read_text())["heldout"]
    points = {
        name: (one["heldout"]["l0"], one["heldout"]["fvu"])
        for name, one in summary["members"].items()
    }
    best = {min((p for n, p in points.items() if f"k={k}_" in n)) for k in (2, 4)}
    assert {points[name] for name in summary["frontier"]} == best
    picture = (out / pareto.PLOT).read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000


def test_frontier_is_what_nobody_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = {
            str(i): (float(a), float(b)) for i, (a, b) in enumerate(rng.integers(0, 5, (9, 2)))
        }
        sites = {name: "ab"[int(name) % 2] for name in points}
        wanted = []
        for name, (l0, fvu) in points.items():
            rivals = [p for n, p in points.items() if sites[n] == sites[name]]
            if not any(p != (l0, fvu) and p[0] <= l0 and p[1] <= fvu for p in rivals):
                wanted.append(name)
        assert pareto.frontier(points, sites) == wanted


@pytest.mark.parametrize(
    ("sweep", "sizes"),
    [
        (("lr=1e-3,2e-3", "seed=0,1", "aux=0.1,0.2"), [8]),
        (("lr=1e-3,2e-3", "k=2,4,6"), [2, 2, 2]),
        (("aux=0,0.1", "lr=1e-3,2e-3"), [2, 2]),
        (("resample=0,10", "lr=1e-3,2e-3"), [2, 2]),
        (("normalize=rms,whiten", "seed=0,1"), [2, 2]),
        (("kind=topk,relu", "sparsity=0.1,0.2"), [2, 2]),
    ],
)
def test_members_that_one_step_serves_share_it(store, tmp_path, sweep, sizes):
    config = TrainSAEConfig.of(store=store, out=tmp_path, **{**SMALL, "sweep": sweep})
    every = members.expand(config, open_store(store))
    groups = members.grouped(every, Execution())
    assert [len(group.members) for group in groups] == sizes
    assert len({one.name for one in every}) == len(every)


def test_values_that_hardly_differ_have_folders_of_their_own(store, tmp_path):
    sweep = ("lr=0.00123456,0.001234561",)
    config = TrainSAEConfig.of(store=store, out=tmp_path, **{**SMALL, "sweep": sweep})
    names = [one.name for one in members.expand(config, open_store(store))]
    assert names == ["lr=0.00123456", "lr=0.001234561"]


@pytest.mark.parametrize(
    ("sweep", "message"),
    [
        (("speed=1,2",), "with a name among"),
        (("lr",), "expected name=value,value"),
        (("batch=64,128",), "got 'batch=64,128'"),
        (("k=2,many",), "values of type int for k, got '2,many'"),
        (("k=2.5,3",), "values of type int for k, got '2.5,3'"),
        (("k=inf",), "values of type int for k, got 'inf'"),
        (("lr=fast",), "values of type float for lr, got 'fast'"),
        (("k=2,2",), "each setting and value once, got 'k=2,2'"),
        (("k=2", "k=4"), "each setting and value once, got 'k=4'"),
        (("k=2,100",), "--k: expected at most the number of atoms (48), got 100"),
        (("kind=topk,magic",), "--kind: expected one of"),
    ],
)
def test_a_wrong_sweep_is_one_clear_line(store, tmp_path, capsys, sweep, message):
    with pytest.raises(SystemExit) as stopped:
        flags = words(store=store, out=tmp_path / "run", **SMALL, sweep=sweep)
        cli.main(["train", "sae", *flags])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_kill_minus_nine_in_the_middle_of_a_sweep_and_resume_give_the_same_bits(
    swept, store, tmp_path
):
    out, killed = swept[0], tmp_path / "killed"
    flags = words(store=store, out=killed, **SMALL, sweep=SWEEP)
    command = Command("train", "sae", *flags, as_here=True)
    command.until(lambda: last_step(killed / NAMES[-1]) >= 37)
    command.process.kill()
    command.end(status=-signal.SIGKILL)
    assert not (killed / SUMMARY).exists()
    train(killed, store, sweep=SWEEP, resume=True)
    for name in NAMES:
        assert raw(weights(killed / name)[1]) == raw(weights(out / name)[1])
        assert curve(killed / name) == curve(out / name)


def test_a_glob_trains_a_dictionary_of_each_site_in_one_pass(store, opens, tmp_path):
    out = tmp_path / "sites"
    settings = {"site": "double.*.img", "atoms": 32, "k": 3, "rows": 128 * 40, "aux": 0}
    times = opens.count(lambda: train(out, store, **settings))
    summary = json.loads((out / SUMMARY).read_text())
    assert list(summary["members"]) == [SITE, OTHER]
    assert [one["d"] for one in summary["members"].values()] == [16, 10]
    assert sorted(summary["frontier"]) == [SITE, OTHER], "sites do not compete"
    assert all(one["heldout"]["fvu_normalized"] < 0.9 for one in summary["members"].values())
    single = opens.count(lambda: train(tmp_path / "one", store, **{**settings, "site": OTHER}))
    assert 0 < single < times <= 2 * single
    for got, wanted in zip(weights(out / OTHER)[1], weights(tmp_path / "one")[1], strict=True):
        np.testing.assert_array_equal(got, wanted)
    cli.call(["export", str(out / OTHER), *words(out=tmp_path / "dictionary")])
    assert load_dictionary(tmp_path / "dictionary").d == 10
