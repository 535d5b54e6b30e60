"""A leading ~ is the home folder in every path flag of every verb, and in settings made in Python."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from tyro.conf import Positional

from harvest.config import HarvestConfig
from harvest.models.files import find_files
from harvest.prompts import read_prompts
from harvest.store import create_store, open_store
from jaxdict import cli
from jaxdict.flags import flatten
from tests.harvest.synthetic import make_spec

OTHER_FLAGS = {
    "train sae": ["--site", "double.2.img"],
    "train itda": ["--site", "double.2.img", "--atoms", "8"],
    "prune": ["--unused"],
    "steer": ["--feature", "1", "--prompt", "~/a prompt"],
    "steer-eval": ["--feature", "1", "--wanted", "colour=blue"],
}
"""What each verb needs beside its paths."""
NAMES = {
    "harvest": {"model", "prompts"},
    "inspect": {"path", "compare"},
    "compare": {"store"},
    "steer": {"model"},
    "steer-eval": {"model", "prompts"},
}
"""Settings of each verb that may be a path, but are text."""


def _config(verb: str) -> Any:
    return cli._load(cli.VERBS[verb].config)


def _hints(kind: type) -> dict[str, Any]:
    """Type hints of all settings of a config, those in its groups too."""
    found = get_type_hints(kind, include_extras=True)
    groups = [type(field.default) for field in fields(kind) if is_dataclass(field.default)]
    own = {field.name: found[field.name] for field in fields(kind)}
    return own | {name: hint for group in groups for name, hint in _hints(group).items()}


def _holds_path(hint: Any) -> bool:
    return hint is Path or any(map(_holds_path, get_args(hint)))


def _places(verb: str) -> dict[str, Any]:
    """Settings of a verb that hold a path, with their type hints."""
    names = NAMES.get(verb, ())
    hints = _hints(_config(verb)).items()
    return {name: hint for name, hint in hints if name in names or _holds_path(hint)}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_path_flag_takes_the_home_folder(verb: str, home: Path):
    words = list(OTHER_FLAGS.get(verb, ()))
    for name, hint in _places(verb).items():
        bare = Positional in getattr(hint, "__metadata__", ())
        flag = "--" + name.replace("_", "-")
        words = [f"~/{name}", *words] if bare else [*words, flag, f"~/{name}"]
    config = cli._parse(verb, cli.VERBS[verb], words)
    settings = flatten(asdict(config))
    for name in _places(verb):
        values = settings[name] if isinstance(settings[name], tuple) else [settings[name]]
        assert [str(value) for value in values] == [str(home / name)], name
    assert settings.get("prompt", "~/a prompt") == "~/a prompt"


def test_settings_made_in_python_are_expanded_too(home: Path):
    config = HarvestConfig(out=Path("~/store"), model="~/model", prompts="hf:owner/name")
    assert (config.out, config.model) == (home / "store", str(home / "model"))
    assert config.prompts == "hf:owner/name"
    assert HarvestConfig(out=Path("s3://bucket/~/x")).out == Path("s3://bucket/~/x")


def test_readers_in_python_take_the_home_folder(home: Path):
    create_store("~/store", make_spec())
    assert (home / "store").is_dir()
    assert open_store("~/store")
    (home / "prompts.txt").write_text("a red circle\n")
    assert [one.text for one in read_prompts("~/prompts.txt", 0).prompts] == ["a red circle"]


def test_the_home_of_somebody_unknown_is_told():
    with pytest.raises(ValueError, match="nothing is there"):
        read_prompts("~nobody-of-this-name/prompts.txt", 0)
    with pytest.raises(ValueError, match="a pipeline's folder or a hub id"):
        find_files("~nobody-of-this-name/model")
