"""Many devices: rows of a batch split over the axis `data`, atoms over the axis `features`.

Each device encodes its rows with its atoms; only the k largest of each row travel along `features`,
and only gradients along `data`.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, FEATURES = "data", "features"


def read_mesh(text: str, devices: int) -> tuple[int, int]:
    """Devices along data and features that `--mesh` asks for.

    Args:
        text: "auto" (all devices along data), or such as "data=4,features=2", in which one left out is 1.
        devices: how many there are in all processes.

    Returns:
        The two sizes.

    Raises:
        ValueError: something else, or more devices than there are.
    """
    if text == "auto":
        return devices, 1
    sizes = {DATA: 1, FEATURES: 1}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"--mesh: expected auto or such as data=4,features=2, got {text!r}; correct it"
            )
        sizes[name] = int(size)
    asked = sizes[DATA] * sizes[FEATURES]
    if asked > devices:
        raise ValueError(
            f"--mesh: expected at most the {devices} devices there are, got {text!r} ({asked}); "
            "ask for fewer"
        )
    return sizes[DATA], sizes[FEATURES]


def make_mesh(text: str, *, batch: int, atoms: tuple[int, ...]) -> Mesh | None:
    """The mesh that `--mesh` asks for; None for one device, which needs none.

    Args:
        text: see `read_mesh`.
        batch: rows in a step, to be split evenly.
        atoms: sizes of the dictionaries, each to be split evenly.

    Raises:
        ValueError: rows or atoms cannot be split so.
    """
    data, features = read_mesh(text, jax.device_count())
    if data * features == 1 and jax.process_count() == 1:
        return None
    if batch % data:
        raise ValueError(
            f"--batch: expected a multiple of the mesh's {data} devices along data, got {batch}; "
            "change --batch or --mesh"
        )
    for m in atoms:
        if m % features:
            raise ValueError(
                f"--atoms: expected a multiple of the mesh's {features} devices along features, got {m}; "
                "change --atoms or --mesh"
            )
    devices = np.asarray(jax.devices()[: data * features]).reshape(data, features)
    joined = {device.process_index for device in devices.ravel()}
    if len(joined) < jax.process_count():
        raise ValueError(
            f"--mesh: expected devices of all {jax.process_count()} processes, got {text!r}, which needs "
            f"those of {len(joined)} only; ask for {jax.device_count()} devices, or start fewer processes"
        )
    return Mesh(devices, (DATA, FEATURES))


def axes(mesh: Mesh | None) -> tuple[str | None, str | None]:
    """Names of the axes that have more than one device: (data, features), None for the others."""
    if mesh is None:
        return None, None
    return tuple(name if mesh.shape[name] > 1 else None for name in (DATA, FEATURES))  # pyright: ignore


def own_indices(
    indices: jax.Array, size: int, axis: str | None, *, elsewhere: int | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Indices into an array that is split in order over the devices of an axis, on each of them.

    Args:
        indices: int32, into the whole array.
        size: length of this device's part.
        axis: name of the mesh axis; None for an array that is not split.
        elsewhere: what to put for the indices of other devices.

    Returns:
        local: int32, indices into this device's part.
        own: bool, whether an index is in this device's part.
    """
    if axis is None:
        return indices, jax.numpy.ones(indices.shape, bool)
    local = indices - jax.lax.axis_index(axis) * size
    own = (local >= 0) & (local < size)
    return jax.numpy.where(own, local, elsewhere), own


def place_rows(bits: np.ndarray, mesh: Mesh | None, first: int, rows: int) -> jax.Array:
    """A batch on its devices.

    Args:
        bits: uint16 [*, d], this process's rows of the batch, as `own_rows` says.
        mesh: the devices, None for one.
        first: number of the first of them in the batch.
        rows: of the whole batch.
    """
    if mesh is None:
        return jax.numpy.asarray(bits)
    sharding = NamedSharding(mesh, PartitionSpec(DATA))

    def part(at: Any) -> np.ndarray:
        low, high, _ = at[0].indices(rows)
        return bits[low - first : high - first]

    return jax.make_array_from_callback((rows, bits.shape[1]), sharding, part)


def own_rows(mesh: Mesh | None, rows: int) -> tuple[int, int]:
    """The range of a batch's rows that this process's devices hold."""
    if mesh is None:
        return 0, rows
    sharding = NamedSharding(mesh, PartitionSpec(DATA))
    places = sharding.addressable_devices_indices_map((rows,)).values()
    ranges = [place[0].indices(rows)[:2] for place in places if place is not None]
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def everywhere(value: Any, mesh: Mesh | None) -> Any:
    """Small arrays, alike in every process, on every device of the mesh."""
    if mesh is None:
        return value
    sharding = NamedSharding(mesh, PartitionSpec())

    def put(leaf: Any) -> jax.Array:
        values = np.asarray(leaf)
        return jax.make_array_from_callback(values.shape, sharding, lambda at: values[at])

    return jax.tree.map(put, value)
