"""The map in docs/architecture.md: its diagram is the real imports, and what it names is there."""

from __future__ import annotations

import ast
import re

import pytest

from tests.imports import PACKAGES, ROOT, edges, files, module_of, without_shortcuts
from tests.test_layers import MAY_IMPORT, room_of

MAP = (ROOT / "docs" / "architecture.md").read_text()
PLACE = re.compile(r"`([\w/.-]+/[\w.-]*)(?::([\w.]+))?`")
"""A file or folder in backticks, perhaps with a name in it: `jaxdict/sae/kinds.py:JumpReLU.active`."""


def section(title: str) -> str:
    """Text below a heading, up to the next one of its level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", MAP, re.M | re.S)
    assert found, f"no section {title}"
    return found.group(1)


def defined(tree: ast.Module | ast.ClassDef) -> dict[str, ast.stmt]:
    """Functions, classes and assigned names in a file or a class."""
    found: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        for target in targets:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            found |= {name.id: node for name in names if isinstance(name, ast.Name)}
    return found


def test_the_diagram_is_the_real_imports():
    """Arrows that a longer way also leads along are left out of it."""
    drawn = set(re.findall(r"^ *([\w.]+) --> ([\w.]+)$", MAP, re.M))
    rooms = {module_of(path): room_of(module_of(path)) for path in files(*PACKAGES)}
    assert drawn == without_shortcuts(edges(rooms))
    shown = {name for pair in drawn for name in pair}
    assert shown | set(re.findall(r"^ *([\w.]+)$", MAP, re.M)) >= set(MAY_IMPORT)


def test_everything_the_map_names_is_there():
    named = PLACE.findall(MAP)
    assert len(named) > 80
    for place, name in named:
        path = ROOT / place
        assert path.exists(), place
        tree: ast.Module | ast.ClassDef = (
            ast.parse(path.read_text()) if name else ast.Module([], [])
        )
        for part in filter(None, name.split(".")):
            here = defined(tree)
            assert part in here, f"{place} has no {name}"
            if isinstance(here[part], ast.ClassDef):
                tree = here[part]


def test_the_list_of_rooms_and_files_is_whole():
    listed = {}
    for line in section("The rooms").splitlines():
        row = re.fullmatch(r"\| `([\w/]+)/` \| (.+) \| (.+) \|", line)
        if row:
            listed[row[1]] = set(row[3].split(", "))
    real: dict[str, set[str]] = {}
    for path in files(*PACKAGES):
        if not path.name.startswith("__"):
            real.setdefault(path.parent.relative_to(ROOT).as_posix(), set()).add(path.stem)
    assert listed == real


def test_twenty_five_questions_have_an_answer():
    rows = [line for line in section("Where is X done?").splitlines() if line.startswith("| ")]
    answers = rows[2:]
    assert len(answers) >= 25
    for line in answers:
        assert any(name for _, name in PLACE.findall(line)), line


@pytest.mark.parametrize("title", ["A new kind of autoencoder", "A new pursuit"])
def test_extensions_name_their_files_in_order(title):
    text = MAP[MAP.index(f"### {title}") :].split("\n### ")[1]
    assert re.search(r"^1\. .*`", text, re.M), title
