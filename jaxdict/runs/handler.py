"""How Orbax writes and reads the state of a run: a safetensors file that holds arrays, facts and the hashes of both."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from harvest.tensors import TensorFile
from jaxdict.devices import whole
from jaxdict.runs.state_file import StateFile

ARRAYS = "arrays.safetensors"
REMEDY = "copy it again, or remove this checkpoint to use the one before it"
"""What to do about a checkpoint that is damaged."""
_FACTS = "facts"


class StateHandler(ocp.AsyncCheckpointHandler):
    """Orbax makes the folder before, and gives it its name when all that it was handed is on the disk."""

    async def async_save(self, directory: Any, args: SaveState) -> list[Future]:
        """Write what the next step writes over; the future waits for the rest."""
        if jax.process_index():
            for array in args.arrays.values():
                whole(array)
            return []
        file = StateFile(Path(directory) / ARRAYS, args.arrays, {_FACTS: json.dumps(args.facts)})
        behind = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        try:
            return [behind.submit(file.finish)]
        finally:
            behind.shutdown(wait=False)

    def save(self, directory: Any, args: SaveState) -> None:
        """Orbax wants it of every handler; a manager calls `async_save`."""
        raise NotImplementedError

    def restore(self, directory: Any, args: ReadState) -> SavedState:
        """Open a checkpoint, to be read one array at a time."""
        return SavedState(Path(directory) / ARRAYS, verify=args.verify)


@ocp.args.register_with_handler(StateHandler, for_save=True)
@dataclasses.dataclass
class SaveState(ocp.args.CheckpointArgs):
    """What is saved.

    Attributes:
        arrays: by name.
        facts: JSON-able.
    """

    arrays: Mapping[str, Any]
    facts: Mapping[str, Any]


@ocp.args.register_with_handler(StateHandler, for_restore=True)
@dataclasses.dataclass
class ReadState(ocp.args.CheckpointArgs):
    """How a checkpoint is read: `verify` says whether hashes are checked."""

    verify: bool = True


class SavedState:
    """A checkpoint on the disk.

    Attributes:
        facts: as they were saved.
    """

    def __init__(self, path: Path, *, verify: bool) -> None:
        """Read all but the arrays.

        Raises:
            FileNotFoundError: no such file.
            ValueError: it is damaged or cut.
        """
        if not path.is_file():
            raise FileNotFoundError(
                f"expected {path.name} in {path.parent}, found none: the checkpoint is not whole; {REMEDY}"
            )
        self._file = TensorFile(path, verify=verify, remedy=REMEDY)
        self.facts: dict[str, Any] = json.loads(self._file.metadata.get(_FACTS, "{}"))

    def form(self, name: str) -> tuple[Any, tuple[int, ...]] | None:
        """Dtype and shape of an array, None if there is none of this name."""
        return self._file.form(name) if name in self._file.names else None

    def read(self, name: str) -> Any:
        """An array; a ValueError if it is not what was written."""
        return self._file.read(name)
