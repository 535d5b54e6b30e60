"""Train states on a mesh of devices, and a training step that runs there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdict.devices import DATA, FEATURES
from jaxdict.sae.state import TrainState


def specs(state: TrainState, mesh: Mesh, *, members: int = 0) -> Any:
    """How each array of a train state is partitioned: arrays with an axis of atoms along the mesh's features.

    Args:
        state: of one model, or of several on a first axis.
        mesh: the devices.
        members: how many are stacked on the first axis, 0 for none.
    """
    whole = PartitionSpec()
    if mesh.shape[FEATURES] == 1:
        return state.placed(whole, whole)
    lead = (None,) if members else ()
    return state.placed(PartitionSpec(*lead, FEATURES), whole)


def shardings(state: TrainState, mesh: Mesh, *, members: int = 0) -> Any:
    """`specs` as shardings of this mesh."""
    partition = specs(state, mesh, members=members)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition)


def sharded(step: Callable[..., Any], mesh: Mesh, *, members: int) -> Callable[..., Any]:
    """A step that runs on a mesh, each device on its share of the rows and atoms.

    Args:
        step: (state, batch, hyperparams, any_dead) -> (state, metrics), for one device's share, with the
            collectives that it needs.
        mesh: the devices.
        members: states stacked on a first axis, 0 for none.
    """
    whole = PartitionSpec()

    def run(state: Any, batch: Any, hyperparams: Any, any_dead: Any) -> Any:
        partition = specs(state, mesh, members=members)
        rows = jax.tree.map(lambda _: whole, batch)._replace(bits=PartitionSpec(DATA))
        if batch.target_bits is not None:
            rows = rows._replace(target_bits=PartitionSpec(DATA))
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(partition, rows, jax.tree.map(lambda _: whole, hyperparams), whole),
            out_specs=(partition, whole),
            check_vma=False,
        )
        return mapped(state, batch, hyperparams, any_dead)

    return run


def placing(state: TrainState, mesh: Mesh | None, *, members: int = 0) -> Any:
    """For each array of a state, what moves a NumPy array like it to its devices, partitioned as `specs` says.

    Args:
        state: of one model, or of several on a first axis; shapes suffice.
        mesh: the devices; None for the default one, which gets a copy that it owns and so may donate.
        members: how many are stacked on the first axis, 0 for none.
    """
    if mesh is None:
        return jax.tree.map(lambda _: jnp.array, state)

    def put(sharding: NamedSharding) -> Callable[[Any], jax.Array]:
        def to_devices(leaf: Any) -> jax.Array:
            values = np.asarray(leaf)
            return jax.make_array_from_callback(values.shape, sharding, lambda at: values[at])

        return to_devices

    return jax.tree.map(put, shardings(state, mesh, members=members))


def place_state(state: TrainState, mesh: Mesh | None, *, members: int = 0) -> TrainState:
    """A state moved to its devices, each array partitioned as `specs` says.

    Every process must hold the whole state, as it does at the start.
    """
    if mesh is None:
        return state
    puts = placing(state, mesh, members=members)
    return jax.tree.map(lambda put, leaf: put(leaf), puts, state)
