"""Curves of the pursuit benchmark: seconds over k and over m, and how often planted atoms are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxdict.pursuit import gradient_pursuit, matching_pursuit, orthogonal_matching_pursuit

KS, MS = (4, 8, 16, 32, 64), (1024, 2048, 4096, 8192, 16384)
AT = {"n": 128, "d": 768, "m": 8192, "k": 32}
PLANTED = (2, 4, 8, 12, 16, 24, 32, 48)


def curves(measure: Callable[..., dict[str, Any]], *, quick: bool) -> dict[str, list[Any]]:
    """What `measure` says at each k, and at each m, the rest being as in AT."""
    at = {"n": 16, "d": 64, "m": 256, "k": 4} if quick else AT
    ks, ms = ((2, 4), (128, 256)) if quick else (KS, MS)
    return {
        "k": [measure(**(at | {"k": k})) for k in ks],
        "m": [measure(**(at | {"m": m})) for m in ms],
    }


def recovery(*, quick: bool) -> dict[str, Any]:
    """Share of rows whose planted atoms are all found, without noise, by the number of atoms planted.

    As many steps as planted atoms; d = 128, m = 512, weights uniform in [1, 2].
    """
    n, d, m = (20, 32, 64) if quick else (200, 128, 512)
    rng = np.random.default_rng(1)
    atoms = rng.standard_normal((m, d), np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    verbs = {
        "gradient": gradient_pursuit,
        "matching": matching_pursuit,
        "orthogonal": orthogonal_matching_pursuit,
    }
    share: dict[str, list[float]] = {name: [] for name in verbs}
    planted = PLANTED[:3] if quick else PLANTED
    for k in planted:
        support = np.stack([rng.permutation(m)[:k] for _ in range(n)])
        weights = rng.uniform(1, 2, size=(n, k)).astype(np.float32)
        x = np.stack([w @ atoms[s] for w, s in zip(weights, support, strict=True)])
        for name, verb in verbs.items():
            found = verb(x, atoms, k)
            used = np.where(np.asarray(found.values) > 0, np.asarray(found.indices), -1)
            hit = [set(s.tolist()) <= set(u.tolist()) for s, u in zip(support, used, strict=True)]
            share[name].append(float(np.mean(hit)))
    return {"shape": {"n": n, "d": d, "m": m}, "planted": list(planted), "share": share}


def draw(found: dict[str, list[Any]], regained: dict[str, Any], path: Path) -> Path:
    """Three panels: seconds over k, seconds over m (both on log axes), recovery."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for panel, (letter, rows) in zip(panels, found.items(), strict=False):
        for name in rows[0]["seconds for all rows"]:
            points = [
                (row["shape"][letter], row["seconds for all rows"][name])
                for row in rows
                if name in row["seconds for all rows"]
            ]
            style = "--" if name.startswith("floor") else "-"
            panel.loglog(*zip(*points, strict=True), style, marker="o", markersize=4, label=name)
        sizes = [row["shape"][letter] for row in rows]
        panel.set_xticks(sizes, labels=[f"{size:,}" for size in sizes])
        panel.minorticks_off()
        fixed = {name: size for name, size in rows[0]["shape"].items() if name != letter}
        panel.set_title(", ".join(f"{name} = {size}" for name, size in fixed.items()), fontsize=10)
        panel.set_xlabel({"k": "steps k", "m": "atoms m"}[letter])
        panel.set_ylabel("seconds")
        panel.grid(alpha=0.25)
    panels[0].legend(fontsize=8)
    for name, share in regained["share"].items():
        panels[2].plot(regained["planted"], share, marker="o", markersize=4, label=name)
    panels[2].set_title("n = {n}, d = {d}, m = {m}".format(**regained["shape"]), fontsize=10)
    panels[2].set_xlabel("planted atoms = steps")
    panels[2].set_ylabel("rows with all of them found")
    panels[2].grid(alpha=0.25)
    panels[2].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
