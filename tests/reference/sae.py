"""Slow, obvious NumPy versions of the TopK autoencoder, its loss, its metrics and one Adam step."""

from __future__ import annotations

import numpy as np


def encode(encoder, encoder_bias, bias, x, k):
    """Dense codes [n, m], one row at a time; the lowest index wins a tie."""
    out = np.zeros((len(x), len(encoder)))
    for i, row in enumerate(x):
        pre = np.maximum(encoder @ (row - bias) + encoder_bias, 0)
        for j in sorted(range(len(pre)), key=lambda j: (-pre[j], j))[:k]:
            out[i, j] = pre[j]
    return out


def decode(codes, atoms, bias):
    """codes [n, m] @ atoms [m, d] + bias."""
    return codes @ atoms + bias


def gradient(encoder, encoder_bias, atoms, bias, x, k, variance):
    """Loss mean ||x - x_hat||^2 / variance and its gradient by the chain rule, row by row."""
    codes = encode(encoder, encoder_bias, bias, x, k)
    g_encoder, g_atoms = np.zeros_like(encoder), np.zeros_like(atoms)
    g_encoder_bias, g_bias = np.zeros_like(encoder_bias), np.zeros_like(bias)
    loss = 0.0
    for row, e in zip(x, codes, strict=True):
        x_hat = e @ atoms + bias
        loss += np.sum((row - x_hat) ** 2) / len(x) / variance
        g = 2 * (x_hat - row) / len(x) / variance
        g_bias += g
        for j in np.flatnonzero(e):
            g_atoms[j] += e[j] * g
            slope = atoms[j] @ g
            g_encoder[j] += slope * (row - bias)
            g_encoder_bias[j] += slope
            g_bias -= slope * encoder[j]
    return loss, (g_encoder, g_encoder_bias, g_atoms, g_bias)


def fvu(x, x_hat):
    """Fraction of variance unexplained."""
    return np.sum((x - x_hat) ** 2) / np.sum((x - x.mean(0)) ** 2)


def ve(x, x_hat):
    """Mean over dimensions of the squared correlation."""
    return np.mean([np.corrcoef(x[:, i], x_hat[:, i])[0, 1] ** 2 for i in range(x.shape[1])])


def rows_since_fired(before, codes, rows_in_batch):
    """Rows seen since each feature was last active, one row after the other."""
    after = np.array(before)
    for row in range(rows_in_batch):
        after += 1
        after[codes[row] > 0] = 0
    return after
