"""Runs that cannot be lost: the real command, killed again and again, ends where it would have ended."""

from __future__ import annotations

import json
import random
import signal
import time

from jaxdict.runs.folder import SUMMARY
from tests.jaxdict.command import Command, curve, last_step, raw, weights, words
from tests.jaxdict.planted import SITE, write_planted_store

STEPS, SAVE = 300, 20


def test_kill_minus_nine_at_any_moment_and_resume_gives_the_same_bits(tmp_path):
    store = write_planted_store(tmp_path / "store")
    settings = {
        **{"store": store, "site": SITE, "atoms": 48, "k": 4, "batch": 128, "rows": 128 * STEPS},
        **{"warmup": 5, "ema": 0.9, "dead_rows": 500, "resample": 70, "pool": 300, "memory": 0},
        **{"save_every": SAVE, "eval_every": 50, "log_every": 1, "init": "rows"},
    }
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["train", "sae", *words(**settings)]
    Command(*flags, "--out", str(whole)).end()

    dice = random.Random(20260412)
    # While it starts, before the first checkpoint, and twice later, perhaps while one is written.
    moments = [0, dice.randrange(1, SAVE - 4)]
    moments += sorted(dice.randrange(SAVE + 1, STEPS * 3 // 4) for _ in range(2))
    for moment in moments:
        command = Command(*flags, "--out", str(killed), "--resume")
        if moment:
            command.until(lambda at=moment: last_step(killed) >= at)
            time.sleep(dice.uniform(0, 0.05))
        else:
            command.until(killed.exists)
        command.process.kill()
        command.end(status=-signal.SIGKILL)
        assert not (killed / SUMMARY).exists(), "killed too late to matter"
    Command(*flags, "--out", str(killed), "--resume").end()

    assert weights(killed)[0] == STEPS
    assert raw(weights(killed)[1]) == raw(weights(whole)[1])
    assert curve(killed) == curve(whole)
    assert len(curve(killed)) == STEPS + STEPS // 50
    dead = [line["dead"] for line in curve(whole) if line["kind"] == "train"]
    assert max(dead) > 0, "counters of dead features should matter"
    summaries = [json.loads((run / SUMMARY).read_text()) for run in (killed, whole)]
    assert summaries[0]["heldout"] == summaries[1]["heldout"]
    for folder in (".", "checkpoints"):
        names = [{path.name for path in (run / folder).iterdir()} for run in (killed, whole)]
        assert names[0] == names[1], "nothing half written is left"
