"""Orbax checkpoints of a run: the whole train state, atomic, the newest few and the best kept."""

from __future__ import annotations

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

FOLDER = "checkpoints"
VERSION = 1


def _not_about_scores(record: logging.LogRecord) -> bool:
    """Orbax warns of each checkpoint without a score; most have none, since not every save is measured."""
    return "did not provide metrics" not in record.getMessage()


class Checkpoints:
    """Saves and restores one run's state; Orbax writes in the background and renames when done."""

    def __init__(self, run: Path, *, keep: int = 2) -> None:
        """Open the checkpoints of a run.

        Args:
            run: the run's folder.
            keep: newest checkpoints that stay, beside the one with the lowest score.
        """
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = (run / FOLDER).resolve()
        managers = ocp.checkpoint_managers
        newest = managers.LatestN(n=keep)
        # The best by score is the last in ascending order of its negative; those without a score come first.
        best = managers.BestN(
            get_metric_fn=lambda numbers: -numbers["score"],
            n=1,
            keep_checkpoints_without_metrics=False,
        )
        policy = managers.AnyPreservationPolicy([newest, best])
        # Without best_fn Orbax writes no score to the disk, and another process would know of none.
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, best_fn=lambda numbers: -numbers["score"], create=True
        )
        logging.getLogger("absl").addFilter(_not_about_scores)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        """Use as a context manager: waits for writes at the end."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the writes that are under way, then close."""
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """Optimizer step of the newest whole checkpoint, None when there is none."""
        return self._manager.latest_step()

    def name(self, step: int | None) -> str:
        """Where a checkpoint lies, for messages."""
        return "none yet" if step is None else str(self.folder / str(step))

    @property
    def best(self) -> int | None:
        """Optimizer step of the whole checkpoint with the lowest score, None when none has one."""
        scored = {
            step: numbers["score"]
            for step in self._manager.all_steps()
            if (numbers := self._manager.metrics(step))
        }
        return min(scored, key=lambda step: (scored[step], -step)) if scored else None

    def save(
        self, step: int, state: Any, facts: dict[str, Any], *, score: float | None = None
    ) -> None:
        """Write a checkpoint in the background.

        Args:
            step: optimizer step, the checkpoint's name.
            state: pytree of arrays. It is copied first, because the next step donates its buffers
                and on a CPU Orbax would otherwise write from memory that is being reused.
            facts: JSON-able.
            score: held-out FVU of these weights, where it was measured.
        """
        copied = jax.tree.map(lambda leaf: np.array(leaf, copy=True), state)
        args = self._ocp.args
        self._manager.save(
            step,
            args=args.Composite(
                state=args.StandardSave(copied),
                facts=args.JsonSave({"version": VERSION, **facts}),
            ),
            metrics=None if score is None else {"score": score},
            force=True,
        )

    def facts(self, step: int | None = None) -> dict[str, Any]:
        """The facts of a checkpoint alone (the newest by default), as they were given to `save`.

        Raises:
            ValueError: there is no checkpoint, or a newer version wrote it.
        """
        step = self._known(step)
        args = self._ocp.args
        restored = self._manager.restore(step, args=args.Composite(facts=args.JsonRestore()))
        return self._checked(step, restored["facts"])

    def restore(self, template: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint.

        Args:
            template: a pytree of the same structure, shapes and dtypes.
            step: which; the newest by default.

        Returns:
            The state as NumPy arrays, bit for bit, and the facts.

        Raises:
            ValueError: there is no checkpoint, or a newer version wrote it.
        """
        step = self._known(step)
        args = self._ocp.args
        blank = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), template)
        restored = self._manager.restore(
            step,
            args=args.Composite(state=args.StandardRestore(blank), facts=args.JsonRestore()),
        )
        return restored["state"], self._checked(step, restored["facts"])

    def _known(self, step: int | None) -> int:
        """The step that is asked for, or that of the newest checkpoint."""
        step = self.latest if step is None else step
        if step is None:
            raise ValueError(
                f"expected a checkpoint in {self.folder}, found none; train the run first"
            )
        return step

    def _checked(self, step: int, facts: dict[str, Any]) -> dict[str, Any]:
        """The facts without the version, which must be this one."""
        version = facts.get("version")
        if version != VERSION:
            raise ValueError(
                f"{self.name(step)}: expected version {VERSION}, got {version!r}; "
                "install a newer jaxdict"
            )
        return {name: value for name, value in facts.items() if name != "version"}

    def wait(self) -> None:
        """Wait until every save is on the disk."""
        self._manager.wait_until_finished()
