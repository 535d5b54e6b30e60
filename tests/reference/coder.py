"""Slow, obvious NumPy version of encoding and decoding raw rows with an exported dictionary."""

from __future__ import annotations

import numpy as np

from tests.reference.pursuit import gradient_pursuit


def encode(dictionary, x):
    """Dense codes float64 [n, m], one row and one atom at a time; the lowest index wins a tie."""
    out = np.zeros((len(x), dictionary.m))
    for row, raw in enumerate(np.asarray(x, np.float64)):
        if dictionary.kind == "itda":
            out[row], _ = gradient_pursuit(
                own_space(dictionary, raw), dictionary.pursued, dictionary.k
            )
            continue
        active = {}
        for j in range(dictionary.m):
            pre = dictionary.encoder[j].astype(np.float64) @ raw + dictionary.encoder_bias[j]
            threshold = 0 if dictionary.threshold is None else dictionary.threshold[j]
            if pre > 0 and pre > threshold:
                active[j] = pre
        for j in sorted(active, key=lambda j: (-active[j], j))[: dictionary.k]:
            out[row, j] = active[j]
    return out


def decode(dictionary, dense):
    """Raw rows [n, d_out] from dense codes [n, m]."""
    own = dense @ dictionary.atoms.astype(np.float64)
    if dictionary.kind != "itda":
        return own + (0 if dictionary.bias is None else dictionary.bias)
    if dictionary.inverse is not None:
        own = own @ square(dictionary.inverse)
    if dictionary.transcoder:
        return own + dictionary.bias
    return own + (0 if dictionary.mean is None else dictionary.mean)


def own_space(dictionary, raw):
    """A raw row [d] in the space that pursuit runs in."""
    z = raw if dictionary.mean is None else raw - dictionary.mean
    return z if dictionary.transform is None else z @ square(dictionary.transform)


def square(matrix):
    """A diagonal [d] as the matrix [d, d] that it stands for."""
    matrix = matrix.astype(np.float64)
    return np.diag(matrix) if matrix.ndim == 1 else matrix
