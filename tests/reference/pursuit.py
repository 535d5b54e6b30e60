"""Non-negative gradient pursuit as the paper's equations read: one row, dense weights, float64.

Blumensath and Davies (2008), section III, with the clip at zero of arXiv 2505.24360. No slots, no
Gram matrix, no batching; every quantity is recomputed from the weights at every step.
"""

from __future__ import annotations

import numpy as np

ROUNDING = 16 * np.finfo(np.float64).eps


def gradient_pursuit(x, atoms, k, signed=False):
    """Weights [m] of one row x [d] on unit atoms [m, d], and the residual norm after each step."""
    scale = np.linalg.norm(x)
    weights = np.zeros(len(atoms))
    norms = [scale]
    if scale == 0:
        return weights, np.array(norms)
    x = x / scale
    for _ in range(k):
        residual = x - weights @ atoms
        inner = atoms @ residual
        best = np.argmax(np.abs(inner) if signed else inner)
        support = weights != 0
        if abs(inner[best]) > ROUNDING and (signed or inner[best] > 0):
            support[best] = True
        gradient = np.where(support, inner, 0)
        if np.abs(gradient).max() <= ROUNDING:
            break
        direction = gradient @ atoms
        step = (gradient @ gradient) / (direction @ direction)
        new = weights + step * gradient
        if not signed:
            new = np.maximum(new, 0)
        if np.linalg.norm(x - new @ atoms) > np.linalg.norm(residual):
            # Clipping made it worse: the best point between the old and the new weights instead.
            change = (new - weights) @ atoms
            new = weights + (residual @ change) / (change @ change) * (new - weights)
        weights = new
        norms.append(scale * np.linalg.norm(x - weights @ atoms))
    return scale * weights, np.array(norms)


def papers_step(x, atoms, k):
    """The same without any guard: what the papers' solvers compute (may grow, may divide by 0)."""
    weights = np.zeros(len(atoms))
    for _ in range(k):
        residual = x - weights @ atoms
        inner = atoms @ residual
        support = weights != 0
        support[np.argmax(inner)] = True
        gradient = inner * support
        direction = gradient @ atoms
        step = (direction @ residual) / (direction @ direction)
        weights = np.maximum(weights + step * gradient, 0)
    return weights


def matching_pursuit(x, atoms, k, signed=False):
    """Weights [m] of one row on unit atoms, and the residual norm after each step: every atom is tried."""
    scale = np.linalg.norm(x)
    x = x / scale
    weights, norms = np.zeros(len(atoms)), [scale]
    for _ in range(k):
        inner = atoms @ (x - weights @ atoms)
        trials = []
        for j in range(len(atoms)):
            new = weights.copy()
            new[j] = new[j] + inner[j] if signed else max(0, new[j] + inner[j])
            trials.append(new)
        left = [np.linalg.norm(x - new @ atoms) for new in trials]
        if min(left) >= norms[-1] / scale * (1 - ROUNDING):
            break
        weights = trials[int(np.argmin(left))]
        norms.append(scale * min(left))
    return scale * weights, np.array(norms)


def orthogonal_matching_pursuit(x, atoms, k, signed=False):
    """The same by least squares on the support; non-negative, by the inner loop of Lawson and Hanson."""
    scale = np.linalg.norm(x)
    x = x / scale
    weights, norms = np.zeros(len(atoms)), [scale]
    for _ in range(k):
        inner = atoms @ (x - weights @ atoms)
        best = int(np.argmax(np.abs(inner) if signed else inner))
        if abs(inner[best]) <= ROUNDING or (inner[best] <= 0 and not signed):
            break
        support = sorted({best, *np.flatnonzero(weights)})
        while True:
            target = np.zeros(len(atoms))
            target[support] = np.linalg.lstsq(atoms[support].T, x, rcond=None)[0]
            down = [j for j in support if target[j] <= 0]
            if signed or not down:
                break
            shares = [weights[j] / (weights[j] - target[j]) for j in down]
            weights = weights + min(shares) * (target - weights)
            support.remove(down[int(np.argmin(shares))])
            weights = np.where(np.isin(np.arange(len(atoms)), support), weights, 0)
        weights = target
        norms.append(scale * np.linalg.norm(x - weights @ atoms))
    return scale * weights, np.array(norms)
