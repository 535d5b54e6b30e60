"""The progress of a training: a bar, metrics.jsonl, TensorBoard or Weights & Biases.

It also checks that losses are finite. Nothing here changes a number of the training.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxdict.sae import Metrics, StepConfig, TrainSAEConfig, learning_rate_schedule
from jaxdict.training.sweep import Group, Member
from jaxdict.training.tracker import MemberLog


class Progress:
    """Takes the numbers of each step, and fetches, checks, writes and shows them now and then.

    Attributes:
        saved: optimizer step of the newest checkpoint, for messages; None without one.
        waited: seconds spent waiting for rows.
    """

    def __init__(
        self,
        config: TrainSAEConfig,
        groups: list[Group],
        *,
        first: int,
        saved: int | None,
        quiet: bool = False,
    ) -> None:
        """Open bar and logs.

        Args:
            config: settings of the whole run.
            groups: what is trained.
            first: optimizer steps that were taken before.
            saved: step of the newest checkpoint.
            quiet: write and show nothing.
        """
        self._config, self._groups, self._first = config, groups, first
        self._waiting: list[list[Metrics]] = []
        self._started = time.perf_counter()
        self._flushed = first
        self.waited = 0.0
        self.saved = saved
        members = [member for group in groups for member in group.members]
        self._logs = {} if quiet else {m.name: MemberLog(m, first) for m in members}
        title = f"{config.model.kind} {config.site}"
        self.bar = tqdm(
            total=members[0].resolved.optimizer_steps * config.data.batch,
            initial=first * config.data.batch,
            unit="row",
            unit_scale=True,
            desc=title if len(members) == 1 else f"{len(members)} members",
            disable=quiet,
        )

    def __enter__(self) -> Progress:
        """Use as a context manager: closes bar and logs."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar and all logs."""
        self.bar.close()
        for log in self._logs.values():
            log.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what is done inside as waiting for rows."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    @property
    def rate(self) -> float | None:
        """Rows a second so far, compilation and held-out measurements included."""
        seen = (self._flushed - self._first) * self._config.data.batch
        return round(seen / self.seconds, 1) if seen else None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return max(time.perf_counter() - self._started, 1e-9)

    def pace(self) -> dict[str, Any]:
        """Rows a second, and the share of the time spent waiting for rows."""
        return {
            "rows_per_second": self.rate,
            "waited_for_rows": round(self.waited / self.seconds, 4),
        }

    def write(self, lines: dict[str, dict[str, Any]]) -> None:
        """Write a line to the log of each member, by name."""
        for name, line in lines.items():
            if name in self._logs:
                self._logs[name].write(**line)

    def update(
        self,
        step: int,
        numbers: list[Metrics],
        *,
        flush: bool,
        last_good: Callable[[int | None], str],
    ) -> None:
        """Take the numbers of a step; every `log_every` steps fetch, check and write those that came in.

        Args:
            step: optimizer step.
            numbers: of each group.
            flush: do so at this step in any case.
            last_good: names the checkpoint of a step, for the message of a loss that is not finite.

        Raises:
            ValueError: a loss is not finite; names member, step and the last good checkpoint.
        """
        self._waiting.append(numbers)
        if not flush and step % self._config.run.log_every:
            return
        fetched = jax.device_get(self._waiting)
        self._waiting = []
        shown: list[Metrics] = []
        for place, group in enumerate(self._groups):
            # [steps, members] of each number
            table = Metrics(
                *(
                    np.asarray([one[place][i] for one in fetched]).reshape(len(fetched), -1)
                    for i in range(len(Metrics._fields))
                )
            )
            for column, member in enumerate(group.members):
                own = Metrics(*(values[:, column] for values in table))
                self._check(member, own, step, last_good)
                mean = Metrics(*(float(np.mean(values)) for values in own))
                mean = mean._replace(dead=float(np.asarray(own.dead)[-1]))
                if member.name in self._logs:
                    line = self._line(member, group.step_config, mean, step)
                    self._logs[member.name].write(**line)
                shown.append(mean)
        self.bar.update((step - self._flushed) * self._config.data.batch)
        self._flushed = step
        self.bar.set_postfix_str(_in_short(shown))

    def _check(
        self, member: Member, own: Metrics, step: int, last_good: Callable[[int | None], str]
    ) -> None:
        bad = np.flatnonzero(~(np.isfinite(own.loss) & np.isfinite(own.gradient)))
        if len(bad):
            at = int(bad[0])
            place = f" of {member.name}" if member.name else ""
            loss, gradient = np.asarray(own.loss)[at], np.asarray(own.gradient)[at]
            raise ValueError(
                f"expected a finite loss, got {float(loss)} (gradient norm {float(gradient)}){place} at step "
                f"{step - len(np.asarray(own.loss)) + 1 + at}; last good checkpoint: "
                f"{last_good(self.saved)}; start again with a lower --lr"
            )

    def _line(
        self, member: Member, step_config: StepConfig, mean: Metrics, step: int
    ) -> dict[str, Any]:
        return {
            "kind": "train",
            "step": step,
            "rows": step * member.config.data.batch,
            **mean._asdict(),
            "lr": member.resolved.lr
            * float(learning_rate_schedule(step_config.schedule)(step - 1)),
            "seconds": round(self.seconds, 3),
        }


def _in_short(shown: list[Metrics]) -> str:
    if len(shown) == 1:
        one = shown[0]
        return f"FVU {one.loss:.3f} L0 {one.l0:.1f} dead {one.dead:.1%}"
    losses = [float(one.loss) for one in shown]
    return f"FVU {min(losses):.3f} to {max(losses):.3f}"
