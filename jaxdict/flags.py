"""What several verbs' settings have in common. Imports neither torch nor jax, so that `--help` is quick."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Self, TypeVar

NORMALIZATIONS = ("none", "rms", "standardize", "whiten")
"""Fixed maps before a dictionary, by name; see `jaxdict.rows.fit`."""

Config = TypeVar("Config")


FREE_ON_RESUME = {"resume": True, "sweep": False}
"""Metadata of a setting that changes no number of the result: a resumed run may have another value."""
MAY_GROW = {"grow": True, "sweep": False}
"""Metadata of a setting that a resumed run may have more of."""
ABSENT = "absent"
"""Key in the metadata of a setting that came late: the value that runs without the setting were made with."""
NOT_SWEPT = {"sweep": False}
"""Metadata of a setting that all members of a sweep share; without either a sweep may try several values."""


def settings_of(kind: type) -> dict[str, dataclasses.Field]:
    """All settings of a config class by name, those in its groups too."""
    found: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(kind):
        group = dataclasses.is_dataclass(field.default)
        found |= settings_of(type(field.default)) if group else {field.name: field}
    return found


def resumable(kind: type) -> set[str]:
    """Names of the settings in which a resumed run may differ."""
    return {name for name, field in settings_of(kind).items() if field.metadata.get("resume")}


def when_absent(kind: type) -> dict[str, Any]:
    """The settings that came late, by name, with the values that runs without them were made with."""
    fields = settings_of(kind).items()
    return {name: field.metadata[ABSENT] for name, field in fields if ABSENT in field.metadata}


def growing(kind: type) -> set[str]:
    """Names of the settings of which a resumed run may have more."""
    return {name for name, field in settings_of(kind).items() if field.metadata.get("grow")}


def sweepable(kind: type) -> set[str]:
    """Names of the settings in which the members of a sweep may differ."""
    return {name for name, field in settings_of(kind).items() if field.metadata.get("sweep", True)}


def flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, from a dict of them that may have groups, such as the one in config.json."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flatten(value) if isinstance(value, Mapping) else {name: value}
    return found


def from_flat(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """A config with groups, from settings by name; those left out have their defaults.

    Raises:
        TypeError: there is no setting of such a name.
    """
    unknown = settings.keys() - settings_of(kind).keys()
    if unknown:
        names = ", ".join(sorted(unknown))
        raise TypeError(f"expected settings of {kind.__name__}, got {names}; correct the name")
    chosen: dict[str, Any] = {}
    for field in dataclasses.fields(kind):  # pyright: ignore[reportArgumentType]
        if dataclasses.is_dataclass(field.default) and not isinstance(field.default, type):
            inside = settings.keys() & settings_of(type(field.default)).keys()
            own = {name: settings[name] for name in inside}
            chosen[field.name] = dataclasses.replace(field.default, **own)
        elif field.name in settings:
            chosen[field.name] = settings[field.name]
    return kind(**chosen)


class Grouped:
    """A config whose settings lie in groups, and are named in Python as their flags are, without them."""

    @classmethod
    def of(cls, **settings: Any) -> Self:
        """A config from settings named as their flags are, whichever group they are in.

        >>> TrainSAEConfig.of(store=Path("runs/store"), site="double.2.img", out=Path("runs/sae"), k=16)

        Raises:
            TypeError: there is no setting of such a name.
            ValueError: a setting is wrong.
        """
        return from_flat(cls, settings)

    def replace(self, **settings: Any) -> Self:
        """The same config with other settings, named as in `of`."""
        return from_flat(type(self), {**self.flat(), **settings})

    def flat(self) -> dict[str, Any]:
        """All settings by name, without the groups."""
        return flatten(dataclasses.asdict(self))  # pyright: ignore[reportArgumentType]
