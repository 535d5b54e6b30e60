"""What a training shows while it runs: progress bar, metrics.jsonl, TensorBoard or Weights & Biases.

It also checks that losses are finite. Nothing here changes a number of the training.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxdict.sae import Metrics, TrainSAEConfig, schedule
from jaxdict.training.sweep import Group, Member
from jaxdict.training.tracker import MemberLog


class Watch:
    """Takes the numbers of each step, and fetches, checks, writes and shows them now and then."""

    def __init__(
        self,
        config: TrainSAEConfig,
        groups: list[Group],
        first: int,
        *,
        saved: int | None,
        quiet: bool = False,
    ) -> None:
        """Start at optimizer step `first`; `quiet` writes and shows nothing."""
        self._config, self._groups, self._first = config, groups, first
        self._waiting: list[list[Metrics]] = []
        self._started = time.perf_counter()
        self._flushed = first
        self.waited = 0.0
        self.saved = saved
        members = [member for group in groups for member in group.members]
        self.logs = {} if quiet else {m.name: MemberLog(m, first) for m in members}
        title = f"{config.kind} {config.site}" if len(members) == 1 else f"{len(members)} members"
        self.bar = tqdm(
            total=members[0].plan.steps * config.batch,
            initial=first * config.batch,
            unit="row",
            unit_scale=True,
            desc=title,
            disable=quiet,
        )

    def __enter__(self) -> Watch:
        """Use as a context manager: closes bar and logs."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the bar and all logs."""
        self.bar.close()
        for log in self.logs.values():
            log.close()

    @property
    def rate(self) -> float | None:
        """Rows a second so far, compilation and held-out measurements included."""
        seen = (self._flushed - self._first) * self._config.batch
        return round(seen / self.seconds, 1) if seen else None

    @property
    def seconds(self) -> float:
        """Since the start."""
        return max(time.perf_counter() - self._started, 1e-9)

    def see(
        self,
        step: int,
        numbers: list[Metrics],
        *,
        flush: bool,
        last_good: Callable[[int | None], str],
    ) -> None:
        """Take the numbers of a step, one `Metrics` a group; every `log_every` steps fetch, check and write them.

        Raises:
            ValueError: a loss is not finite; names member, step and the last good checkpoint.
        """
        self._waiting.append(numbers)
        if not flush and step % self._config.log_every:
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
                shown.append(self._write(member, own, step))
        self.bar.update((step - self._flushed) * self._config.batch)
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

    def _write(self, member: Member, own: Metrics, step: int) -> Metrics:
        mean = Metrics(*(float(np.mean(values)) for values in own))
        mean = mean._replace(dead=float(np.asarray(own.dead)[-1]))
        if member.name in self.logs:
            plan, config = member.plan, member.config
            step_config = self._recipe(member)
            self.logs[member.name].write(
                kind="train",
                step=step,
                rows=step * config.batch,
                **mean._asdict(),
                lr=plan.lr * float(schedule(step_config.rate)(step - 1)),
                seconds=round(self.seconds, 3),
            )
        return mean

    def _recipe(self, member: Member) -> Any:
        return next(group.step_config for group in self._groups if member in group.members)


def _in_short(shown: list[Metrics]) -> str:
    if len(shown) == 1:
        one = shown[0]
        return f"FVU {one.loss:.3f} L0 {one.l0:.1f} dead {one.dead:.1%}"
    losses = [float(one.loss) for one in shown]
    return f"FVU {min(losses):.3f} to {max(losses):.3f}"
