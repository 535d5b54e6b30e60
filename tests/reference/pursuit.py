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
