"""Which file imports which, read from the source: for the tests of the layers and of the map."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("harvest", "jaxdict", "steer", "interp")


def files(*folders: str) -> list[Path]:
    """Python files below some folders."""
    found = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert found
    return found


def module_of(path: Path) -> str:
    """Dotted name of a file; of an `__init__.py` that of its folder."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def is_room(module: str) -> bool:
    """Whether a dotted name is a package."""
    return (ROOT / module.replace(".", "/") / "__init__.py").is_file()


@cache
def is_file(module: str) -> bool:
    """Whether a dotted name is a Python file."""
    return (ROOT / (module.replace(".", "/") + ".py")).is_file()


@cache
def face(room: str) -> dict[str, str]:
    """Public names of a room -> the module each comes from; a module that is handed on stands for itself."""
    folder = ROOT / room.replace(".", "/")
    stub = folder / "__init__.pyi"
    source = stub if stub.is_file() else folder / "__init__.py"
    names = {}
    for node in ast.parse(source.read_text()).body:
        if isinstance(node, ast.ImportFrom):
            origin = ".".join(filter(None, [room if node.level else "", node.module]))
            for alias in node.names:
                module = f"{origin}.{alias.name}"
                names[alias.asname or alias.name] = module if is_file(module) else origin
    return names


@cache
def imports(path: Path) -> tuple[tuple[str, str], ...]:
    """What a file imports anywhere: (module, name), the name empty for `import module`."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += [(node.module or "", alias.name) for alias in node.names]
    return tuple(found)


def own_imports(path: Path) -> list[tuple[str, str, str]]:
    """What a file imports of ours: (module as written, name, file that it leads to)."""
    found = []
    for module, name in imports(path):
        if module.split(".")[0] not in PACKAGES or (module, name) == ("jaxdict", "__version__"):
            continue
        inner = f"{module}.{name}"
        if is_file(module):
            target = module
        elif is_file(inner):
            target = inner
        else:
            target = face(module).get(name, module)
        found.append((module, name, target))
    return found


def edges(room_of: dict[str, str]) -> set[tuple[str, str]]:
    """Which room imports which, for the room of each module."""
    found = set()
    for path in files(*PACKAGES):
        if path.name == "__init__.py":
            continue
        for _, _, target in own_imports(path):
            pair = (room_of[module_of(path)], room_of[target])
            if pair[0] != pair[1]:
                found.add(pair)
    return found


def without_shortcuts(pairs: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Edges of a graph without circles, less those that a longer way also leads along."""

    @cache
    def below(room: str) -> frozenset[str]:
        direct = {b for a, b in pairs if a == room}
        return frozenset(direct | {far for near in direct for far in below(near)})

    return {(a, b) for a, b in pairs if not any(b in below(c) for x, c in pairs if x == a)}
