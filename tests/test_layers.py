"""The house: which room may import which, what stays light, and how large a file or a room may be."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys

import pytest

from jaxdict import cli
from tests.imports import (
    PACKAGES,
    ROOT,
    edges,
    face,
    files,
    imports,
    is_room,
    module_of,
    own_imports,
)

HEAVY = {"torch", "jax", "flax", "optax", "orbax", "diffusers", "transformers", "bitsandbytes"}
TORCH = {"torch", "diffusers", "transformers", "bitsandbytes", "accelerate"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "harvest.hashing": (),
    "harvest.atomic": ("harvest.hashing",),
    "harvest.tensors": ("harvest.hashing",),
    "harvest.sites": (),
    "harvest.units": (),
    "harvest.flags": ("harvest.units",),
    "jaxdict.codes": (),
    "jaxdict.devices": (),
    "jaxdict.flags": (),
    "jaxdict.tables": (),
    "steer.pursuit": (),
    "interp": (),
    "harvest.config": ("harvest.flags",),
    "harvest.shapes": ("harvest.atomic",),
    "harvest.store": ("harvest.atomic", "harvest.units"),
    "jaxdict.cli": ("jaxdict.devices", "jaxdict.flags"),
    "jaxdict.plots": ("harvest.atomic",),
    "jaxdict.pursuit": ("jaxdict.codes", "jaxdict.devices"),
    "steer.config": ("harvest.flags",),
    "interp.config": ("harvest.flags",),
    "harvest.models": ("harvest.shapes", "harvest.store"),
    "harvest.shapes.training": ("harvest.atomic", "harvest.shapes"),
    "jaxdict": ("jaxdict.cli",),
    "jaxdict.demo": ("harvest.atomic", "harvest.flags", "harvest.store", "jaxdict.cli"),
    "jaxdict.dictionary": (
        "harvest.atomic",
        "harvest.tensors",
        "jaxdict.codes",
        "jaxdict.devices",
        "jaxdict.pursuit",
    ),
    "jaxdict.rows": (
        "harvest.atomic",
        "harvest.tensors",
        "harvest.flags",
        "jaxdict.flags",
        "harvest.store",
    ),
    "steer.edits": ("steer.config",),
    "harvest.prompts": ("harvest.atomic", "harvest.shapes", "harvest.store", "harvest.models"),
    "jaxdict.metrics": ("jaxdict.codes", "jaxdict.pursuit", "jaxdict.dictionary", "jaxdict.rows"),
    "jaxdict.runs": (
        "harvest.atomic",
        "harvest.hashing",
        "harvest.store",
        "harvest.tensors",
        "jaxdict.devices",
        "jaxdict.flags",
        "jaxdict.plots",
        "jaxdict.rows",
    ),
    "jaxdict.sae": (
        "harvest.flags",
        "jaxdict.codes",
        "jaxdict.devices",
        "jaxdict.flags",
        "jaxdict.dictionary",
        "jaxdict.rows",
    ),
    "steer.coder": ("steer.pursuit", "jaxdict.dictionary"),
    "harvest": (
        "harvest.sites",
        "harvest.units",
        "harvest.config",
        "harvest.store",
        "harvest.models",
        "harvest.prompts",
    ),
    "jaxdict.evaluate": (
        "harvest.tensors",
        "harvest.atomic",
        "harvest.flags",
        "harvest.sites",
        "jaxdict.devices",
        "jaxdict.tables",
        "harvest.store",
        "jaxdict.plots",
        "jaxdict.dictionary",
        "jaxdict.rows",
        "jaxdict.metrics",
        "jaxdict.runs",
        "jaxdict.sae",
    ),
    "jaxdict.itda": (
        "harvest.atomic",
        "harvest.tensors",
        "harvest.flags",
        "jaxdict.codes",
        "jaxdict.devices",
        "jaxdict.flags",
        "harvest.store",
        "jaxdict.pursuit",
        "jaxdict.dictionary",
        "jaxdict.rows",
        "jaxdict.metrics",
        "jaxdict.runs",
    ),
    "jaxdict.training": (
        "harvest.atomic",
        "harvest.hashing",
        "harvest.flags",
        "harvest.sites",
        "jaxdict.devices",
        "jaxdict.flags",
        "harvest.store",
        "jaxdict.plots",
        "jaxdict.dictionary",
        "jaxdict.rows",
        "jaxdict.metrics",
        "jaxdict.runs",
        "jaxdict.sae",
    ),
    "steer": (
        "harvest.atomic",
        "harvest.sites",
        "steer.config",
        "harvest.models",
        "harvest.prompts",
        "steer.edits",
        "steer.coder",
    ),
    "interp.index": (
        "harvest.atomic",
        "harvest.hashing",
        "harvest.flags",
        "harvest.sites",
        "interp",
        "harvest.store",
        "interp.config",
        "jaxdict.dictionary",
        "steer.coder",
    ),
    "jaxdict.compare": (
        "harvest.atomic",
        "harvest.flags",
        "jaxdict.tables",
        "harvest.store",
        "jaxdict.plots",
        "jaxdict.dictionary",
        "jaxdict.rows",
        "jaxdict.runs",
        "jaxdict.itda",
    ),
    "jaxdict.export": (
        "harvest.tensors",
        "jaxdict.codes",
        "harvest.atomic",
        "harvest.flags",
        "jaxdict.flags",
        "jaxdict.tables",
        "harvest.store",
        "jaxdict.dictionary",
        "jaxdict.rows",
        "jaxdict.metrics",
        "jaxdict.runs",
        "jaxdict.sae",
        "jaxdict.itda",
        "jaxdict.training",
    ),
    "jaxdict.inspect": (
        "harvest.sites",
        "harvest.atomic",
        "harvest.flags",
        "harvest.units",
        "jaxdict.tables",
        "harvest.store",
        "jaxdict.plots",
        "jaxdict.dictionary",
        "jaxdict.rows",
        "jaxdict.runs",
        "jaxdict.itda",
    ),
    "interp.report": ("harvest.atomic", "interp", "harvest.store", "interp.config", "interp.index"),
}
"""What each room imports, from the lowest room up: each row names only rooms of rows before it.

A file belongs to the row of the longest name that it begins with.
"""

LIGHT: dict[str, set[str]] = {
    "harvest.atomic": set(),
    "harvest.flags": set(),
    "harvest.units": set(),
    "harvest.sites": set(),
    "harvest.config": set(),
    "harvest.store": {"numpy", "zarr", "ml_dtypes", "obstore", "tqdm", "filelock"},
    "jaxdict.flags": set(),
    "jaxdict.tables": set(),
    "jaxdict.dictionary.arrays": {"numpy"},
    "harvest.tensors": {"numpy", "safetensors"},
    "jaxdict.dictionary.files": {"numpy"},
    "jaxdict.cli": {"tyro"},
    "steer.config": {"tyro"},
    "interp.config": {"tyro"},
}
"""Rooms and files that may import nothing from outside but these."""


def room_of(module: str) -> str:
    """The room that a module belongs to."""
    parts = module.split(".")
    return next(
        room for size in range(len(parts), 0, -1) if (room := ".".join(parts[:size])) in MAY_IMPORT
    )


def modules() -> list[str]:
    return [module_of(path) for path in files(*PACKAGES)]


def test_every_room_imports_what_its_row_says_and_nothing_else():
    rooms = {module: room_of(module) for module in modules()}
    real: dict[str, set[str]] = {room: set() for room in MAY_IMPORT}
    for a, b in edges(rooms):
        real[a].add(b)
    assert {room: set(row) for room, row in MAY_IMPORT.items()} == real


def test_no_import_climbs():
    order = list(MAY_IMPORT)
    for place, (room, row) in enumerate(MAY_IMPORT.items()):
        assert set(row) <= set(order[:place]), f"{room} imports what stands above it"


def test_no_circle_between_files():
    graph = {
        module_of(path): {target for _, _, target in own_imports(path)}
        for path in files(*PACKAGES)
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module not in done:
            for inner in sorted(graph.get(module, ())):
                visit(inner, (*way, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@pytest.mark.parametrize("folder", [*PACKAGES, "benchmarks"])
def test_from_outside_a_room_only_its_face_is_used(folder):
    """Whoever is not in a room imports from the room what its `__init__` hands on."""
    for path in files(folder):
        here = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
        for module, name, _ in own_imports(path):
            if is_room(module) and module not in PACKAGES:
                known = here == module or name in face(module)
                assert known, f"{path.relative_to(ROOT)}: {module} hands on no {name}"
                continue
            room = module if module in PACKAGES else module.rpartition(".")[0]
            inside = here == room or f"{here}.".startswith(f"{room}.") or room in PACKAGES
            assert inside, f"{path.relative_to(ROOT)}: import {name} from {room}, not from {module}"


@pytest.mark.parametrize("room", [m for m in modules() if is_room(m)])
def test_a_face_hands_on_what_is_there(room):
    package = importlib.import_module(room)
    for name, module in face(room).items():
        value = getattr(package, name)
        origin = importlib.import_module(module)
        assert value is (origin if module.endswith(f".{name}") else getattr(origin, name))
        taken = is_room(f"{room}.{name}") or f"{room}.{name}" in modules()
        assert not taken or value is origin, f"{room}.{name} is a file and something else"


@pytest.mark.parametrize("room", [m for m in modules() if is_room(m)])
def test_a_room_says_in_two_lines_what_it_is_for(room):
    package = ROOT / room.replace(".", "/") / "__init__.py"
    assert ast.get_docstring(ast.parse(package.read_text()))


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [("jaxdict", TORCH), ("steer", JAX), ("interp", JAX), ("harvest", JAX)],
)
def test_packages_keep_to_their_framework(package, forbidden):
    for path in files(package):
        tops = {module.split(".")[0] for module, _ in imports(path)}
        assert not tops & forbidden, f"{path.relative_to(ROOT)} imports {tops & forbidden}"


def test_only_zarrs_public_modules_are_imported():
    for path in files(*PACKAGES):
        private = {module for module, _ in imports(path) if module.startswith("zarr.core")}
        assert not private, f"{path.relative_to(ROOT)} imports {private}"


@pytest.mark.parametrize("name", LIGHT)
def test_the_ground_floor_imports_little_from_outside(name):
    inside = [path for path in files(*PACKAGES) if f"{module_of(path)}.".startswith(f"{name}.")]
    assert inside
    for path in inside:
        tops = {module.split(".")[0] for module, _ in imports(path)}
        outside = tops - set(PACKAGES) - set(sys.stdlib_module_names) - {"lazy_loader"}
        assert outside <= LIGHT[name], f"{path.relative_to(ROOT)} imports {outside - LIGHT[name]}"


def test_files_and_rooms_stay_small():
    """One idea a file, and not more files in a room than one can look over."""
    for path in files(*PACKAGES, "benchmarks"):
        lines = len(path.read_text().splitlines())
        assert lines <= 350, f"{path.relative_to(ROOT)} has {lines} lines"
    for room in [module for module in modules() if is_room(module)]:
        inside = list((ROOT / room.replace(".", "/")).glob("*.py"))
        assert len(inside) < 15, f"{room} has {len(inside)} files"


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded after running `code` in a fresh interpreter."""
    tail = "import sys; print('\\nLOADED', *{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{tail}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


@pytest.mark.parametrize(
    "code",
    [
        "import harvest, jaxdict, steer, interp",
        "import harvest.store, harvest.sites, harvest.store.read",
        "from harvest import open_store",
        "from jaxdict import load_dictionary, save_dictionary",
        "from jaxdict.export import load_dictionary",
        "from jaxdict.dictionary import Dictionary, load_dictionary",
        "import jaxdict.cli; jaxdict.cli.main(['--help'])",
    ],
)
def test_light_imports(code):
    assert not loaded_by(code) & HEAVY


@pytest.mark.parametrize(
    ("package", "names"),
    [
        (
            "jaxdict",
            "SAE decode encode gradient_pursuit load_dictionary prepare_atoms save_dictionary "
            "train_itda train_sae",
        ),
        ("steer", "Coder Edit splicing steering"),
        ("harvest", "load_model open_store"),
        ("interp", "load_index"),
    ],
)
def test_what_a_user_imports_is_there(package, names):
    assert set(names.split()) <= set(face(package))


def test_every_verbs_help_is_light_and_has_an_example():
    code = "import io, contextlib\nfrom jaxdict import cli\n"
    code += "for verb in cli.VERBS:\n"
    code += "    text = io.StringIO()\n"
    code += "    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):\n"
    code += "        cli.call([*verb.split(), '--help'])\n"
    code += "    flat = ' '.join(text.getvalue().split())\n"
    code += "    assert f'jaxdict {verb} ' in flat.split('Example:')[1], verb\n"
    assert not loaded_by(code) & HEAVY


def test_every_verb_leads_somewhere():
    for name, verb in cli.VERBS.items():
        for target in (verb.config, verb.function):
            module, attribute = target.split(":")
            tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
            defined = {getattr(node, "name", None) for node in tree.body}
            assert attribute in defined, f"{name}: {target}"


def test_public_text_speaks_of_the_project_alone():
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.pyi", "*.md", "*.toml", "*.html", "Makefile"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.split()
    if not tracked:
        tracked = [str(path) for path in files(*PACKAGES)]
    banned = re.compile(r"/(?:work|home|root)/\w|/tmp/\w|issue #?\d")
    for name in tracked:
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            assert not banned.search(line) or name.endswith("test_layers.py"), f"{name}:{number}"
