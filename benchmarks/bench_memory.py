"""How much memory does each verb take beside what it works on, and how long does the trainer wait for a checkpoint?

python benchmarks/bench_memory.py [--quick]

At d = 3,072 and several numbers of atoms, each verb is a process of its own: train for a few steps without and with a
checkpoint on the way, resume, export, prune, eval. The system says what it took: the peak of its resident memory
(VmHWM) and, read every 10 ms, of what of it no file backs (RssAnon). The state is what a checkpoint holds: weights,
two moments and the average, 16 bytes times m times d times 2; the dictionary is 4 bytes times m times d times 2. The
wait is what `Checkpoints.save` takes until the next step may begin. Results go to results/memory.json, the curve to
docs/memory.png.
"""

from __future__ import annotations

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
from record import save

D, SITE, BATCH, STEPS = 3072, "double.0.img", 256, 4
ATOMS, QUICK = (8_192, 24_576, 65_536), (1_024,)
DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    """Measure at every size, write the results and the curve."""
    quick, rows = "--quick" in sys.argv, []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        store = _store(Path(folder) / "store")
        for atoms in QUICK if quick else ATOMS:
            for row in measure(store, Path(folder) / str(atoms), atoms):
                print(row, flush=True)
                rows.append(row)
            shutil.rmtree(Path(folder) / str(atoms))
    if not quick:
        save("memory", rows)
        _plot(rows)


def measure(store: Path, folder: Path, atoms: int) -> list[dict[str, Any]]:
    """Peak and seconds of each verb at one number of atoms."""
    run, plain = folder / "run", folder / "plain"
    train = ["train", "sae", "--store", store, "--site", SITE, "--atoms", atoms, "--k", 32]
    train += ["--batch", BATCH, "--rows", BATCH * STEPS, "--eval-rows", 256, "--ema", 0.999]
    every = {
        "train, one save at its end": [*train, "--out", plain, "--save-every", 10**6],
        "train, saves on the way": [*train, "--out", run, "--save-every", 1],
        "resume": [
            *train,
            "--out",
            run,
            "--save-every",
            10**6,
            "--resume",
            "--rows",
            BATCH * (STEPS + 2),
        ],
        "export": ["export", run, "--out", folder / "dictionary"],
        "prune": [
            "prune",
            folder / "dictionary",
            "--store",
            store,
            "--keep",
            atoms // 2,
            "--out",
            folder / "pruned",
        ],
        "eval": ["eval", folder / "dictionary", "--store", store, "--out", folder / "eval"],
    }
    state, dictionary = 4 * 8 * atoms * D, 4 * 2 * atoms * D
    rows = []
    for verb, words in every.items():
        found = _process([str(word) for word in words])
        of = state if verb.startswith(("train", "resume")) else dictionary
        rows.append(
            {"verb": verb, "atoms": atoms, "bytes": of, **found}
            | {"times": round(found["anonymous"] / of, 2)}
        )
        if verb.startswith("train, one"):
            shutil.rmtree(plain)
    return rows


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
        return rng.normal(size=(count, 1, 128, D)).astype(np.float32)

    return write_store(path, SITE, (24, 1, 128, D), rows, split=[0] * 16 + [1] * 8)


def _plot(rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    from jaxdict.plots import save as save_figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for verb in dict.fromkeys(row["verb"] for row in rows):
        own = [row for row in rows if row["verb"] == verb]
        sizes = [row["bytes"] / 1e9 for row in own]
        axes.plot(sizes, [row["anonymous"] / 1e9 for row in own], marker="o", ms=4, label=verb)
    ends = np.array([0.05, 7.0])
    for times, style in ((1, ":"), (2.5, "--")):
        axes.plot(ends, times * ends, ls=style, lw=0.8, color="#777777", label=f"{times} times")
    axes.set(xscale="log", yscale="log", ylabel="peak of anonymous memory, GB")
    axes.set(xlabel="what it works on, GB: a state (train, resume) or a dictionary")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    save_figure(figure, DOCS / "memory.png")


if __name__ == "__main__":
    main()
