"""How fast is gradient pursuit, in both forms, beside one plain product x @ atoms.T?

python benchmarks/bench_pursuit.py [--quick]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from record import answer, interleaved

from jaxdict.pursuit import choose_method, gradient_pursuit, prepare_atoms

SHAPES = ((256, 768, 8192, 32), (256, 3072, 8192, 32))
QUICK = ((64, 128, 1024, 16),)


def measure(n: int, d: int, m: int, k: int, *, rounds: int = 3) -> dict[str, object]:
    """Seconds of each method at one shape, after a check that both leave the same residual."""
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(m, d)).astype(np.float32)
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    weights = np.zeros((n, m), np.float32)
    for row in weights:
        row[rng.choice(m, k, replace=False)] = rng.exponential(size=k)
    x = weights @ atoms + 0.05 * rng.normal(size=(n, d)).astype(np.float32)
    x, atoms = jnp.asarray(x), jnp.asarray(atoms)
    prepared = prepare_atoms(atoms, gram=True)
    runs = {
        "residual": partial(gradient_pursuit, x, atoms, k, method="residual"),
        "gram": partial(gradient_pursuit, x, atoms, k, method="gram"),
        "gram, prepared": partial(gradient_pursuit, x, prepared, k, method="gram"),
    }
    left = {name: np.asarray(run().residual_norm) for name, run in runs.items()}
    for name, norms in left.items():
        assert np.allclose(norms, left["residual"], rtol=2e-3, atol=1e-3), name
    assert float(left["residual"].mean()) < 0.6 * float(jnp.linalg.norm(x, axis=1).mean())
    product = jax.jit(lambda a, b: a @ b.T)
    timed = {name: partial(_blocking, run) for name, run in runs.items()}
    timed["floor: x @ atoms.T"] = partial(_blocking, partial(product, x, atoms))
    seconds = interleaved(timed, rounds=rounds)
    error = float(np.square(left["residual"]).sum() / jnp.square(x).sum())
    return {
        "shape": {"n": n, "d": d, "m": m, "k": k},
        "auto": choose_method(n, d, m, k),
        "residual share": error,
        "seconds": seconds,
    }


def _blocking(run: Callable[[], Any]) -> None:
    jax.block_until_ready(run())


if __name__ == "__main__":
    answer("pursuit", measure, SHAPES, quick=QUICK)
