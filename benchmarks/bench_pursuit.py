"""How fast are our pursuits, at which error, beside other solvers and one plain product x @ atoms.T?

python benchmarks/bench_pursuit.py [--quick] [--only shapes|curves] [--shape N,D,M,K] [--rounds N]

Ours and the peers (dictionary_learning's gradient pursuit, a plain dense one in torch, scikit-learn's
orthogonal matching pursuit; each in a process of its own, peers/) take turns on the same rows and as
many cores. Before anything is timed the error of each is computed from its codes, and ours is held
not to be larger. What is slow gets fewer rows; its time is scaled, and its rows are printed.
All run in huge pages where there are any, as `jaxdict train` does.
Writes results/pursuit.json and, with the curves, docs/pursuit.png.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers.processes import OURS, PEERS, THREADS, Way, Worker, workers
from record import save

from jaxdict.devices import huge_pages


class Shape(NamedTuple):
    """Size of a problem: n rows of width d, m atoms, k steps."""

    n: int
    d: int
    m: int
    k: int

    @property
    def work(self) -> float:
        """Multiply-adds of the residual form."""
        return float(self.n) * self.d * self.m * self.k


SHAPES = (
    Shape(256, 768, 8192, 32),
    Shape(256, 3072, 8192, 32),
    Shape(1024, 3072, 32768, 64),
)
QUICK = (Shape(64, 128, 1024, 16),)
WAYS = {
    "dictionary_learning": Way("with_dictionary_learning_pursuit.py", PEERS),
    "dense torch": Way("with_dense_pursuit.py", PEERS),
    "scikit-learn OMP": Way("with_sklearn_pursuit.py", OURS),
}
RIVALS = {
    "dictionary_learning": ("gradient, residual", "gradient, gram", "gradient, gram prepared"),
    "dense torch": ("gradient, residual", "gradient, gram", "gradient, gram prepared"),
    "scikit-learn OMP": ("orthogonal signed, residual", "orthogonal signed, gram prepared"),
}
"""Which of ours answer the same question as a peer, and may leave no larger an error."""
LARGE = 1e12
"""Work from which a shape is large: gradient pursuit only, on fewer rows where it is slow."""
SLACK = 1e-3
"""By how much, relatively, the mean squared residual may be larger for rounding."""


def problem(shape: Shape, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows [n, d], sums of k of m random unit atoms with exponential weights and noise; and the atoms."""
    n, d, m, k = shape
    rng = np.random.default_rng(seed)
    atoms = rng.standard_normal((m, d), np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    x = 0.05 * rng.standard_normal((n, d), np.float32)
    for row in x:
        row += rng.standard_exponential(k, np.float32) @ atoms[rng.choice(m, k, replace=False)]
    return x, atoms


def ours(
    x: Any, atoms: Any, k: int, *, gram: bool, few: bool, rows: int
) -> dict[str, Callable[[], Any]]:
    """Our pursuits: name -> function.

    Args:
        x: float [n, d].
        atoms: float [m, d].
        k: steps.
        gram: whether the Gram matrix is to be made.
        few: gradient pursuit on prepared atoms only.
        rows: how many rows the residual form gets.
    """
    from jaxdict.pursuit import (
        gradient_pursuit,
        matching_pursuit,
        orthogonal_matching_pursuit,
        prepare_atoms,
    )

    plain = prepare_atoms(atoms)
    verbs: dict[str, Callable[..., Any]] = {
        "gradient": gradient_pursuit,
        "matching": matching_pursuit,
        "orthogonal": orthogonal_matching_pursuit,
        "orthogonal signed": partial(orthogonal_matching_pursuit, signed=True),
    }
    if few:
        verbs = {"gradient": gradient_pursuit}
    found = {f"{name}, residual": partial(v, x[:rows], plain, k) for name, v in verbs.items()}
    if gram:
        prepared = prepare_atoms(atoms, gram=True)
        if not few:
            found["gradient, gram"] = partial(gradient_pursuit, x, atoms, k, method="gram")
        found |= {f"{name}, gram prepared": partial(v, x, prepared, k) for name, v in verbs.items()}
    return found


def peer_rows(name: str, shape: Shape) -> int:
    """Rows that a peer gets: all, unless it would take minutes; 0 if its Gram matrix is too large."""
    if name == "scikit-learn OMP":
        return min(shape.n, 32) if shape.m <= 16384 else 0
    return shape.n if shape.work < 3e11 else min(shape.n, 16)


def own_rows(shape: Shape) -> int:
    """Rows that our residual form gets: all, unless it would take minutes."""
    return shape.n if shape.work < LARGE else min(shape.n, 64)


def measure(shape: Shape, *, folder: Path, rounds: int, few: bool = False) -> dict[str, Any]:
    """Seconds and relative squared error of all at one shape.

    Args:
        shape: of the problem.
        folder: where the problem is written for the peers.
        rounds: turns of each.
        few: gradient pursuit only, for the curves and for large shapes.
    """
    import jax
    import jax.numpy as jnp

    from jaxdict.pursuit import choose_method

    n, d, m, k = shape
    x, atoms = problem(shape)
    gram = available() > 4 * m * m * 4
    load = os.getloadavg()[0]
    on_device = jnp.asarray(x), jnp.asarray(atoms)
    solvers = ours(*on_device, k, gram=gram, few=few, rows=own_rows(shape))
    left = {name: np.asarray(solve().residual_norm, np.float64) for name, solve in solvers.items()}
    squares = np.square(x, dtype=np.float64).sum(1)
    rows = {name: len(norm) for name, norm in left.items()}
    error = {
        name: float(np.square(norm).sum() / squares[: len(norm)].sum())
        for name, norm in left.items()
    }
    wanted = {name: peer_rows(name, shape) for name in WAYS}
    ways = {name: way for name, way in WAYS.items() if wanted[name] and way.python.exists()}
    if few:
        ways.pop("scikit-learn OMP", None)
    files = {"atoms": str(folder / "atoms.npy")}
    np.save(files["atoms"], atoms)
    with ExitStack() as stack:
        found = stack.enter_context(workers(ways))
        same = {}
        for name, worker in found.items():
            rows[name] = wanted[name]
            files[name] = str(folder / f"{rows[name]}.npy")
            np.save(files[name], x[: rows[name]])
            job = {"n": rows[name], "m": m, "k": k, "steps": 1, "variant": files["atoms"]}
            worker.ask("open", rows=files[name], **job)
            part, total = x[: rows[name]].astype(np.float64), squares[: rows[name]].sum()
            spread = np.square(part - part.mean(0)).sum()
            error[name] = worker.ask("measure", rows=files[name])["fvu"] * spread / total
            same[name] = {
                own: float(np.square(left[own][: rows[name]]).sum() / total)
                for own in RIVALS[name]
                if own in left
            }
            for own, value in same[name].items():
                assert value <= error[name] * (1 + SLACK), (name, error[name], own, value)
        product = jax.jit(lambda a, b: a @ b.T)
        runs: dict[str, Callable[[], Any]] = {
            **{name: partial(_timed, solve) for name, solve in solvers.items()},
            **{name: partial(_asking, worker) for name, worker in found.items()},
            "floor: x @ atoms.T": partial(_timed, partial(product, *on_device)),
        }
        taken = in_turns(runs, rounds)
        versions = {n: v for worker in found.values() for n, v in worker.versions.items()}
    rows["floor: x @ atoms.T"] = n
    seconds = {name: statistics.median(t) * n / rows[name] for name, t in taken.items()}
    return {
        "shape": shape._asdict(),
        "auto": choose_method(n, d, m, k),
        "threads": THREADS,
        "load average before": load,
        "versions": versions,
        "rows": rows,
        "relative squared error": error,
        "ours on a peer's rows": same,
        "seconds for all rows": seconds,
        "all seconds": taken,
    }


def as_table(row: dict[str, Any]) -> str:
    """A shape's results in plain text."""
    seconds, error = row["seconds for all rows"], row["relative squared error"]
    best = seconds.get("gradient, gram prepared", seconds["gradient, residual"])
    lines = [
        "\nn={n} d={d} m={m} k={k}".format(**row["shape"])
        + f", auto: {row['auto']}, {row['threads']} threads, load average before "
        f"{row['load average before']:.1f}; as rows are fewer, seconds are scaled",
        f"{'':36}{'seconds':>10}{'x ours':>10}{'rows':>8}{'error':>12}",
    ]
    for name, value in seconds.items():
        shown = f"{error[name]:.6f}" if name in error else ""
        lines.append(f"{name:36}{value:10.3f}{value / best:10.2f}{row['rows'][name]:8}{shown:>12}")
    return "\n".join(lines)


def available() -> int:
    """Bytes of free memory; 8 GiB where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 8 << 30
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each by round, after one run to warm up; who begins moves on by one a round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for run in runs.values():
        run()
    for first in range(rounds):
        for place in range(len(names)):
            name = names[(first + place) % len(names)]
            time.sleep(0.2)  # until the threads of the one before have gone to sleep
            seconds[name].append(runs[name]())
    return seconds


def _timed(run: Callable[[], Any]) -> float:
    """Seconds until the result is there."""
    import jax

    started = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - started


def _asking(worker: Worker) -> float:
    """Seconds of a peer, as its own process measures them."""
    return worker.ask("run", steps=1)["seconds"]


def main() -> None:
    """Shapes, then curves."""
    flags = argparse.ArgumentParser(description="Our pursuits beside other solvers.")
    flags.add_argument("--quick", action="store_true", help="tiny shapes, nothing written")
    flags.add_argument("--only", choices=("shapes", "curves"))
    flags.add_argument("--shape", help="one shape n,d,m,k; nothing written")
    flags.add_argument(
        "--rounds", type=int, help="turns of each; default 3, 2 for curves; large shapes have one"
    )
    asked = flags.parse_args()
    huge_pages.ask()
    if not PEERS.exists():
        print(f"without the peers in torch: no interpreter at {PEERS} (make .venv-peers/.ready)")
    if hasattr(os, "sched_setaffinity"):  # before JAX counts the cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    from pursuit_curves import curves, draw, recovery

    trying = asked.quick or asked.shape is not None
    shapes = QUICK if asked.quick else SHAPES
    if asked.shape:
        shapes = (Shape(*map(int, asked.shape.split(","))),)
    document = []
    with tempfile.TemporaryDirectory(prefix="bench-pursuit-") as place:
        folder = Path(place)
        for shape in shapes if asked.only != "curves" else ():
            large = shape.work > LARGE
            rounds = 1 if large else asked.rounds or (2 if trying else 3)
            document.append(measure(shape, folder=folder, rounds=rounds, few=large))
            print(as_table(document[-1]), flush=True)
        if asked.only != "shapes" and not asked.shape:
            once = partial(measure, folder=folder, rounds=asked.rounds or 2, few=True)
            found = curves(lambda **sizes: once(Shape(**sizes)), quick=asked.quick)
            regained = recovery(quick=asked.quick)
            document.append({"curves": found, "recovery": regained})
            docs = Path(__file__).parents[1] / "docs"
            print(draw(found, regained, (folder if trying else docs) / "pursuit.png"))
    if not trying and asked.only is None:
        save("pursuit", document)


if __name__ == "__main__":
    main()
