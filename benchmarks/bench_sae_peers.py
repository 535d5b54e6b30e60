"""How fast and how good is our TopK autoencoder beside those of three other libraries?

make bench-peers [ARGS="--quick | --only speed | --only quality | --only seeds | --store runs/demo/store"]

Every contender (ours, dictionary_learning, sparsify, SAELens) runs in a process of its own
(peers/), the libraries in .venv-peers, on the same rows and batches and as many threads. Speed:
rows a second of full optimizer steps by each library's own trainer, in turns that alternate,
beside the least that any trainer must do. Each runs as it comes, which for ours is in huge
pages; with --huge-pages all do. Quality: held-out FVU after equally many rows, at the
best of the learning rates tried, which are the same multiples of each contender's own default;
--only seeds runs those best ones, and rates a half-step beside them, from several seeds.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from peers.processes import OURS, PEERS, THREADS, Way, Worker, merged, workers
from peers.rows import SITE, planted
from record import save
from sae_quality import measure_quality, measure_seeds

from jaxdict.devices import huge_pages

SHAPES = ((1024, 768, 12288, 32), (1024, 3072, 12288, 32))
QUICK = ((256, 64, 256, 8),)
TRAINERS = {
    "jaxdict": Way("ours.py", OURS),
    "sparsify": Way("with_sparsify.py", PEERS),
    "SAELens": Way("with_saelens.py", PEERS),
    "SAELens, sparse codes": Way("with_saelens.py", PEERS, "sparse"),
    "dictionary_learning": Way("with_dictionary_learning.py", PEERS),
}
FLOORS = {
    "encoder product, torch": Way("floor_torch.py", PEERS),
    "encoder product, jax": Way("floor.py", OURS, "product"),
    "encoder product and top-k, jax": Way("floor.py", OURS, "top-k"),
    "one pass of Adam, jax": Way("floor.py", OURS, "adam"),
}
CHECKED = 10
"""Optimizer steps that must lower the FVU before anything is timed."""


def speed(
    n: int, d: int, m: int, k: int, *, folder: Path, rounds: int, turn: float
) -> dict[str, Any]:
    """Rows a second of every contender at one shape, after a check that its FVU falls.

    Args:
        n: rows in a batch.
        d: width.
        m: atoms.
        k: active atoms a row.
        folder: where the rows are written.
        rounds: turns of each contender; who begins moves on by one from round to round.
        turn: seconds that a turn should last at least.
    """
    rows, _ = planted(4 * n, d, m // 2, k, noise=0.05)
    files = {"every": str(folder / "rows.npy"), "first": str(folder / "first.npy")}
    np.save(files["every"], rows)
    np.save(files["first"], rows[:n])
    job = {"n": n, "m": m, "k": k, "steps": 10_000, "rate": 1e-3, "flat": True}
    fvu: dict[str, list[float]] = {}
    steps: dict[str, int] = {}
    load = os.getloadavg()[0]
    with workers(TRAINERS | FLOORS) as found:
        for name, worker in found.items():
            # No feature of any contender dies here, so that none does more than the usual step.
            lasting = {"dead_rows": 10**9} if name == "jaxdict" else {}
            worker.ask("open", rows=files["every"], **job, **lasting, variant=worker.way.variant)
            if name in TRAINERS:
                fvu[name] = [worker.ask("measure", rows=files["first"])["fvu"]]
                worker.ask("run", steps=CHECKED)
                fvu[name].append(worker.ask("measure", rows=files["first"])["fvu"])
                assert fvu[name][1] < 0.99 * fvu[name][0], (name, fvu[name])
            else:
                worker.ask("run", steps=2)
            steps[name] = max(2, math.ceil(turn / worker.ask("run", steps=1)["seconds"]))
        seconds = alternating(found, steps, rounds)
        memory = {name: found[name].ask("memory") for name in TRAINERS}
        versions = merged(worker.versions for worker in found.values())
    median = {name: statistics.median(taken) for name, taken in seconds.items()}
    floor = median["encoder product and top-k, jax"] + median["one pass of Adam, jax"]
    return {
        "shape": {"n": n, "d": d, "m": m, "k": k},
        "threads": THREADS,
        "load average before": load,
        "versions": versions,
        "steps in a turn": steps,
        "seconds a step": {
            name: {"median": median[name], "least": min(taken), "most": max(taken), "all": taken}
            for name, taken in seconds.items()
        },
        "rows per second": {name: round(n / value) for name, value in median.items()},
        "jaxdict is so many times as fast": {
            name: median[name] / median["jaxdict"] for name in TRAINERS if name != "jaxdict"
        },
        "floor as a share of the step": {name: floor / median[name] for name in TRAINERS},
        "optimizer steps between": CHECKED,
        "fvu before and after": fvu,
        "bytes": {
            name: {**held, "more": held["peak"] - held["before"]} for name, held in memory.items()
        },
    }


def alternating(
    found: dict[str, Worker], steps: dict[str, int], rounds: int
) -> dict[str, list[float]]:
    """Seconds a step of each, by round; one computes at a time.

    A turn begins with a step that is not timed: memory that lay idle while the others had their turns
    may have to come back from a virtual machine's host (ours took 1.6 to 2.1 s in place of 0.8 after a pause of
    5 s, at d = 3,072), and a training does not pause.
    """
    seconds: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    for first in range(rounds):
        for place in range(len(names)):
            name = names[(first + place) % len(names)]
            time.sleep(0.2)  # until the threads of the one before have gone to sleep
            found[name].ask("run", steps=1)
            taken = found[name].ask("run", steps=steps[name])["seconds"]
            seconds[name].append(taken / steps[name])
    return seconds


def speed_table(row: dict[str, Any]) -> str:
    """As a table."""
    titles = ("rows/s", "ms a step", "least", "most", "ours is", "floor is", "FVU", "more MiB")
    lines = [
        "\nn={n} d={d} m={m} k={k}".format(**row["shape"])
        + f", {row['threads']} threads, load average {row['load average before']:.1f} before",
        f"{'':30}" + "".join(f"{title:>14}" for title in titles),
    ]
    for name, taken in row["seconds a step"].items():
        cells = [f"{row['rows per second'][name]}"]
        cells += [f"{taken[part] * 1e3:.1f}" for part in ("median", "least", "most")]
        if name in TRAINERS:
            before, after = row["fvu before and after"][name]
            cells += [
                f"{row['jaxdict is so many times as fast'].get(name, 1):.2f}x",
                f"{row['floor as a share of the step'][name]:.0%}",
                f"{before:.3f} {after:.3f}",
                f"{row['bytes'][name]['more'] / 2**20:.0f}",
            ]
        lines.append(f"{name:30}" + "".join(f"{cell:>14}" for cell in cells))
    lines.append("floor: encoder product and top-k, and one pass of Adam, both in jax")
    return "\n".join(lines)


def measure_speed(rounds: int, *, quick: bool) -> list[dict[str, Any]]:
    """All shapes."""
    found = []
    for shape in QUICK if quick else SHAPES:
        with tempfile.TemporaryDirectory(prefix="bench-peers-") as folder:
            turn = 0.1 if quick else 1.5
            found.append(speed(*shape, folder=Path(folder), rounds=rounds, turn=turn))
        print(speed_table(found[-1]), flush=True)
    return found


def main() -> None:
    """Measures, prints tables, writes results/sae_peers_speed.json, _quality.json and _seeds.json."""
    flags = argparse.ArgumentParser(description="Our TopK autoencoder beside three other libraries")
    flags.add_argument("--quick", action="store_true", help="tiny shapes; writes no results")
    flags.add_argument("--only", choices=("speed", "quality", "seeds"), help="one question")
    flags.add_argument("--store", type=Path, help=f"store with {SITE}; harvested where missing")
    flags.add_argument("--rounds", type=int, help="turns of each contender; default 5")
    flags.add_argument("--rows", type=int, help="rows that a quality run sees; default 2 million")
    flags.add_argument("--seeds", type=int, default=3, help="with --only seeds; default 3")
    flags.add_argument("--huge-pages", action="store_true", help="for the peers too")
    asked = flags.parse_args()
    if asked.huge_pages:
        huge_pages.ask()
    if asked.only == "seeds" and asked.quick:
        flags.error("expected --only seeds without --quick: it repeats the whole runs of quality")
    if not PEERS.exists():
        raise SystemExit(f"expected an interpreter at {PEERS}; run `make bench-peers`")
    if asked.only == "seeds":
        save("sae_peers_seeds", measure_seeds(asked.store, asked.seeds))
        return
    if asked.only != "quality":
        rounds = asked.rounds or (2 if asked.quick else 5)
        found = measure_speed(rounds, quick=asked.quick)
        if not asked.quick:
            save("sae_peers_speed_huge_pages" if asked.huge_pages else "sae_peers_speed", found)
    if asked.only != "speed":
        rows = asked.rows or (25_600 if asked.quick else 2_000_000)
        found = measure_quality(asked.store, rows, quick=asked.quick)
        if not asked.quick:
            save("sae_peers_quality", found)


if __name__ == "__main__":
    main()
