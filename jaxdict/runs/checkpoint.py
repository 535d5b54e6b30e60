"""Orbax checkpoints of a run: the whole train state, atomic, hashed, the newest few and the best kept."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

FOLDER = "checkpoints"
VERSION = 2
"""Version 1 kept the arrays as Orbax's own, compressed, and the facts beside them, without hashes."""
_ITEM, _FIRST_ITEM = "saved", "facts"
"""Folders that show of which version a checkpoint is: of this one, and of version 1."""


def _worth_saying(record: logging.LogRecord) -> bool:
    """Whether a message of Orbax is news.

    It warns of each checkpoint without a score; most have none, since not every save is measured. What fails in its
    thread it shows with a traceback, and then raises it again, when the next save or the end is waited for.
    """
    said = record.getMessage()
    return "did not provide metrics" not in said and not record.exc_info


class Checkpoints:
    """Saves and restores one run's state; Orbax writes in the background and renames when done."""

    def __init__(self, run: Path, *, keep: int = 2, verify: bool = True) -> None:
        """Open the checkpoints of a run.

        Args:
            run: the run's folder.
            keep: newest checkpoints that stay, beside the one with the lowest score.
            verify: whether what is read has to have the hashes that were written beside it.
        """
        import orbax.checkpoint as ocp

        from jaxdict.runs import handler

        self._ocp, self._handler, self._verify = ocp, handler, verify
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
            preservation_policy=policy,
            best_fn=lambda numbers: -numbers["score"],
            create=True,
            # The handler writes before it returns, so its folder has to be there.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        logging.getLogger("absl").addFilter(_worth_saying)
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
        """Write a checkpoint; returns as soon as the arrays may be written over, the rest is done in the background.

        Args:
            step: optimizer step, the checkpoint's name.
            state: pytree of arrays; all processes have to come here with theirs.
            facts: JSON-able.
            score: held-out FVU of these weights, where it was measured.

        Raises:
            OSError: the disk is full, or cannot be written; perhaps of the save before.
        """
        arrays = dict(_named(state))
        saved = self._handler.SaveState(arrays, {"version": VERSION, **facts})
        self._manager.save(
            step,
            args=self._ocp.args.Composite(**{_ITEM: saved}),
            metrics=None if score is None else {"score": score},
            force=True,
        )

    def facts(self, step: int | None = None) -> dict[str, Any]:
        """The facts of a checkpoint alone (the newest by default), as they were given to `save`.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: there is no checkpoint, it is damaged, or a newer version wrote it.
        """
        step = self._known(step)
        return self._checked(step, self._open(step).facts)

    def restore(
        self, template: Any, step: int | None = None, *, place: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """Read a checkpoint, one array at a time.

        Args:
            template: a pytree of the same names, shapes and dtypes as the state, or as a part of it.
            step: which; the newest by default.
            place: a tree of the same structure, of functions that make of each NumPy array what is wanted of it,
                for instance an array on a device; None for the NumPy arrays themselves.

        Returns:
            The state, bit for bit, and the facts.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: there is no checkpoint, it is damaged or of another shape, or a newer version wrote it.
        """
        step = self._known(step)
        saved = self._open(step)
        facts = self._checked(step, saved.facts)
        puts = jax.tree.map(lambda _: np.asarray, template) if place is None else place
        leaves = []
        for (name, like), put in zip(_named(template), jax.tree.leaves(puts), strict=True):
            expected, found = (np.dtype(like.dtype), tuple(like.shape)), saved.form(name)
            if found != expected:
                raise ValueError(
                    f"{self.name(step)}: expected {name} of {_form(expected)}, got {_form(found)}; "
                    "name the run that the settings are of"
                )
            leaves.append(put(saved.read(name)))
        return jax.tree.unflatten(jax.tree.structure(template), leaves), facts

    def _open(self, step: int) -> Any:
        """A checkpoint, whose arrays are read when they are asked for."""
        args, folder = self._ocp.args, self.folder / str(step)
        if (folder / _FIRST_ITEM).is_dir():
            return _FirstVersion(self._manager, args, step, folder)
        if not (folder / _ITEM).is_dir():
            raise FileNotFoundError(
                f"expected {_ITEM} in {folder}, found none: the checkpoint is not whole; {self._handler.REMEDY}"
            )
        asked = args.Composite(**{_ITEM: self._handler.ReadState(verify=self._verify)})
        return self._manager.restore(step, args=asked)[_ITEM]

    def _known(self, step: int | None) -> int:
        """The step that is asked for, or that of the newest checkpoint."""
        step = self.latest if step is None else step
        if step is None:
            raise ValueError(
                f"expected a checkpoint in {self.folder}, found none; train the run first"
            )
        return step

    def _checked(self, step: int, facts: dict[str, Any]) -> dict[str, Any]:
        """The facts without the version, which must be this one or an older."""
        version = facts.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise ValueError(
                f"{self.name(step)}: expected version 1 to {VERSION}, got {version!r}; "
                "install a newer jaxdict"
            )
        return {name: value for name, value in facts.items() if name != "version"}

    def wait(self) -> None:
        """Wait until every save is on the disk."""
        self._manager.wait_until_finished()


class _FirstVersion:
    """A checkpoint of version 1, whose arrays Orbax reads all at once."""

    def __init__(self, manager: Any, args: Any, step: int, folder: Path) -> None:
        asked = args.Composite(facts=args.JsonRestore(), state=args.StandardRestore())
        try:
            found = manager.restore(step, args=asked)
        except (ValueError, KeyError, OSError) as error:
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{folder} is damaged: {said}; use another checkpoint") from error
        self.facts, self._arrays = found["facts"], dict(_named(found["state"]))

    def form(self, name: str) -> tuple[np.dtype, tuple[int, ...]] | None:
        array = self._arrays.get(name)
        return None if array is None else (np.dtype(array.dtype), tuple(array.shape))

    def read(self, name: str) -> np.ndarray:
        return self._arrays.pop(name)


def _form(form: tuple[np.dtype, tuple[int, ...]] | None) -> str:
    return "none" if form is None else f"{form[0]} {form[1]}"


def _named(state: Any) -> Iterator[tuple[str, Any]]:
    """Each array of a pytree with its name, such as params/encoder."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield jax.tree_util.keystr(path, simple=True, separator="/"), leaf
