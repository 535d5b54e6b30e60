"""The real command, killed while it builds, ends with the dictionary it would have ended with."""

from __future__ import annotations

import json
import random
import signal

import numpy as np

from jaxdict.itda.saved_run import run_to_dictionary
from jaxdict.runs.folder import SUMMARY
from tests.jaxdict.command import Command, curve, last_step, words
from tests.jaxdict.planted import SITE, write_planted_store


def test_kill_minus_nine_at_any_moment_and_resume_gives_the_same_dictionary(tmp_path):
    store = write_planted_store(tmp_path / "store", images=120)
    settings = {
        **{"store": store, "site": SITE, "atoms": 150, "k": 3, "batch": 16, "pool": 300},
        **{"save_every": 15, "eval_every": 60, "log_every": 1},
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["train", "itda", *words(**settings)]
    Command(*flags, "--out", str(whole)).end()
    last = json.loads((whole / SUMMARY).read_text())["training"]["trials"]
    batches = sum(-(-trial["rows"] // 16) for trial in last)
    assert len(last) > 1, "the search should have more than one trial"

    dice = random.Random(20260412)
    # Before the first checkpoint, in the first trial, and in a later one.
    for moment in (dice.randrange(2, 12), dice.randrange(40, 160), batches - 60):
        command = Command(*flags, "--out", str(killed), "--resume")
        command.until(lambda at=moment: last_step(killed) >= at)
        command.process.kill()
        command.end(status=-signal.SIGKILL)
        assert not (killed / SUMMARY).exists(), "killed too late to matter"
    Command(*flags, "--out", str(killed), "--resume").end()

    one, other = (run_to_dictionary(run) for run in (killed, whole))
    for name in ("atoms", "source", "typical"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.card["sources"] == other.card["sources"]
    assert curve(killed) == curve(whole)
    names = [{path.name for path in run.iterdir()} for run in (killed, whole)]
    assert names[0] == names[1], "nothing half written is left"
