"""Trains every kind on 8 virtual devices, split in several ways, and writes metrics and states to OUT.npz.

    python -m tests.jaxdict.on_mesh OUT.npz [all]       (with --xla_force_host_platform_device_count=8)

test_sharding.py checks them; it is a process of its own because JAX fixes the number of devices at its start.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxdict.devices import mesh
from jaxdict.dictionary.arrays import ENCODER_KINDS
from jaxdict.rows.normalization import Normalizer
from jaxdict.sae import dead_features, sharding
from jaxdict.sae.state import Batch, initial_state
from jaxdict.sae.step import make_train_step
from jaxdict.sae.step_config import AdamConfig, Execution, Hyperparams, ScheduleConfig, StepConfig

D, M, N, STEPS, D_OUT = 12, 256, 32, 20, 10
MESHES = {"one": None, "data": "data=8", "features": "features=8", "both": "data=2,features=4"}
FEW = ("topk", "batchtopk", "jumprelu", "matryoshka")
"""Kinds trained without `all`, which adds relu and a transcoder."""
DEAD = 70
"""Rows without firing that make a feature dead."""
RESAMPLED = 12
"""The step after which dead features are resampled."""


def meshes_of(case: str, *, thorough: bool) -> list[str]:
    """One device, and the meshes that a case is trained on: few, because compiling takes most of the time."""
    few = case != "topk" and not (thorough and case in ENCODER_KINDS)
    return ["one", "both"] if few else list(MESHES)


def step_config_of(kind: str) -> StepConfig:
    slots = 4 if kind == "topk" else 16
    return StepConfig(
        kind,
        k=4,
        slots=slots,
        k_aux=6,
        aux_form="residual",
        dead_rows=DEAD,
        ema=0.9,
        schedule=ScheduleConfig(40, 3, 0.2),
        adam=AdamConfig(0.9, 0.99, 1e-8, 1.0),
        prefixes=(4, 16, M) if kind == "matryoshka" else (),
        penalty="target" if kind == "jumprelu" else "",
        bandwidth=0.5 if kind == "jumprelu" else 0.0,
        ramp=5,
    )


def bits_of(seed: int, d: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    codes = rng.exponential(size=(STEPS, N, 20)) * (rng.random((STEPS, N, 20)) < 0.15)
    rows = (codes @ rng.normal(size=(20, d))).astype(np.float32)
    return (rows.view(np.uint32) >> 16).astype(np.uint16)


def normalizer_of(d: int) -> Normalizer:
    return Normalizer(jnp.zeros(d), jnp.ones(d), jnp.ones(d))


def gathered(text: str) -> int:
    """Elements of the largest result of an all-gather in a compiled program."""
    sizes = [0]
    for result in re.findall(r"= (.*?) all-gather(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[([\d,]*)\]", result):
            sizes.append(int(np.prod([int(size) for size in shape.split(",") if size])))
    return max(sizes)


def train(
    kind: str, split: str | None, *, members: int = 0, target: bool = False, resample: bool = False
) -> dict[str, Any]:
    """20 steps: the metrics of each, the last state, how often the step was compiled, what it gathered."""
    devices = None if split is None else mesh.make_mesh(split, batch=N, atoms=(M,))
    step_config = step_config_of(kind)._replace(execution=Execution(*mesh.axes(devices)))
    out_mean = jnp.zeros(D_OUT) if target else None
    states = [
        initial_state(
            jax.random.key(seed), M, mean=jnp.zeros(D), step_config=step_config, out_mean=out_mean
        )
        for seed in range(members or 1)
    ]
    rates = [1e-2 * (1 + seed) for seed in range(members or 1)]
    every = [Hyperparams(rate, 1 / 32, 0.05, 12.0) for rate in rates]
    state, hyperparams = states[0], Hyperparams(*(np.float32(value) for value in every[0]))
    if members:
        state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
        hyperparams = Hyperparams(
            *(np.asarray(values, np.float32) for values in zip(*every, strict=True))
        )
    state = sharding.place_state(state, devices, members=members)
    hyperparams = mesh.everywhere(jax.tree.map(jnp.asarray, hyperparams), devices)
    normalizers = [mesh.everywhere(normalizer_of(width), devices) for width in (D, D_OUT)]
    step = make_train_step(step_config, members=members, mesh=devices)
    numbers, since, before = [], [], step._cache_size()
    inputs: Any = None
    for at, (one, other) in enumerate(zip(bits_of(0, D), bits_of(1, D_OUT), strict=True), start=1):
        rows = [mesh.place_rows(bits, devices, 0, N) for bits in (one, other)]
        more = (rows[1], normalizers[1]) if target else ()
        inputs = Batch(rows[0], normalizers[0], *more)
        state, metrics = step(state, inputs, hyperparams)
        if resample and at == RESAMPLED:
            state = dead_features.resample(
                state, inputs, step_config, seeds=range(members or 1), step=at, devices=devices
            )
        numbers.append(np.array(jax.device_get(metrics)))
        since.append(np.array(state.since_fired))
    found: dict[str, Any] = {
        "numbers": np.stack(numbers),
        "since": np.stack(since),
        "compiled": step._cache_size() - before,
        "gathered": 0 if devices is None else gathered(_text(step, state, inputs, hyperparams)),
        "parts": [leaf.addressable_shards[0].data.shape for leaf in _with_atoms(state)],
        "wholes": [leaf.shape for leaf in _with_atoms(state)],
    }
    weights = jax.tree_util.tree_leaves_with_path(jax.device_get(state))
    return found | {f"state{jax.tree_util.keystr(path)}": leaf for path, leaf in weights}


def _text(step: Any, *arguments: Any) -> str:
    return step.lower(*arguments).compile().as_text()


def _with_atoms(state: Any) -> list[jax.Array]:
    """Matrices with one row for each atom: of the weights, their moments and their average."""
    assert state.ema is not None
    trees = (state.params, state.optimizer.mu, state.optimizer.nu, state.ema)
    return [leaf for tree in trees for leaf in (tree.encoder, tree.atoms)]


def whole_product() -> int:
    """`gathered` of a program that does gather [n, m]."""
    devices = mesh.make_mesh("features=8", batch=N, atoms=(M,))
    assert devices is not None

    def product(x: jax.Array, encoder: jax.Array) -> jax.Array:
        pre = jax.lax.all_gather(x @ encoder.T, "features", axis=1, tiled=True)
        return jax.lax.top_k(pre, 4)[0]

    specs = (PartitionSpec(), PartitionSpec("features"))
    mapped = jax.shard_map(
        product, mesh=devices, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
    )
    return gathered(_text(jax.jit(mapped), jnp.ones((N, D)), jnp.ones((M, D))))


def main(out: str, *every: str) -> None:
    assert jax.device_count() == 8
    results = {("product", "features"): {"gathered": whole_product()}}
    for kind in ENCODER_KINDS if every else FEW:
        for name in meshes_of(kind, thorough=bool(every)):
            results[kind, name] = train(kind, MESHES[name])
    for name in ("one", "both"):
        if every:
            results["transcoder", name] = train("batchtopk", MESHES[name], target=True)
        results["resampled", name] = train("jumprelu", MESHES[name], resample=True)
        results["members", name] = train("topk", MESHES[name], members=2, resample=True)
    np.savez(out, **{"/".join((*at, n)): v for at, one in results.items() for n, v in one.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
