"""The one front door: `jaxdict VERB`, each verb a config dataclass and a function, imported only when it is called."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import os
import select
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxdict.devices import huge_pages
from jaxdict.flags import flatten, from_flat


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb of the command line: where its settings and its function live, and what it does."""

    config: str
    function: str
    summary: str
    extra: str = ""
    """Extras of the distribution whose packages it needs, with commas between them."""
    huge_pages: bool = False
    """Whether it gains from memory in huge pages, for which the process starts anew."""


VERBS: dict[str, Verb] = {
    "demo": Verb(
        "jaxdict.demo.config:DemoConfig",
        "jaxdict.demo.demo:demo",
        "the whole journey on the embedded model, in minutes",
        extra="flux,interp",
    ),
    "harvest": Verb(
        "harvest.config:HarvestConfig",
        "harvest.run:harvest",
        "prompts through a FLUX model -> activation store",
        extra="flux",
    ),
    "inspect": Verb(
        "jaxdict.inspect.config:InspectConfig",
        "jaxdict.inspect.inspect:inspect",
        "what a store, a run or a dictionary holds",
        extra="interp",
    ),
    "train sae": Verb(
        "jaxdict.sae.config:TrainSAEConfig",
        "jaxdict.training.train:train_sae",
        "store -> sparse autoencoder",
        huge_pages=True,
    ),
    "train itda": Verb(
        "jaxdict.itda.config:TrainITDAConfig",
        "jaxdict.itda.train:train_itda",
        "store -> dictionary of real activations (ITDA)",
        huge_pages=True,
    ),
    "export": Verb(
        "jaxdict.export.config:ExportConfig",
        "jaxdict.export.export:export",
        "run -> dictionary that acts on raw activations",
    ),
    "prune": Verb(
        "jaxdict.export.config:PruneConfig",
        "jaxdict.export.prune:prune",
        "dictionary -> a smaller one, and what that costs",
    ),
    "eval": Verb(
        "jaxdict.evaluate.config:EvalConfig",
        "jaxdict.evaluate.evaluate:evaluate",
        "dictionary + store -> how much is explained",
    ),
    "compare": Verb(
        "jaxdict.compare.config:CompareConfig",
        "jaxdict.compare.compare:compare",
        "ITDA dictionaries -> which layers and models are alike",
    ),
    "steer": Verb(
        "steer.config:SteerConfig",
        "steer.generate:steer",
        "one picture with a feature added, set, scaled or ablated",
        extra="flux",
    ),
    "steer-eval": Verb(
        "steer.config:SteerEvalConfig",
        "steer.evaluate:evaluate_steering",
        "how often steering works, by pixels, beside a random direction",
        extra="flux",
    ),
    "interp index": Verb(
        "interp.config:IndexConfig",
        "interp.index.build:build_index",
        "dictionary + store -> what makes each feature fire",
        extra="interp",
    ),
    "interp report": Verb(
        "interp.config:ReportConfig",
        "interp.report.report:write_report",
        "feature index -> pages to browse",
        extra="interp",
    ),
}

_OWN = ("harvest", "jaxdict", "steer", "interp")
_USER_ERRORS = (ValueError, OSError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb and exits.

    0 when done, 2 with one clear line on a user's error, 130 when interrupted, and without a word 141 when
    nobody reads its output any more, as with `| head`.
    """
    try:
        try:
            _run(arguments)
        except SystemExit:
            sys.stdout.flush()  # now, while an error can still be handled here
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        unread = _unread()
        if not unread:
            raise
        for stream in unread:  # what is left in them goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        raise SystemExit(128 + 13) from None  # as of a process that SIGPIPE ended


def _run(arguments: Sequence[str] | None) -> None:
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if debug:
        logging.basicConfig(format="%(name)s: %(message)s")
    name = _verb_in(words)
    if arguments is None and name and VERBS[name].huge_pages and "--help" not in words:
        huge_pages.ask()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            call(words)
    except KeyboardInterrupt:
        _fail("interrupted; what was finished is kept", 130)
    except ModuleNotFoundError as error:
        package, extra = error.name or "", VERBS[name].extra if name else ""
        if debug or not extra or package.split(".")[0] in ("", *_OWN):
            raise
        _fail(f"this needs the package {package}; run: pip install 'jaxdict[{extra}]'", 2)
    except _USER_ERRORS as error:
        if debug or (isinstance(error, BrokenPipeError) and _unread()):
            raise
        _fail(" ".join(str(error).split()) or type(error).__name__, 2)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any
) -> None:
    """Prints a warning: one that our own code gives as a note, any other as Python does."""
    packages = [Path(__file__).parents[1] / name for name in _OWN]
    own = any(Path(filename).is_relative_to(package) for package in packages)
    whole = warnings.formatwarning(message, category, filename, lineno)
    print(f"note: {message}" if own else whole, file=sys.stderr)


def call(words: Sequence[str]) -> Any:
    """Runs the verb that `words` begin with, as the command line does, and returns what its function returns.

    Args:
        words: for instance ["train", "sae", "--store", "runs/store", ...].

    Raises:
        ValueError: there is no such verb, or a setting is wrong.
        SystemExit: help was asked for, or the flags could not be read.
    """
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return None
    if words[0] in ("--version", "-V"):
        from jaxdict import __version__

        print(f"jaxdict {__version__}")
        return None
    name = _verb_in(words)
    if name is None:
        inner = [verb for verb in VERBS if verb.split()[0] == words[0]]
        if inner and (len(words) == 1 or words[1] in ("-h", "--help")):
            print(overview(inner))
            return None
        typed = " ".join(words[: 2 if inner else 1])
        raise ValueError(
            f"expected one of {', '.join(inner or VERBS)}, got {typed!r}; see jaxdict --help"
        )
    verb = VERBS[name]
    config = _parse(name, verb, list(words[name.count(" ") + 1 :]))
    try:
        return _load(verb.function)(config)
    except (MemoryError, OverflowError, RuntimeError) as error:
        if not _too_large(error):
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{said}; expected sizes that fit into memory, got {_largest(config)}; "
            "lower the size that is too large"
        ) from error


def _too_large(error: BaseException) -> bool:
    """Whether memory did not suffice for a size that was asked for: what NumPy, JAX and torch raise then."""
    text = str(error).lower()
    words = (
        "resource_exhausted",
        "out of memory",
        "allocate memory",
        "not enough memory",
        "overflow",
    )
    return isinstance(error, MemoryError | OverflowError) or any(word in text for word in words)


def _largest(config: Any) -> str:
    """The largest numbers among the settings, each as its flag."""
    sizes = {}
    for name, value in flatten(dataclasses.asdict(config)).items():
        values = value if isinstance(value, tuple) else (value,)
        numbers = [one for one in values if isinstance(one, int) and not isinstance(one, bool)]
        if numbers and name != "seed":
            sizes["--" + name.replace("_", "-")] = max(numbers)
    most = sorted(sizes, key=lambda flag: -sizes[flag])[:3]
    return ", ".join(f"{flag} {sizes[flag]}" for flag in most)


def _verb_in(words: Sequence[str]) -> str | None:
    """The verb that `words` begin with."""
    return next(
        (verb for verb in VERBS if list(words[: verb.count(" ") + 1]) == verb.split()), None
    )


def overview(names: Sequence[str] | None = None) -> str:
    """The help text that lists the verbs."""
    chosen = names or list(VERBS)
    width = max(len(name) for name in chosen)
    lines = [f"  {name:<{width}}  {VERBS[name].summary}" for name in chosen]
    return "\n".join(
        [
            "Dictionary learning on the FLUX.1 text-to-image transformer.",
            "",
            "usage: jaxdict VERB [flags]        (jaxdict VERB --help: its flags and an example)",
            "",
            *lines,
            "",
            "  --debug with any verb shows the traceback of an error and what libraries log; --version the version.",
            "",
            "Start here: jaxdict demo",
        ]
    )


def _parse(name: str, verb: Verb, flags: list[str]) -> Any:
    import tyro

    config = _load(verb.config)
    text = inspect.cleandoc(config.__doc__ or "")
    example = getattr(config, "EXAMPLE", "")
    if example:
        text += f"\n\nExample:\n  {example}"
    # tyro would show what __post_init__ raises in a box of its own: parse first, check after.
    unchecked = dataclasses.make_dataclass(
        config.__name__, [], bases=(config,), frozen=True, namespace={"__post_init__": _no_check}
    )
    default = _preset(config, unchecked, flags)
    parsed: Any = tyro.cli(
        unchecked,
        prog=f"jaxdict {name}",
        description=text,
        args=flags,
        default=default,
        config=(tyro.conf.OmitArgPrefixes,),  # a setting's flag is its own name, whatever its group
    )
    return config(
        **{field.name: getattr(parsed, field.name) for field in dataclasses.fields(config)}
    )


def _preset(config: Any, unchecked: Any, flags: list[str]) -> Any:
    """The defaults that --preset asks for, so that flags and --help go from there; None without it."""
    import tyro

    presets = getattr(importlib.import_module(config.__module__), "PRESETS", {})
    words = [word.partition("=") for word in flags]
    named = [value for word, _, value in words if word == "--preset" and value]
    named += [
        flags[i + 1]
        for i, (word, equals, _) in enumerate(words[:-1])
        if word == "--preset" and not equals
    ]
    chosen = presets.get(named[-1]) if named else None
    if not chosen:
        return None
    fields = dataclasses.fields(config)
    missing = {f.name: tyro.MISSING for f in fields if f.default is dataclasses.MISSING}
    return from_flat(unchecked, {**missing, **chosen, "preset": named[-1]})


def _no_check(self: Any) -> None:
    """Takes the place of a config's own checks while flags are read."""


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _unread() -> list[Any]:
    """Which of stdout and stderr are pipes that nobody reads any more."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        try:
            poll = select.poll()
            poll.register(stream.fileno(), select.POLLOUT)
        except (AttributeError, OSError):  # a system without poll, or no stream of the system's
            continue
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            found.append(stream)
    return found


def _fail(line: str, status: int) -> None:
    print(f"jaxdict: {line}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
