"""Random directions that a steered feature is compared with: as large as the edit, without meaning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from steer.coder import Coder


def random_directions(coder: Coder, features: Sequence[int], seed: int) -> dict[int, Tensor]:
    """Random directions with the norms of features' raw atoms and the angles between them.

    So every edit, and every sum of edits, keeps its norm exactly: with raw atoms A = R^T Q^T (QR of
    A^T), a random orthonormal Q' gives R^T Q'^T.

    Args:
        coder: the dictionary.
        features: at most d of them; repeated ones count once.
        seed: seed of the directions.

    Returns:
        Feature -> direction [d], float32.
    """
    features = sorted(set(features))
    atoms = torch.stack([coder.raw_atom(feature).float().cpu() for feature in features])
    triangle = torch.linalg.qr(atoms.T).R
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(coder.d, len(triangle), generator=generator)).Q
    return dict(zip(features, (basis @ triangle).T, strict=True))
