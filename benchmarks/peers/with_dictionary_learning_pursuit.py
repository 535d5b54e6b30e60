"""Gradient pursuit of dictionary_learning, by its own `grad_pursuit`."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from pursue import serve_pursuer


class DictionaryLearning:
    """Rows [n, d], dictionary [d, m], dense weights [n, m]."""

    def versions(self) -> dict[str, str]:
        """Imports the library."""
        import torch
        from dictionary_learning.grad_pursuit import grad_pursuit

        self.torch, self.solve = torch, grad_pursuit
        return {name: version(name) for name in ("dictionary-learning", "torch")}

    def give(self, x: np.ndarray, atoms: np.ndarray, k: int) -> None:
        """The dictionary as a transposed view, as the library's decoder weights are."""
        self.x, self.k = self.torch.from_numpy(x.copy()), k
        self.atoms = self.torch.from_numpy(atoms).T

    def pursue(self) -> np.ndarray:
        """By the library."""
        return self.solve(self.x, self.atoms, target_l0=self.k).numpy()


if __name__ == "__main__":
    serve_pursuer(DictionaryLearning())
