"""Non-negative gradient pursuit with dense coefficients [n, m] in torch, after the papers' description.

The support is where the coefficients are positive, as in arXiv 2505.24360, so that a clipped atom
leaves it. Our own code: what a plain, careful version in a few lines of torch reaches.
"""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from pursue import serve_pursuer


class Dense:
    """Products with all atoms for everything, no slots."""

    def versions(self) -> dict[str, str]:
        """Imports torch."""
        import torch

        self.torch = torch
        return {"torch": version("torch")}

    def give(self, x: np.ndarray, atoms: np.ndarray, k: int) -> None:
        """Rows [n, d] and atoms [m, d]."""
        self.x, self.k = self.torch.from_numpy(x.copy()), k
        self.atoms = self.torch.from_numpy(atoms)

    def pursue(self) -> np.ndarray:
        """K steps; the exact step size along the gradient on the support."""
        torch = self.torch
        with torch.inference_mode():
            codes = torch.zeros(len(self.x), len(self.atoms))
            left = self.x
            for _ in range(self.k):
                pull = left @ self.atoms.T
                support = codes > 0
                support.scatter_(1, pull.argmax(1, keepdim=True), True)
                gradient = torch.where(support, pull, 0)
                way = gradient @ self.atoms
                length = (way * left).sum(1) / way.square().sum(1).clamp(min=1e-30)
                codes = torch.relu(codes + length[:, None] * gradient)
                left = self.x - codes @ self.atoms
            return codes.numpy()


if __name__ == "__main__":
    serve_pursuer(Dense())
