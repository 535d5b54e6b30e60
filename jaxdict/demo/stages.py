"""Verbs as stages: each runs once, as the command line does it, and leaves a record of its summary."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

from harvest.atomic import read_json, write_json
from jaxdict import cli


class Stages:
    """Runs verbs one after the other; one that finished with the same command is not run again.

    Attributes:
        seconds: how long each stage took, when it ran.
    """

    def __init__(self, records: Path, *, count: int) -> None:
        """Start before the first stage.

        Args:
            records: folder of what finished stages gave, one JSON file each.
            count: how many stages there will be.
        """
        self.seconds: dict[str, float] = {}
        self._records = records
        self._count = count

    def run(
        self, name: str, title: str, verb: str, *positional: object, **flags: object
    ) -> dict[str, Any]:
        """Run a verb as the command line does.

        Args:
            name: of the stage.
            title: what it does, in words.
            verb: the verb, such as "train sae".
            positional: its arguments.
            flags: its flags, with underscores; a tuple for several values.

        Returns:
            The verb's summary.
        """
        command = _command(verb, *positional, **flags)
        print(f"\n[{len(self.seconds) + 1}/{self._count}] {title}")
        print(f"      jaxdict {shlex.join(command)}", flush=True)
        record = self._records / f"{name}.json"
        if record.is_file():
            kept = read_json(record)
            if kept["command"] == command:
                print("      finished before; kept")
                self.seconds[name] = kept["seconds"]
                return kept["summary"]
        started = time.perf_counter()
        summary = cli.call(_resumable(command))
        self.seconds[name] = round(time.perf_counter() - started, 1)
        record.parent.mkdir(exist_ok=True)
        write_json(record, {"command": command, "seconds": self.seconds[name], "summary": summary})
        return read_json(record)["summary"]


def _command(verb: str, *positional: object, **flags: object) -> list[str]:
    words = [*verb.split(), *map(str, positional)]
    for name, value in flags.items():
        values = value if isinstance(value, tuple) else (value,)
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return words


def _resumable(command: list[str]) -> list[str]:
    """The command, with --resume where an earlier training was cut off."""
    if command[0] != "train":
        return command
    run = Path(command[command.index("--out") + 1])
    return [*command, "--resume"] if run.is_dir() and any(run.iterdir()) else command
