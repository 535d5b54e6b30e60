"""How many atoms does ITDA need for an error, and how long does it take beside an autoencoder that is as good?

python benchmarks/bench_itda.py [--quick] [--store runs/demo/store]

On a store of the embedded model (that of `jaxdict demo`, harvested where it is missing), site double.2.img. The curve: each rule over several
thresholds, atoms against held-out FVU, as JSON and as docs/itda-curve.png. The race: ITDA of N atoms, at a threshold
that is known and with the search for it; beside it TopK autoencoders of the same N and k trained over ever more rows
until one's held-out FVU is as low. Each training is a whole run with its own learning-rate schedule. What is compared
compiled nothing: the same had run before. Seconds are those of building and of training alone: fitting the
normalization, which is the same for both, and measuring are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

from record import save

from jaxdict import cli
from jaxdict.devices import huge_pages
from jaxdict.itda import TrainITDAConfig, train_itda
from jaxdict.runs import METRICS, read_lines
from jaxdict.sae import TrainSAEConfig
from jaxdict.training import train_sae

SITE, K = "double.2.img", 16
THRESHOLDS = (0.5, 0.4, 0.3, 0.25, 0.2, 0.17)
LINES = {
    "cover (default)": ("cover", 2048),
    "worst first": ("worst", 2048),
    "plain, batches of 512": ("plain", 512),
    "plain, batches of 64": ("plain", 64),
}
"""Name of a line of the curve: its rule and its batch. A plain build's first batch joins whole, so it starts there."""
COLOURS = ("#1f77b4", "#2ca02c", "#d62728", "#ff9f6e")
ROWS = 100_000
ATOMS = (256, 1024)
NEVER = 10**6
STARTS = 20_000
"""Rows of the shortest training of an autoencoder; each next one sees 1.5 times as many."""
DOCS = Path(__file__).parents[1] / "docs"


def _quiet(train: Any, config: Any) -> dict[str, Any]:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return train(config)


class Bench:
    """Runs on one store, in a folder that is thrown away."""

    def __init__(self, store: Path, folder: Path) -> None:
        """Nothing is read yet."""
        self.store, self._folder, self._count = store, folder, 0

    def _out(self) -> Path:
        self._count += 1
        return self._folder / str(self._count)

    def itda(self, rows: int, **settings: Any) -> dict[str, Any]:
        """Build one and give its summary."""
        config = TrainITDAConfig(
            store=self.store,
            site=SITE,
            out=self._out(),
            k=K,
            rows=rows,
            eval_every=NEVER,
            save_every=NEVER,
            **settings,
        )
        return _quiet(train_itda, config)

    def sae(self, rows: int, atoms: int) -> dict[str, Any]:
        """Train one and give its summary."""
        out = self._out()
        config = TrainSAEConfig.of(
            store=self.store,
            site=SITE,
            out=out,
            k=K,
            rows=rows,
            atoms=atoms,
            eval_every=NEVER,
            save_every=NEVER,
        )
        done = _quiet(train_sae, config)
        lines = [one for one in read_lines(out / METRICS) if one["kind"] == "train"]
        return {**done, "training_seconds": lines[-1]["seconds"]}

    def point(self, line: str, threshold: float, rows: int) -> dict[str, Any]:
        """One point of the curve."""
        rule, batch = LINES[line]
        done = self.itda(rows, rule=rule, batch=batch, threshold=threshold)
        held = done["heldout"]
        assert held["l0"] <= K and held["fvu"] < 1, held
        return {
            "what": "curve",
            "line": line,
            "rule": rule,
            "batch": batch,
            "threshold": threshold,
            "rows": rows,
            "atoms": done["m"],
            "fvu": held["fvu"],
            "fvu_normalized": held["fvu_normalized"],
            "never_active": done["training"]["never_active"],
            "seconds": done["building_seconds"],
        }

    def race(self, atoms: int, rows: int) -> dict[str, Any]:
        """ITDA of about `atoms` atoms, and the shortest training of an autoencoder that is as good."""
        searched = self.itda(rows, atoms=atoms)
        m, threshold = searched["m"], searched["threshold"]
        built = self.itda(rows, threshold=threshold)
        assert abs(built["m"] / m - 1) < 0.05, "the search gives what its threshold gives"
        m = built["m"]
        aim, trained, seen = built["heldout"]["fvu_normalized"], [], STARTS
        while not trained or trained[-1]["fvu_normalized"] > aim:
            if seen > 100 * rows:
                break
            done = self.sae(seen, m)
            trained.append(_sae_line(done))
            seen = round(1.5 * seen)
        reached = trained[-1]["fvu_normalized"] <= aim
        best = _sae_line(self.sae(trained[-1]["rows"], m))
        trials = searched["training"]["trials"]
        return {
            "what": "race",
            "shape": {"d": built["d"], "m": m, "k": K},
            "itda": {
                "rows": built["rows"],
                "threshold": threshold,
                "fvu": built["heldout"]["fvu"],
                "fvu_normalized": aim,
                "seconds": built["building_seconds"],
                "seconds with the search": searched["building_seconds"],
                "trials": len(trials),
                "rows per second": rows / built["building_seconds"],
                "atoms per second": m / built["building_seconds"],
            },
            "sae": {
                "as good": reached,
                "rows": trained[-1]["rows"],
                "seconds": best["seconds"],
                "seconds with compiling": trained[-1]["seconds"],
                "every": trained,
            },
            "itda's share of the autoencoder's rows": built["rows"] / trained[-1]["rows"],
            "itda's share of its time": built["building_seconds"] / best["seconds"],
        }


def _sae_line(done: dict[str, Any]) -> dict[str, Any]:
    held = done["heldout"]
    return {
        "rows": done["rows"],
        "fvu": held["fvu"],
        "fvu_normalized": held["fvu_normalized"],
        "seconds": done["training_seconds"],
    }


def draw(points: list[dict[str, Any]], out: Path) -> None:
    """Atoms against held-out FVU, a line a rule."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, colour in zip(LINES, COLOURS, strict=True):
        line = [p for p in points if p["line"] == name]
        x, y = [p["atoms"] for p in line], [p["fvu_normalized"] for p in line]
        axes.plot(x, y, marker="o", ms=4, color=colour, label=name)
        for p in line:
            axes.annotate(
                f"{p['threshold']:g}",
                (p["atoms"], p["fvu_normalized"]),
                fontsize=7,
                xytext=(4, 4),
                textcoords="offset points",
            )
    axes.set(xscale="log", yscale="log", xlabel="atoms", ylabel="held-out FVU, standardized rows")
    axes.set_title(
        f"ITDA on {points[0]['rows']:,} rows of {SITE}, k = {K}; thresholds at the dots",
        fontsize=10,
    )
    axes.grid(alpha=0.3, which="both")
    axes.legend(frameon=False)
    figure.savefig(out, dpi=130)


def main() -> None:
    """Measure and write."""
    flags = argparse.ArgumentParser(description="ITDA's rules, and ITDA beside an autoencoder.")
    flags.add_argument("--quick", action="store_true", help="few rows, nothing written")
    flags.add_argument("--store", type=Path, default=Path("runs/demo/store"))
    asked = flags.parse_args()
    huge_pages.ask()
    quick, store = asked.quick, asked.store
    if not store.exists():
        words = f"harvest --sites {SITE} --images 1500 --steps 4 --seed 0 --out"
        cli.call([*words.split(), str(store)])
    folder = Path(tempfile.mkdtemp(prefix="bench-itda-"))
    rows = 5_000 if quick else ROWS
    try:
        bench, found = Bench(store, folder), []
        for threshold in (0.5, 0.3) if quick else THRESHOLDS:
            for line in LINES:
                found.append(bench.point(line, threshold, rows))
                print(found[-1], flush=True)
        races = (64,) if quick else ATOMS
        for atoms in races:
            found.append(bench.race(atoms, rows))
            print(found[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    points = [one for one in found if one["what"] == "curve"]
    if quick:
        return
    draw(points, DOCS / "itda-curve.png")
    save("itda", found)


if __name__ == "__main__":
    main()
