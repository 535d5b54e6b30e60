"""Where each array of a train state lies on a mesh, and a step that runs there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdict.devices import DATA, FEATURES

_SPLIT = ("encoder", "encoder_bias", "atoms", "since_fired")


def specs(state: Any, mesh: Mesh, *, members: int = 0) -> Any:
    """Where each array of a train state lies: what has an axis of atoms is split along features."""
    lead = (None,) if members else ()
    many = mesh.shape[FEATURES] > 1

    def one(path: tuple, leaf: Any) -> PartitionSpec:
        names = [getattr(key, "name", "") for key in path]
        split = names[-1] in _SPLIT or (names[-1] == "threshold" and len(names) > 1)
        return PartitionSpec(*lead, FEATURES) if split and many else PartitionSpec()

    return jax.tree_util.tree_map_with_path(one, state)


def shardings(state: Any, mesh: Mesh, *, members: int = 0) -> Any:
    """The same as `specs`, as shardings of this mesh."""
    places = specs(state, mesh, members=members)
    return jax.tree.map(lambda place: NamedSharding(mesh, place), places)


def sharded(step: Callable[..., Any], mesh: Mesh, *, members: int) -> Callable[..., Any]:
    """The same step with each device at its own rows and atoms; its collectives are its own.

    Args:
        step: (state, batch, hyperparams, revive) -> (state, metrics), for one device's share.
        mesh: the devices.
        members: states stacked on a first axis, 0 for none.
    """
    whole = PartitionSpec()

    def run(state: Any, batch: Any, hyperparams: Any, revive: Any) -> Any:
        places = specs(state, mesh, members=members)
        rows = jax.tree.map(lambda _: whole, batch)._replace(bits=PartitionSpec(DATA))
        if batch.target_bits is not None:
            rows = rows._replace(target_bits=PartitionSpec(DATA))
        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(places, rows, jax.tree.map(lambda _: whole, hyperparams), whole),
            out_specs=(places, whole),
            check_vma=False,
        )
        return mapped(state, batch, hyperparams, revive)

    return run


def place_state(state: Any, mesh: Mesh | None, *, members: int = 0) -> Any:
    """A state on its devices: each array where `specs` says.

    Every process must hold the whole state on its own, as after the same start or a restore.
    """
    if mesh is None:
        return state
    places = shardings(state, mesh, members=members)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda at: values[at])

    return jax.tree.map(put, state, places)
