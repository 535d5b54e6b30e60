"""Many devices: the same training as on one, whichever way rows and atoms are split, and in two processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdict.devices import mesh
from jaxdict.dictionary.arrays import ENCODER_KINDS
from jaxdict.dictionary.files import load_dictionary
from jaxdict.export.config import ExportConfig
from jaxdict.export.export import export
from jaxdict.sae import model
from jaxdict.sae.state import Metrics, TrainState
from tests.jaxdict import on_mesh
from tests.jaxdict.command import ROOT, Command, curve, last_step, weights, words
from tests.jaxdict.planted import SITE, write_planted_store

CASES = [*on_mesh.FEW, "resampled", "members"]


def run_on_mesh(folder, *words):
    """What `on_mesh` wrote: {name of case / name of mesh / name: array}."""
    out = folder / "found.npz"
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run(
        [sys.executable, "-m", "tests.jaxdict.on_mesh", str(out), *words],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    with np.load(out) as arrays:
        return {tuple(name.split("/")): arrays[name] for name in arrays.files}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_on_mesh(tmp_path_factory.mktemp("mesh"))


def meshes_of(case):
    return on_mesh.meshes_of(case, thorough=False)[1:]


def assert_same_training(found, case, meshes):
    fields = Metrics._fields
    one = found[case, "one", "numbers"]
    assert one[:, fields.index("aux")].max() > 0, "AuxK should be at work"
    assert one[:, fields.index("dead")].max() > 0, "there should be dead features"
    states = {name for at, on, name in found if (at, on) == (case, "one") and "state" in name}
    assert len(states) >= 19, "weights, two moments, average and counters"
    for name in meshes:
        np.testing.assert_allclose(found[case, name, "numbers"], one, rtol=2e-4, atol=1e-5)
        # To the row, after every step.
        np.testing.assert_array_equal(found[case, name, "since"], found[case, "one", "since"])
        for leaf in states:
            np.testing.assert_allclose(
                found[case, name, leaf], found[case, "one", leaf], atol=1e-4, err_msg=leaf
            )


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_trains_as_one_device_does(found, case):
    assert_same_training(found, case, meshes_of(case))


@pytest.mark.slow
def test_every_kind_on_every_mesh_trains_as_on_one_device(tmp_path):
    found = run_on_mesh(tmp_path, "all")
    for case in ENCODER_KINDS:
        assert_same_training(found, case, ["data", "features", "both"])
    assert_same_training(found, "transcoder", ["both"])


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_splits_weights_with_their_moments_and_compiles_once(found, case):
    # What is resampled is stepped by what its kind was compiled to before, resampling or not.
    compiled = 0 if case == "resampled" else 1
    assert found[case, "one", "compiled"] == compiled
    for name in meshes_of(case):
        assert found[case, name, "compiled"] == compiled
        shares = {"data": 1, "features": 8, "both": 4}[name]
        lead = (2,) if case == "members" else ()
        for part, whole in zip(
            found[case, name, "parts"], found[case, name, "wholes"], strict=True
        ):
            assert tuple(whole) == (*lead, on_mesh.M, whole[-1])
            assert tuple(part) == (*lead, on_mesh.M // shares, whole[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_product_of_all_rows_and_atoms_is_never_gathered(found, case):
    whole = on_mesh.N * on_mesh.M
    assert found["product", "features", "gathered"] == whole, "it would be seen"
    for name in meshes_of(case):
        if name == "data":
            continue
        rows = on_mesh.N // {"features": 1, "both": 2}[name]
        gathered = int(found[case, name, "gathered"])
        assert 0 < gathered < rows * on_mesh.M, "of each row only the largest values may travel"


def test_members_of_a_mesh_are_the_models_they_would_be_alone(found):
    alone = found["topk", "one", "numbers"][: on_mesh.RESAMPLED]
    together = found["members", "both", "numbers"][: on_mesh.RESAMPLED, :, 0]
    np.testing.assert_allclose(together, alone, rtol=2e-4, atol=1e-5)
    assert not np.allclose(found["members", "both", "numbers"][:, 0, 1], alone[-1, 0])


def test_resampling_on_a_mesh_resets_what_is_dead(found):
    at = on_mesh.RESAMPLED - 1
    assert found["jumprelu", "both", "since"][at].max() >= on_mesh.DEAD
    assert 0 < found["resampled", "both", "since"][at].max() < on_mesh.DEAD


def test_wrong_meshes_say_what_there_is():
    for text, message in (
        ("data=9", r"at most the 8 devices there are, got 'data=9' \(9\)"),
        ("rows=2", r"such as data=4,features=2, got 'rows=2'"),
        ("data=0", r"got 'data=0'"),
        ("data", r"got 'data'"),
    ):
        with pytest.raises(ValueError, match=message):
            mesh.read_mesh(text, 8)
    assert mesh.read_mesh("auto", 8) == (8, 1)
    assert mesh.read_mesh("features=2", 8) == (1, 2)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_a_run_moves_from_eight_devices_to_two_processes_and_ends_as_on_one_device(tmp_path):
    store = write_planted_store(tmp_path / "store")
    settings = {
        **{"store": store, "site": SITE, "kind": "batchtopk", "atoms": 48, "k": 4, "batch": 128},
        **{"rows": 128 * 300, "warmup": 5, "dead_rows": 2000, "ema": 0.9, "lr": 1e-3, "aux": 0},
        **{"log_every": 1, "save_every": 1000, "eval_every": 100},
    }
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    flags = ["train", "sae", *words(**settings)]
    stopped = 128 + signal.SIGTERM

    one = Command(*flags, "--out", str(moved), "--mesh", "data=4,features=2", devices=8)
    one.until(lambda: last_step(moved) >= 40)
    one.process.terminate()
    assert "go on with --resume" in one.end(status=stopped)
    first = last_step(moved)
    assert 40 <= first < 300 and weights(moved)[0] == first

    def two() -> list[Command]:
        joined = [*flags, "--out", str(moved), "--resume"]
        joined += words(coordinator=f"127.0.0.1:{free_port()}", processes=2)
        return [Command(*joined, "--process", str(i)) for i in (0, 1)]

    both = two()
    both[0].until(lambda: last_step(moved) >= first + 20)
    for command in both:
        command.process.terminate()
    for command in both:
        command.end(status=stopped)
    second = last_step(moved)
    assert first + 20 <= second < 300 and weights(moved)[0] == second

    both = two()
    Command(*flags, "--out", str(alone)).end()
    said = [command.end() for command in both]
    assert f"run: {moved}" in said[0] and "run:" not in said[1]

    assert weights(moved)[0] == 300
    for got, wanted in zip(weights(moved)[1], weights(alone)[1], strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-3)
    assert [line["step"] for line in curve(moved)] == [line["step"] for line in curve(alone)]
    for got, wanted in zip(curve(moved), curve(alone), strict=True):
        names = ("loss", "l0", "dead") if got["kind"] == "train" else ("fvu", "l0")
        assert [got[n] for n in names] == pytest.approx([wanted[n] for n in names], rel=2e-3)
    export(ExportConfig(run=moved, out=tmp_path / "dictionary"))
    assert load_dictionary(tmp_path / "dictionary").kind == "batchtopk"


def test_the_state_of_any_optimizer_is_split_by_its_atoms():
    params = model.initial_params(jax.random.key(0), 6, mean=jnp.zeros(6))
    params = params._replace(threshold=jnp.zeros(6))
    moments = optax.chain(optax.trace(0.9), optax.scale_by_adam()).init(params)  # pyright: ignore[reportArgumentType]
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, moments, zero, jnp.zeros(6, jnp.int32), params, jnp.zeros(()))
    found = jax.tree_util.tree_leaves_with_path(state.placed("split", "whole"))
    whole = {jax.tree_util.keystr(path) for path, place in found if place == "whole"}
    trees = (".params", ".ema", ".optimizer[0].trace", ".optimizer[1].mu", ".optimizer[1].nu")
    others = {".step", ".threshold", ".optimizer[1].count"}
    assert whole == {f"{tree}.bias" for tree in trees} | others
    assert len(found) == 5 * 5 + 4
