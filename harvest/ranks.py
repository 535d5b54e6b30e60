"""Several processes that fill one store: their numbers, and waiting for one another."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed

_PATIENCE = timedelta(days=30)
"""How long a rank waits for the others: they may have days of work left."""


@dataclass(frozen=True)
class Ranks:
    """One process among those that `torchrun` or `accelerate launch` started, or the only one.

    Attributes:
        rank: number of this process, from 0.
        world: number of processes.
        local: number of this process on its machine, which is also that of its GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    def wait(self) -> None:
        """Wait until every process has called this."""
        if self.world > 1:
            distributed.barrier()

    def lead(self, work: Callable[[], None]) -> None:
        """Run something on rank 0 while the others wait; an error of it is raised in all of them.

        Raises:
            ValueError: it raised an error, on another rank.
        """
        told: list[str | None] = [None]
        try:
            if self.rank == 0:
                work()
        except Exception as error:
            told = [str(error) or type(error).__name__]
            raise
        finally:
            if self.world > 1:
                distributed.broadcast_object_list(told)
        if told[0] is not None:
            raise ValueError(told[0])

    def device(self, asked: str) -> str:
        """The device of this process: its own GPU, where `asked` leaves it open."""
        if self.world > 1 and asked in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{self.local % torch.cuda.device_count()}"
        return asked


@contextmanager
def joined_ranks() -> Iterator[Ranks]:
    """Join the processes that were started together, for as long as the block runs.

    Gloo does the waiting, on the CPU; no activations pass between processes.

    Raises:
        ValueError: the launcher's environment is incomplete.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world < 2:
        yield Ranks()
        return
    try:
        rank = int(os.environ["RANK"])
        local = int(os.environ.get("LOCAL_RANK", rank))
        distributed.init_process_group("gloo", timeout=_PATIENCE)
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"expected RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT of a launcher, got: {error}; "
            "start it by `torchrun --nproc-per-node N -m jaxdict harvest ...`"
        ) from error
    try:
        yield Ranks(rank, world, local)
    finally:
        distributed.destroy_process_group()
