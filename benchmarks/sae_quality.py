"""How good autoencoders become, ours and those of three other libraries; part of bench_sae_peers.py.

Every learner sees the same batches. `measure_quality` looks for each one's best learning rate from one
seed, `measure_seeds` runs the rates around it from several.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from peers.processes import OURS, PEERS, THREADS, Way, Worker, merged, workers
from peers.rows import SITE, write_embedded, write_planted
from record import RESULTS

LEARNERS = {
    "jaxdict": Way("ours.py", OURS),
    "sparsify, Adam": Way("with_sparsify.py", PEERS),
    "sparsify, signum": Way("with_sparsify.py", PEERS, "signum"),
    "SAELens": Way("with_saelens.py", PEERS),
    "dictionary_learning": Way("with_dictionary_learning.py", PEERS),
}
"""Those whose quality is compared; signum is sparsify's default optimizer."""
FACTORS = (0.5, 1.0, 2.0, 4.0)
MOST_TRIES = 7
DEAD_ROWS = 200_000
"""Our default. The peers' own would let a feature rest for longer than the runs here."""


def quality(
    folder: Path, m: int, k: int, *, n: int, rows: int, about: dict[str, Any]
) -> dict[str, Any]:
    """Held-out FVU of every learner after as many rows, at the best learning rate tried.

    Args:
        folder: holds train.npy and held_out.npy.
        m: atoms.
        k: active atoms a row.
        n: rows in a batch.
        rows: training rows seen in all, over as many epochs as it takes.
        about: description of the rows, kept beside the numbers.
    """
    train, held_out = (folder / f"{name}.npy" for name in ("train", "held_out"))
    job = {"n": n, "m": m, "k": k, "steps": rows // n, "shuffle": True}
    tries, versions = {}, []
    for name, way in LEARNERS.items():
        with workers({name: way}) as found:
            versions.append(found[name].versions)
            asked = {"rows": str(train), **job, "variant": way.variant}
            tries[name] = search(found[name], asked, held_out)
    different, d = np.load(train, mmap_mode="r").shape
    return {
        **about,
        "shape": {"n": n, "d": d, "m": m, "k": k},
        "training rows": {"different": different, "seen": rows // n * n},
        "held-out rows": len(np.load(held_out, mmap_mode="r")),
        "threads": THREADS,
        "versions": merged(versions),
        "best": {name: min(done, key=lambda one: one["fvu"]) for name, done in tries.items()},
        "tries": tries,
    }


def search(worker: Worker, job: dict[str, Any], held_out: Path) -> list[dict[str, Any]]:
    """Runs at FACTORS times the default rate, and one further as long as the best is at an end.

    A peer's best is run once more with features counted as dead, and revived by AuxK, after as few
    rows as in ours.
    """
    done: dict[float, dict[str, Any]] = {}
    wanted = list(FACTORS)
    while wanted and len(done) < MOST_TRIES:
        factor = wanted.pop(0)
        done[factor] = once(worker, {**job, "factor": factor}, held_out)
        best = min(done, key=lambda one: done[one]["fvu"])
        if not wanted:
            wanted = [best / 2] * (best == min(done)) + [best * 2] * (best == max(done))
    found = list(done.values())
    if worker.way.python == PEERS:
        best = min(done, key=lambda one: done[one]["fvu"])
        again = {**job, "factor": best, "dead_rows": DEAD_ROWS}
        found.append(once(worker, again, held_out))
    return found


def once(worker: Worker, job: dict[str, Any], held_out: Path) -> dict[str, Any]:
    """One run, from fresh weights to held-out numbers."""
    rate = worker.ask("open", **job)["rate"]
    taken = worker.ask("run", steps=job["steps"])["seconds"]
    numbers = {
        "factor": job["factor"],
        "rate": rate,
        "revived as ours": "dead_rows" in job,
        **worker.ask("measure", rows=str(held_out)),
        "seconds": taken,
    }
    print(f"  {worker.name}: {numbers}", flush=True)
    return numbers


def repeated(folder: Path, row: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Every learner's best rate of a row of `quality` and those a half-step beside it, from several seeds.

    Args:
        folder: holds train.npy and held_out.npy.
        row: what `quality` found.
        seeds: how many, from 0, of weights and batches.
    """
    shape, seen = row["shape"], row["training rows"]["seen"]
    job = {"n": shape["n"], "m": shape["m"], "k": shape["k"], "steps": seen // shape["n"]}
    found: dict[str, dict[str, list[float]]] = {}
    versions = []
    for name, way in LEARNERS.items():
        best = row["best"][name]
        asked = {"rows": str(folder / "train.npy"), **job, "shuffle": True, "variant": way.variant}
        if best["revived as ours"]:
            asked |= {"dead_rows": DEAD_ROWS}
        found[name] = {}
        with workers({name: way}) as one:
            versions.append(one[name].versions)
            for step in (-0.5, 0, 0.5):
                factor = best["factor"] * 2**step
                found[name][f"{factor:.3g}"] = [
                    once(
                        one[name], {**asked, "factor": factor, "seed": s}, folder / "held_out.npy"
                    )["fvu"]
                    for s in range(seeds)
                ]
    return {
        "rows": row["rows"],
        "shape": shape,
        "training rows": seen,
        "versions": merged(versions),
        "fvu by rate, in times the default": found,
        "best": {
            name: min(
                (
                    {
                        "factor": factor,
                        "mean": statistics.mean(fvu),
                        "least": min(fvu),
                        "most": max(fvu),
                    }
                    for factor, fvu in rates.items()
                ),
                key=lambda one: one["mean"],
            )
            for name, rates in found.items()
        },
    }


def repeated_table(row: dict[str, Any]) -> str:
    """As a table."""
    lines = [
        f"\n{row['rows']}",
        f"{'':24}{'x default':>10}{'mean FVU':>10}{'least':>10}{'most':>10}",
    ]
    for name, one in row["best"].items():
        cells = "".join(f"{one[part]:10.4f}" for part in ("mean", "least", "most"))
        lines.append(f"{name:24}{one['factor']:>10}{cells}")
    return "\n".join(lines)


def quality_table(row: dict[str, Any]) -> str:
    """As a table."""
    seen = row["training rows"]
    titles = ("FVU", "rate", "x default", "revived", "L0", "unused", "tries", "seconds")
    lines = [
        f"\n{row['rows']}: " + "n={n} d={d} m={m} k={k}".format(**row["shape"]),
        f"{seen['seen']} rows seen of {seen['different']}; {row['held-out rows']} held out",
        f"{'':24}" + "".join(f"{title:>12}" for title in titles),
    ]
    for name, best in row["best"].items():
        cells = (
            f"{best['fvu']:.4f}",
            f"{best['rate']:.2e}",
            f"{best['factor']:g}",
            "yes" if best["revived as ours"] else "default",
            f"{best['l0']:.2f}",
            f"{best['unused']:.1%}",
            f"{len(row['tries'][name])}",
            f"{best['seconds']:.1f}",
        )
        lines.append(f"{name:24}" + "".join(f"{cell:>12}" for cell in cells))
    if "share of noise" in row:
        lines.append(f"the planted noise alone is {row['share of noise']:.4f} of the variance")
    return "\n".join(lines)


def measure_quality(store: Path | None, rows: int, *, quick: bool) -> list[dict[str, Any]]:
    """Planted rows, then those of the embedded model."""
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as place:
        folder = Path(place)
        n = 256 if quick else 1024
        d, m, k = (32, 64, 4) if quick else (64, 256, 8)
        many, few = (8192, 2048) if quick else (200_000, 20_000)
        share = write_planted(folder, rows=many, held_out=few, d=d, m=m, k=k)
        about = {"rows": "planted", "share of noise": share}
        found = [quality(folder, m, k, n=n, rows=rows, about=about)]
        print(quality_table(found[0]), flush=True)
        store = store or (folder if quick else PEERS.parents[2] / "runs" / "peers") / "store"
        images, steps = (64, 2) if quick else (1500, 4)
        name = write_embedded(folder, store, images=images, steps=steps, held_out=32_768)
        about = {"rows": f"embedded model, {SITE}, standardized", "store": name}
        m, k = (128, 8) if quick else (1024, 16)
        found.append(quality(folder, m, k, n=n, rows=rows, about=about))
        print(quality_table(found[1]), flush=True)
    return found


def measure_seeds(store: Path | None, seeds: int) -> list[dict[str, Any]]:
    """Both kinds of rows, with what results/sae_peers_quality.json says of them."""
    known = json.loads((RESULTS / "sae_peers_quality.json").read_text())["rows"]
    found = []
    with tempfile.TemporaryDirectory(prefix="bench-peers-") as place:
        folder = Path(place)
        for row in known:
            shape, held_out = row["shape"], row["held-out rows"]
            if row["rows"] == "planted":
                sizes = {name: shape[name] for name in ("d", "m", "k")}
                many = row["training rows"]["different"]
                write_planted(folder, rows=many, held_out=held_out, **sizes)
            else:
                at = store or PEERS.parents[2] / "runs" / "peers" / "store"
                name = write_embedded(folder, at, images=1500, steps=4, held_out=held_out)
                assert name == row["store"], f"expected the store {row['store']}, got {name}"
            found.append(repeated(folder, row, seeds))
            print(repeated_table(found[-1]), flush=True)
    return found
