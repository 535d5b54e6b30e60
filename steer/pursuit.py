"""Gradient pursuit in torch: the residual form of `jaxdict.pursuit`, batched, not vmapped.

It follows the same rules, and so finds the same codes: rows are scaled to unit norm, one atom may
join a step, the step along the gradient is exact, clipped at zero, and shortened where clipping
made the residual grow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def combine(indices: Tensor, weights: Tensor, table: Tensor) -> Tensor:
    """Weighted sums of table rows, sum_j weights_j table[indices_j], [n, k] -> [n, width].

    Nothing of shape [n, k, width] is made.
    """
    if not len(weights):
        return table.new_zeros(0, table.shape[1])
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=weights.to(table.dtype))


@torch.no_grad()
def gradient_pursuit(x: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Non-negative sparse codes of rows: at most k atoms a row.

    Each step adds the atom with the largest inner product with the residual r to the support S,
    then moves on S:

        S <- S + argmax_j <atom_j, r>;   g = atoms_S r;   a = <g, g> / ||sum g_j atom_j||^2
        values_S <- max(0, values_S + a g);   r <- x - sum_j values_j atom_j

    Args:
        x: [n, d] rows of any scale; a row that is zero or not finite gets an empty code.
        atoms: [m, d] of any norm; values are in units of the atoms as given. Zero atoms are never
            used.
        k: steps, and slots of the result; may exceed m.

    Returns:
        indices int64 [n, k] and values [n, k], largest first; an empty slot is index 0, value 0.

    Source: Blumensath and Davies, Gradient Pursuits (IEEE TSP 2008), section III; equal to
    `jaxdict.pursuit` up to rounding.
    """
    unit, norms = _unit_rows(atoms)
    rows, scale = _unit_rows(torch.where(x.isfinite().all(-1, keepdim=True), x, 0))
    floor = 16 * torch.finfo(rows.dtype).eps
    indices = torch.zeros(len(rows), k, dtype=torch.long, device=rows.device)
    values = rows.new_zeros(len(rows), k)
    residual, running = rows, scale > 0
    for t in range(k):
        if not running.any():
            break
        correlations = residual @ unit.T
        score, best = correlations.max(-1)
        active = values != 0
        held = (active & (indices == best[:, None])).any(-1)
        joins = running & (score > floor) & ~held
        indices[:, t] = torch.where(joins, best, indices[:, t])
        here = active.clone()
        here[:, t] |= joins
        gradient = torch.where(here & running[:, None], correlations.gather(1, indices), 0)
        running = running & (gradient.abs().amax(-1) > floor)
        gradient = torch.where(running[:, None], gradient, 0)

        direction = combine(indices, gradient, unit)
        length = _quotient(_dot(gradient, gradient), _dot(direction, direction))
        proposed = (values + length[:, None] * gradient).relu_()
        after = rows - combine(indices, proposed, unit)
        change = residual - after
        along, energy = _dot(residual, change), _dot(change, change)
        whole = energy <= 2 * along
        share = torch.where(whole, 1, _quotient(along, energy).clamp(0, 1))
        # A row whose residual would not shrink is done and keeps what it has.
        running = running & (share * (2 * along - share * energy) > 0)
        moved, whole, share = running[:, None], whole[:, None], share[:, None]
        part = values + share * (proposed - values)
        values = torch.where(moved, torch.where(whole, proposed, part), values)
        part = residual - share * change
        residual = torch.where(moved, torch.where(whole, after, part), residual)
    atom_norms = norms[indices]
    values = values / torch.where(atom_norms > 0, atom_norms, 1) * scale[:, None]
    values, order = torch.sort(values, dim=-1, descending=True, stable=True)
    return torch.where(values > 0, indices.gather(1, order), 0), values


def _unit_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows scaled to unit norm, and their norms; a zero row stays zero, nothing overflows."""
    largest = x.abs().amax(-1)
    largest = torch.where(largest > 0, largest, 1)
    norm = largest * torch.linalg.vector_norm(x / largest[:, None], dim=-1)
    return x / torch.where(norm > 0, norm, 1)[:, None], norm


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, or 0 where b is 0."""
    return torch.where(b > 0, a / torch.where(b > 0, b, 1), 0)
