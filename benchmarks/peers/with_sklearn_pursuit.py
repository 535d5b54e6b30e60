"""Orthogonal matching pursuit of scikit-learn: signed least squares, with a Gram matrix it is given."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
from pursue import serve_pursuer


class Sklearn:
    """`orthogonal_mp_gram`, the library's fastest way; the Gram matrix is not timed."""

    def versions(self) -> dict[str, str]:
        """Imports the library."""
        from sklearn.linear_model import orthogonal_mp_gram

        self.solve = orthogonal_mp_gram
        return {"scikit-learn": version("scikit-learn")}

    def give(self, x: np.ndarray, atoms: np.ndarray, k: int) -> None:
        """The Gram matrix once for all rows."""
        self.x, self.atoms, self.k = x, atoms, k
        self.gram = atoms @ atoms.T

    def pursue(self) -> np.ndarray:
        """One row after the other, as the library does."""
        inner = self.atoms @ self.x.T
        return self.solve(self.gram, inner, n_nonzero_coefs=self.k).T


if __name__ == "__main__":
    serve_pursuer(Sklearn())
