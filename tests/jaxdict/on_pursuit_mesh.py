"""Every pursuit on 8 virtual devices, split in several ways; writes the results: OUT.npz.

    python -m tests.jaxdict.on_pursuit_mesh OUT.npz   (with --xla_force_host_platform_device_count=8)

Its numbers are checked by test_pursuit_mesh.py.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxdict import pursuit
from jaxdict.pursuit.solve import _solve, _Static
from tests.jaxdict.on_mesh import gathered

N, D, M, K = 13, 20, 50, 6
NAMES = ("gradient_pursuit", "matching_pursuit", "orthogonal_matching_pursuit")
METHODS = ("residual", "gram")
MESHES = {"data": (8, 1), "features": (1, 8), "both": (2, 4)}


def main(out: str) -> None:
    assert jax.device_count() == 8
    rng = np.random.default_rng(0)
    atoms = rng.normal(size=(M, D)).astype(np.float32)
    # A tie between devices, exact in any order of summation: the first must win.
    atoms[[7, 33, 40]] = np.eye(D, dtype=np.float32)[0] * np.array([[8], [4], [1]], np.float32)
    x = rng.normal(size=(N, D)).astype(np.float32)
    x[3], x[4, 2], x[5] = 0, np.nan, 2 * atoms[33]
    devices = np.array(jax.devices())
    meshes = {name: Mesh(devices.reshape(s), ("data", "features")) for name, s in MESHES.items()}
    found = {}
    for name in NAMES:
        for method in METHODS:
            for where, mesh in (("one", None), *meshes.items()):
                if where in ("data", "features") and name != NAMES[0]:
                    continue  # for the others "both" is enough: it splits rows and atoms
                result = getattr(pursuit, name)(x, atoms, K, method=method, mesh=mesh)
                found |= {f"{name}/{method}/{where}/{n}": v for n, v in result._asdict().items()}
    prepared = pursuit.prepare_atoms(atoms[:48], gram=True, mesh=meshes["both"])
    parts = [leaf.addressable_shards[0].data.shape for leaf in prepared]
    found |= {f"parts/{i}": np.array(shape) for i, shape in enumerate(parts)}
    static = _Static(K, "gradient", "residual", signed=False, chunk=16, mesh=meshes["features"])
    sizes = (jnp.ones((16, D)), pursuit.prepare_atoms(np.ones((512, D), np.float32)), 0.0)
    text = _solve.lower(*sizes, static).compile().as_text()
    np.savez(out, gathered=gathered(text), **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
