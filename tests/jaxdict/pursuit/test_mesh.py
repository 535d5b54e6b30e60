"""Rows and atoms split over devices: the same codes as on one device."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from jaxdict.pursuit import gradient_pursuit
from tests.jaxdict.command import ROOT
from tests.jaxdict.on_pursuit_mesh import METHODS, NAMES


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    out = folder / "found.npz"
    words = [sys.executable, "-m", "tests.jaxdict.on_pursuit_mesh", str(out)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_gives_the_codes_of_one_device(found, name, method):
    one = {f: found[f"{name}/{method}/one/{f}"] for f in ("indices", "values", "status", "steps")}
    assert (one["values"] != 0).sum() > 40
    assert len(set(one["status"].tolist())) >= 4, "rows of many a kind"
    for where in ("data", "features", "both"):
        if f"{name}/{method}/{where}/values" not in found:
            continue
        for field in ("indices", "status", "steps"):
            got = found[f"{name}/{method}/{where}/{field}"]
            np.testing.assert_array_equal(got, one[field], err_msg=f"{where} {field}")
        for field in ("values", "residual_norm"):
            got, wanted = (found[f"{name}/{method}/{at}/{field}"] for at in (where, "one"))
            np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-6)


def test_prepared_atoms_lie_where_they_are_used(found):
    assert [found[f"parts/{i}"].tolist() for i in range(3)] == [[12, 20], [12], [48, 12]]


def test_of_each_row_only_the_best_atom_travels(found):
    assert 0 < found["gathered"] <= 16 * 8, "a score or an index of each device"


def test_other_axes_are_refused():
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    with pytest.raises(ValueError, match="axes data and features at most, got rows"):
        gradient_pursuit(np.ones((2, 3)), np.eye(3), 1, mesh=mesh)
