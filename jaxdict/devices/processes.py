"""The processes of a run, on one machine or many: who writes, what all agree on, what is gathered.

With a single process, the usual case, every method does what is asked for and waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np


class Processes:
    """All processes of a run; each has one such object, and calls its methods in the same order as the others."""

    @classmethod
    def join(cls, coordinator: str, *, count: int, number: int) -> Processes:
        """Join the other processes of a run through `jax.distributed`.

        Args:
            coordinator: address and port of process 0; "auto" finds it from Slurm, MPI or a cloud; empty for
                a single process.
            count: how many there are; 0 with "auto".
            number: of this one; -1 with "auto".
        """
        if coordinator and not jax.distributed.is_initialized():
            # What processes on CPUs speak with each other; the default of current versions of JAX, not of all.
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            if coordinator == "auto":
                jax.distributed.initialize()
            else:
                jax.distributed.initialize(coordinator, count, number)
        return cls()

    @property
    def several(self) -> bool:
        """Whether there is more than one."""
        return jax.process_count() > 1

    @property
    def chief(self) -> bool:
        """Whether this is process 0, which alone writes files and prints."""
        return jax.process_index() == 0

    def agree(self, flag: bool, *, ask: bool = True) -> bool:
        """Whether any process raised its flag.

        Args:
            flag: of this process.
            ask: whether the others are asked now; if not, the answer of several processes is no.
        """
        if not self.several:
            return flag
        if not ask:
            return False
        from jax.experimental import multihost_utils

        return bool(multihost_utils.process_allgather(np.asarray(flag)).any())

    def from_chief(self, act: Callable[[], bool], *, refusal: str) -> bool:
        """What `act` returns in process 0, which alone calls it.

        Args:
            act: what process 0 does.
            refusal: what the other processes say when it raised a ValueError or an OSError.

        Raises:
            ValueError: process 0 refused, as its own error says.
        """
        if not self.several:
            return act()
        from jax.experimental import multihost_utils

        answer, error = 0, None
        if self.chief:
            try:
                answer = int(act())
            except (ValueError, OSError) as raised:
                answer, error = 2, raised
        # The others must hear of it too, or they would wait for ever.
        answer = int(multihost_utils.broadcast_one_to_all(np.asarray(answer)))
        if error is not None:
            raise error
        if answer == 2:
            raise ValueError(refusal)
        return bool(answer)

    def barrier(self, name: str) -> None:
        """Wait until all processes are here."""
        if self.several:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)

    def gathered(self, state: Any) -> Any:
        """A state whose arrays this process can read: of several processes gathered, as NumPy arrays."""
        return jax.tree.map(lambda leaf: np.array(whole(leaf)), state) if self.several else state


def whole(array: Any) -> np.ndarray:
    """An array as NumPy sees it, gathered if it lies in several processes, which all have to ask for it then."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
