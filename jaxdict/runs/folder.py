"""A run's folder: config.json, metrics.jsonl, summary.json, and whether a run in it can be resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from harvest.atomic import SUFFIX, read_json, write_json, write_text
from harvest.store import as_it_was, expect_from, made_again, print_growth
from jaxdict.flags import flatten, from_flat, when_absent
from jaxdict.plots import MISSING

if TYPE_CHECKING:
    from harvest.store import Store
    from jaxdict.rows import Source

Config = TypeVar("Config")

CONFIG, METRICS, PLOT, SUMMARY = "config.json", "metrics.jsonl", "loss.png", "summary.json"
NORMALIZATION = "normalization.safetensors"
NORM_LIMITS = "norm_limits.json"
TARGET_NORMALIZATION = "target_normalization.safetensors"


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON-able values, in its groups if it has any."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=os.fspath))


def versions(*names: str) -> dict[str, str]:
    """Installed versions of distributions, those that are missing left out."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def describe(
    config: Any,
    source: Source,
    *,
    verb: str,
    kind: str,
    resolved: dict[str, Any],
    packages: tuple[str, ...],
) -> dict[str, Any]:
    """The content of config.json: settings, what they resolved to, the store, the versions.

    Args:
        config: settings, with `store` and `site`.
        source: the training rows.
        verb: what made the run, such as "train sae".
        kind: of the dictionary.
        resolved: the settings that the config leaves to the data.
        packages: distributions whose versions are kept.
    """
    store = source.store
    site = store.attrs.get("sites", {}).get(config.site)
    return {
        "format": "jaxdict-run",
        "version": 1,
        "verb": verb,
        "kind": kind,
        "config": plain(config),
        "resolved": resolved,
        "store": {
            "path": str(store.path.resolve() if isinstance(store.path, Path) else store.path),
            "fingerprint": store.fingerprint,
            "training images": len(source.images),
            "site shape": None if site is None else list(site),
        },
        "model": store.attrs.get("model"),
        "versions": versions(*packages),
    }


def as_begun(config: Config, *, resume: bool) -> Config:
    """The settings to go on with: those that the run in `out` does not have yet are as it was made.

    Args:
        config: settings, with `out`.
        resume: whether to go on with the run there.
    """
    out: Path = config.out  # pyright: ignore[reportAttributeAccessIssue]
    if not resume or not (out / CONFIG).is_file():
        return config
    known = flatten(read_json(out / CONFIG).get("config", {}))
    missing = {name: v for name, v in when_absent(type(config)).items() if name not in known}
    own = flatten(dataclasses.asdict(config))  # pyright: ignore[reportArgumentType]
    return from_flat(type(config), {**own, **missing}) if missing else config


def as_stored(store: Store, out: Path, *, resume: bool, quiet: bool = False) -> Store:
    """The store to train on: where the run in `out` goes on and the store has grown since, as it was then.

    Args:
        store: that is there now.
        out: folder of the run.
        resume: whether to go on with the run there.
        quiet: whether to leave out the line that says that the store has grown.

    Raises:
        ValueError: it is another store, or some of its rows are no longer those that the run began with.
    """
    known = read_json(out / CONFIG) if resume and (out / CONFIG).is_file() else {}
    fingerprint = known.get("store", {}).get("fingerprint")
    if fingerprint is None:
        return store
    held = expect_from(store, fingerprint, f"the run in {out}")
    again = made_again(store, held)
    if again:
        raise ValueError(
            f"cannot resume {out}: {store.path} has grown from {held.images} to {store.images} images, and the rows of "
            f"images {again.start} to {again.stop - 1} were made again with those added; name a --store harvested "
            f"as before (--images {held.images}), or begin a new run with another --out"
        )
    if not quiet:
        print_growth(store, held, f"the run in {out}")
    return as_it_was(store, held)


def open_run(
    out: Path,
    description: dict[str, Any],
    *,
    resume: bool,
    may_differ: Collection[str] = (),
    absent: Mapping[str, Any] | None = None,
) -> bool:
    """Make a run's folder, or check that the run in it can be resumed.

    Args:
        out: the folder.
        description: what config.json holds; `config` and `store` are compared.
        resume: whether to go on with the run in it.
        may_differ: settings that are not compared, see `jaxdict.flags.resumable`.
        absent: settings that the run in it may lack, see `jaxdict.flags.when_absent`.

    Returns:
        True when the folder already held this run.

    Raises:
        FileExistsError: the folder holds something and `resume` is off.
        ValueError: it holds another run; the message names a setting and both values.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"expected --out to be a folder, got the file {out}; name another")
    # Killed while it wrote its very first file, a run has left only that one's temporary name.
    if out.is_dir() and any(path.name != f".{CONFIG}{SUFFIX}" for path in out.iterdir()):
        if not resume:
            raise FileExistsError(
                f"expected --out to be new or empty, but {out} holds something; "
                "name another folder, or add --resume to go on with the run in it"
            )
        if not (out / CONFIG).is_file():
            raise ValueError(
                f"expected a run in {out}, found no {CONFIG}; name the run's own folder"
            )
        found = read_json(out / CONFIG)
        known = {"config": {**(absent or {}), **flatten(found.get("config", {}))}}
        _check_same({**found, **known}, description, out, may_differ)
        return True
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, description, hashed=True)
    return False


def _check_same(
    old: dict[str, Any], new: dict[str, Any], out: Path, may_differ: Collection[str]
) -> None:
    """ValueError at the first setting in which two descriptions differ."""
    pairs: list[tuple[str, str, Any, Any]] = [("run", "verb", old.get("verb"), new.get("verb"))]
    for part in ("config", "store"):
        before, after = flatten(old.get(part, {})), flatten(new.get(part, {}))
        pairs += [(part, key, before.get(key), after.get(key)) for key in {**before, **after}]
    for part, key, before, after in pairs:
        free = key in may_differ if part == "config" else (part, key) == ("store", "path")
        if free or before == after:
            continue
        where = f"--{key.replace('_', '-')}" if part == "config" else f"{part} {key}"
        raise ValueError(
            f"cannot resume {out}: expected {where} = {before!r} as in its {CONFIG}, got "
            f"{after!r}; use the same value, or another --out"
        )


class Log:
    """metrics.jsonl: one JSON object a line, appended and flushed."""

    def __init__(self, path: Path, *, step: int) -> None:
        """Open the log and drop lines of steps after `step`, which a resumed run writes again."""
        kept = [line for line in read_lines(path) if line["step"] <= step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, **line: Any) -> None:
        """Append a line."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics.jsonl; a last line cut by a kill is left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                lines.append(json.loads(text))
    return lines


def print_result(
    held: dict[str, Any] | None, plotted: Path | None, *, dead_share: float | None = None
) -> None:
    """Print how well a run rebuilds held-out rows, and what is missing.

    Args:
        held: held-out numbers (see `jaxdict.metrics.fidelity.Measurement.summary`), None without such rows.
        plotted: the run's plot, None where matplotlib is missing.
        dead_share: share of dead features to name in place of the held-out rows' own.
    """
    if held is None:
        print("no held-out numbers: the store has no validation images")
    else:
        dead = held["dead_share"] if dead_share is None else dead_share
        print(
            f"held-out ({held['rows']:,} rows): FVU {held['fvu']:.4f} raw, "
            f"{held['fvu_normalized']:.4f} normalized; VE {held['ve']:.4f}; L0 {held['l0']:.2f}; "
            f"dead {dead:.1%}"
        )
    if plotted is None:
        print(f"no loss.png: {MISSING}")


def read_run(run: Path, *, verify: bool = True) -> dict[str, Any]:
    """config.json of a run.

    Args:
        run: its folder.
        verify: whether it has to have the hash that was written into it.

    Raises:
        FileNotFoundError: no run there.
        ValueError: something else is there.
    """
    if not (run / CONFIG).is_file():
        raise FileNotFoundError(
            f"expected a run (a folder with {CONFIG}) at {run}, found none; "
            "name the --out of `jaxdict train sae` or `jaxdict train itda`"
        )
    description = read_json(run / CONFIG, verify=verify)
    if "config" not in description or "store" not in description:
        raise ValueError(
            f"{run / CONFIG}: expected a run's config and store, got {sorted(description)}; "
            "name the --out of `jaxdict train sae` or `jaxdict train itda`"
        )
    return description
