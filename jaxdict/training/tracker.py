"""Where the numbers of a training are written: metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxdict.runs import METRICS, Log, plain
from jaxdict.training.sweep import Member


class Tracker:
    """Sends numbers to TensorBoard or Weights & Biases as well; to nothing by default."""

    def __init__(self, kind: str, out: Path, config: dict[str, Any], step: int) -> None:
        """Open it; numbers that it holds of later steps than `step` are dropped."""
        self._write: Callable[[dict[str, float], int], None] | None = None
        self._close: Callable[[], None] | None = None
        if kind == "tensorboard":
            self._tensorboard(out, step)
        elif kind == "wandb":
            self._wandb(out, config)

    @staticmethod
    def check(kind: str) -> None:
        """ValueError where the package that a tracker needs is not installed."""
        package = {"tensorboard": "tensorboardX", "wandb": "wandb"}.get(kind)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"--tracker {kind}: expected the package {package}, found none; "
                f"run: pip install {package}"
            )

    def _tensorboard(self, out: Path, step: int) -> None:
        from tensorboardX import SummaryWriter

        writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

        def write(numbers: dict[str, float], step: int) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)

        self._write, self._close = write, writer.close

    def _wandb(self, out: Path, config: dict[str, Any]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        run = wandb.init(project="jaxdict", dir=str(out), name=out.name, config=config)
        self._write = lambda numbers, step: run.log(numbers, step=step)
        self._close = run.finish

    def write(self, line: dict[str, Any]) -> None:
        """Send the plain numbers of a line of metrics.jsonl."""
        if self._write is None:
            return
        skipped = ("kind", "step")
        numbers = {
            f"{line['kind']}/{name}": float(value)
            for name, value in line.items()
            if name not in skipped and isinstance(value, int | float)
        }
        self._write(numbers, line["step"])

    def close(self) -> None:
        """Close it."""
        if self._close is not None:
            self._close()


class MemberLog:
    """metrics.jsonl of one member, and its tracker."""

    def __init__(self, member: Member, step: int) -> None:
        """Open both; lines after `step` are written again."""
        config = member.config
        self._log = Log(config.out / METRICS, step=step)
        try:
            self._tracker = Tracker(config.run.tracker, config.out, plain(config), step)
        except BaseException:
            self._log.close()
            raise

    def write(self, **line: Any) -> None:
        """Append a line."""
        self._log.write(**line)
        self._tracker.write(line)

    def close(self) -> None:
        """Close both."""
        self._log.close()
        self._tracker.close()
