"""ITDA as it reads: one row at a time, float64, least squares by SciPy."""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from tests.reference.pursuit import gradient_pursuit


def encode(z, atoms, k):
    """Reconstruction of one unit row by k steps of pursuit."""
    return gradient_pursuit(z, atoms, k)[0] @ atoms if len(atoms) else np.zeros_like(z)


def share_left(y, y_hat):
    """||y - y_hat||^2 / ||y||^2 of one row; 0 of a zero row."""
    return ((y - y_hat) ** 2).sum() / (y**2).sum() if y.any() else 0.0


def gain(j, unit, rebuilt, y, y_hat, fvu):
    """What row j as an atom takes off the FVU of all rows: all of its own, a step along it of another's."""
    total = fvu[j]
    for i in range(len(unit)):
        if i != j:
            step = max(0, (unit[i] - rebuilt[i]) @ unit[j])
            total += max(0, share_left(y[i], y_hat[i]) - share_left(y[i], y_hat[i] + step * y[j]))
    return total


def select(unit, rebuilt, fvu, threshold, duplicate, rule="worst", y=None, y_hat=None):
    """Rows that join, in order; others that can use the new atom are refitted. y is a target's rows."""
    rebuilt, fvu, own = rebuilt.copy(), fvu.copy(), y is None
    y, y_hat = (unit, rebuilt) if own else (y, y_hat.copy())
    left = fvu.copy() if own else ((unit - rebuilt) ** 2).sum(1)
    waiting, chosen = np.ones(len(unit), bool), []
    while (bad := waiting & (fvu > threshold)).any():
        score = fvu
        if rule == "cover":
            score = [
                gain(j, unit, rebuilt, y, y_hat, fvu) if bad[j] else -1 for j in range(len(unit))
            ]
        best = int(np.argmax(np.where(bad, score, -1)))
        chosen.append(best)
        atom = unit[best]
        for i, z in enumerate(unit):
            weights, error = nnls(np.stack([rebuilt[i], atom], axis=1), z)
            if weights[1] > 0 and error**2 < left[i]:
                left[i] = error**2
                rebuilt[i] = weights[0] * rebuilt[i] + weights[1] * atom
                if not own:
                    y_hat[i] = weights[0] * y_hat[i] + weights[1] * y[best]
                fvu[i] = error**2 if own else share_left(y[i], y_hat[i])
            if z @ atom > duplicate:
                waiting[i] = False
        waiting[best] = False
    return chosen


def build(batches, threshold, k, duplicate=0.99, rule="worst"):
    """Atoms and, for each, (batch, row) it came from."""
    atoms, source = np.zeros((0, batches[0].shape[1])), []
    for number, rows in enumerate(batches):
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        rebuilt = np.stack([encode(z, atoms, k) for z in unit])
        fvu = np.where(rebuilt.any(1), ((unit - rebuilt) ** 2).sum(1), 1.0)
        chosen = select(unit, rebuilt, fvu, threshold, duplicate, rule)
        atoms = np.concatenate([atoms, unit[chosen]])
        source += [(number, row) for row in chosen]
    return atoms, source


def plain(unit, fvu, threshold, duplicate):
    """Every row above the threshold joins, but for near-duplicates of one that did."""
    chosen = []
    for i, z in enumerate(unit):
        if fvu[i] > threshold and all(z @ unit[j] <= duplicate for j in chosen):
            chosen.append(i)
    return chosen


def build_pairs(batches, targets, threshold, k, duplicate=0.99, rule="worst"):
    """The same with a target: unit rows of the source pursue, rows of the target have to be rebuilt."""
    xs, ys = np.zeros((0, batches[0].shape[1])), np.zeros((0, targets[0].shape[1]))
    source = []
    for number, (rows, others) in enumerate(zip(batches, targets, strict=True)):
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        unit, y = rows / norms, others / norms
        codes = [gradient_pursuit(z, xs, k)[0] if len(xs) else np.zeros(0) for z in unit]
        rebuilt, y_hat = (np.stack([c @ table for c in codes]) for table in (xs, ys))
        fvu = np.array([share_left(*pair) for pair in zip(y, y_hat, strict=True)])
        chosen = select(unit, rebuilt, fvu, threshold, duplicate, rule, y, y_hat)
        xs, ys = np.concatenate([xs, unit[chosen]]), np.concatenate([ys, y[chosen]])
        source += [(number, row) for row in chosen]
    return xs, ys, source
