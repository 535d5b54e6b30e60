"""How much memory does each verb take beside what it works on, and how long does the trainer wait for a checkpoint?

python benchmarks/bench_memory.py [--quick] [--atoms 1024 24576 65536]

At d = 3,072 and several numbers of atoms, each verb is a process of its own: train for a few steps without and with a
checkpoint on the way, resume, export, prune, eval; where the store has as many rows also train itda and compare. The
system says what it took: the peak of its resident memory (VmHWM) and, read every 10 ms, of what of it no file backs
(RssAnon). The state is what a checkpoint holds: weights, two moments and the average, 16 bytes times m times d times
2; the dictionary is 4 bytes times m times d times 2 (of ITDA, which has no encoder, half of that). The wait is what
`Checkpoints.save` takes until the next step may begin. Results go to results/memory.json, where those of other sizes
stay, the curve to docs/memory.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from made_up import write_store
from record import RESULTS, commit, save

D, SITE, BATCH, STEPS = 3072, "double.0.img", 256, 4
TRAINING, HELD_OUT, TOKENS = 16, 8, 128
DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Measure at every size, write the results and the curve."""
    options, rows = _options(), []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        store = _store(Path(folder) / "store")
        for atoms in (1_024,) if options.quick else options.atoms:
            rows += measure(store, Path(folder) / str(atoms), atoms)
            shutil.rmtree(Path(folder) / str(atoms))
    if not options.quick:
        rows = sorted([*_others(options.atoms), *rows], key=lambda row: row["atoms"])
        save("memory", rows)
        _plot(rows)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="1,024 atoms; write nothing")
    parser.add_argument("--atoms", type=int, nargs="+", default=[1_024, 24_576, 65_536])
    return parser.parse_args()


def _others(atoms: list[int]) -> list[dict[str, Any]]:
    """Rows of the results that are there at other numbers of atoms."""
    path = RESULTS / "memory.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["atoms"] not in atoms]


def measure(store: Path, folder: Path, atoms: int) -> list[dict[str, Any]]:
    """Peak and seconds of each verb at one number of atoms."""
    verbs = _autoencoder(store, folder, atoms)
    if atoms <= TRAINING * TOKENS:  # an atom of ITDA is a row
        verbs |= _itda(store, folder, atoms)
    rows = []
    for verb, (size, words) in verbs.items():
        found = _process([str(word) for word in words])
        rows.append(
            {"verb": verb, "atoms": atoms, "bytes": size, **found}
            | {"times": round(found["anonymous"] / size, 2), "commit": commit()}
        )
        print(rows[-1], flush=True)
        if verb.startswith("train, one"):
            shutil.rmtree(folder / "plain")
    return rows


def _autoencoder(store: Path, folder: Path, atoms: int) -> dict[str, tuple[int, list[Any]]]:
    """Bytes that a verb works on, and its words, by what it is called."""
    state, dictionary = 4 * 8 * atoms * D, 4 * 2 * atoms * D
    run, made, once = folder / "run", folder / "dictionary", ["--save-every", 10**6]
    train = ["train", "sae", "--store", store, "--site", SITE, "--atoms", atoms, "--k", 32]
    train += ["--batch", BATCH, "--eval-rows", 256, "--ema", 0.999]
    short, longer = ["--rows", BATCH * STEPS], ["--rows", BATCH * (STEPS + 2), "--resume"]
    prune = ["prune", made, "--store", store, "--keep", atoms // 2, "--out", folder / "pruned"]
    return {
        "train, one save at its end": (state, [*train, *short, *once, "--out", folder / "plain"]),
        "train, saves on the way": (state, [*train, *short, "--save-every", 1, "--out", run]),
        "resume": (state, [*train, *longer, *once, "--out", run]),
        "export": (dictionary, ["export", run, "--out", made]),
        "prune": (dictionary, prune),
        "eval": (dictionary, ["eval", made, "--store", store, "--out", folder / "eval.json"]),
    }


def _itda(store: Path, folder: Path, atoms: int) -> dict[str, tuple[int, list[Any]]]:
    """The same of ITDA: every row joins, in two orders, and the two are compared."""
    size, runs = 4 * atoms * D, [folder / "itda-0", folder / "itda-1"]
    train = ["train", "itda", "--store", store, "--site", SITE, "--k", 32, "--rows", atoms]
    train += ["--threshold", 1e-3, "--eval-rows", 256]
    first, second = ([*train, "--seed", seed, "--out", run] for seed, run in enumerate(runs))
    compare = ["compare", *runs, "--store", store, "--out", folder / "compare"]
    return {
        "train itda": (size, first),
        "train itda, again": (size, second),
        "compare": (2 * size, compare),
    }


def _process(words: list[str]) -> dict[str, Any]:
    """Run a verb in a process of its own: its peaks in bytes, its seconds, the seconds of each save."""
    started = time.perf_counter()
    code = Path(__file__).with_name("timed_saves.py")
    process = subprocess.Popen(
        [sys.executable, code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peaks = {"VmHWM": 0, "RssAnon": 0}
    watcher = threading.Thread(target=_watch, args=(process, peaks))
    watcher.start()
    out, said = process.communicate()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(words)}: exit status {process.returncode}\n{said}")
    saves = [json.loads(line) for line in out.splitlines() if line.startswith('{"wait"')]
    return {
        "resident": peaks["VmHWM"],
        "anonymous": peaks["RssAnon"],
        "seconds": round(time.perf_counter() - started, 1),
        "waits": [one["wait"] for one in saves],
        "resident before a save": saves[0]["resident before"] if saves else None,
    }


def _watch(process: subprocess.Popen, peaks: dict[str, int]) -> None:
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            return
        for line in status.splitlines():
            name, _, rest = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], 1024 * int(rest.split()[0]))
        time.sleep(0.01)


def _store(path: Path) -> Path:
    rng = np.random.default_rng(0)

    def rows(count: int) -> np.ndarray:
        return rng.normal(size=(count, 1, TOKENS, D)).astype(np.float32)

    split = [0] * TRAINING + [1] * HELD_OUT
    return write_store(path, SITE, (len(split), 1, TOKENS, D), rows, split=split)


def _plot(rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    from jaxdict.plots import save as save_figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for verb in dict.fromkeys(row["verb"] for row in rows):
        own = [row for row in rows if row["verb"] == verb]
        sizes = [row["bytes"] / 1e9 for row in own]
        axes.plot(sizes, [row["anonymous"] / 1e9 for row in own], marker="o", ms=4, label=verb)
    ends = np.array([0.01, 7.0])
    for times, style in ((1, ":"), (2.5, "--")):
        axes.plot(ends, times * ends, ls=style, lw=0.8, color="#777777", label=f"{times} times")
    axes.set(xscale="log", yscale="log", ylabel="peak of anonymous memory, GB")
    axes.set(xlabel="what it works on, GB: a state (train, resume) or a dictionary")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    save_figure(figure, DOCS / "memory.png")


if __name__ == "__main__":
    main()
