"""ITDA as it reads: one row at a time, float64, least squares by SciPy."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from tests.reference.pursuit import gradient_pursuit


def encode(z, atoms, k):
    """Reconstruction of one unit row by k steps of pursuit."""
    return gradient_pursuit(z, atoms, k)[0] @ atoms if len(atoms) else np.zeros_like(z)


def select(unit, rebuilt, fvu, threshold, duplicate):
    """Rows that join, in order: the worst first; others that can use the new atom are refitted."""
    rebuilt, fvu = rebuilt.copy(), fvu.copy()
    chosen = []
    while (fvu > threshold).any():
        worst = int(np.argmax(fvu))
        chosen.append(worst)
        atom = unit[worst]
        for i, z in enumerate(unit):
            weights, left = nnls(np.stack([rebuilt[i], atom], axis=1), z)
            if weights[1] > 0 and left**2 < fvu[i]:
                rebuilt[i] = weights[0] * rebuilt[i] + weights[1] * atom
                fvu[i] = left**2
            if z @ atom > duplicate:
                fvu[i] = 0
        fvu[worst] = 0
    return chosen


def build(batches, threshold, k, duplicate=0.99):
    """Atoms and, for each, (batch, row) it came from."""
    atoms, source = np.zeros((0, batches[0].shape[1])), []
    for number, rows in enumerate(batches):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        rebuilt = np.stack([encode(z, atoms, k) for z in unit])
        fvu = np.where(rebuilt.any(1), ((unit - rebuilt) ** 2).sum(1), 1.0)
        chosen = select(unit, rebuilt, fvu, threshold, duplicate)
        atoms = np.concatenate([atoms, unit[chosen]])
        source += [(number, row) for row in chosen]
    return atoms, source
