"""The rooms' rules: who may import whom, and what stays light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxdict import cli

ROOT = Path(__file__).parent.parent
ROOMS = ("harvest", "jaxdict", "steer", "interp")
HEAVY = {"torch", "jax", "flax", "optax", "orbax", "diffusers", "transformers", "bitsandbytes"}
TORCH = {"torch", "diffusers", "transformers", "bitsandbytes", "accelerate"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}

MAY_IMPORT = {
    "harvest": set(),
    "jaxdict": {"harvest.store"},
    "steer": {"harvest.sites", "harvest.models", "jaxdict.dictionary"},
    "interp": {
        "harvest.sites",
        "harvest.store",
        "harvest.models",
        "jaxdict.dictionary",
        "steer.coder",
    },
}
GROUND_FLOOR = {
    "harvest/sites.py": set(),
    "harvest/store/read.py": {"numpy", "zarr"},
    "harvest/store/gather.py": {"numpy", "zarr"},
    "harvest/store/schema.py": {"numpy", "zarr"},
    "harvest/store/write.py": {"numpy", "zarr"},
    "harvest/store/statistics.py": {"numpy"},
    "harvest/store/location.py": {"zarr", "obstore"},
    "harvest/store/verify.py": {"numpy", "tqdm"},
    "jaxdict/dictionary/arrays.py": {"numpy"},
    "jaxdict/dictionary/files.py": {"numpy", "safetensors"},
}


def imports(path: Path) -> set[str]:
    """Dotted names that a file imports anywhere, `from a import b` as "a" (and "a.b" for our rooms)."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module
            own = node.module in ROOMS
            names |= {f"{node.module}.{alias.name}" if own else node.module for alias in node.names}
    return names


def files(room: str) -> list[Path]:
    found = sorted((ROOT / room).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_only_what_the_design_allows(room):
    for path in files(room):
        for name in imports(path):
            top = name.split(".")[0]
            if top in ROOMS and top != room and name.split(".")[1:] != ["__version__"]:
                allowed = any(name == ok or name.startswith(ok + ".") for ok in MAY_IMPORT[room])
                assert allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    ("room", "forbidden"), [("jaxdict", TORCH), ("steer", JAX), ("interp", JAX), ("harvest", JAX)]
)
def test_rooms_keep_to_their_framework(room, forbidden):
    for path in files(room):
        tops = {name.split(".")[0] for name in imports(path)}
        assert not tops & forbidden, f"{path.relative_to(ROOT)} imports {tops & forbidden}"


def test_only_zarrs_public_modules_are_imported():
    for room in ROOMS:
        for path in files(room):
            private = {name for name in imports(path) if name.startswith("zarr.core")}
            assert not private, f"{path.relative_to(ROOT)} imports {private}"


@pytest.mark.parametrize("path", [p for p in GROUND_FLOOR if (ROOT / p).exists()])
def test_ground_floor_imports_little(path):
    own = {"harvest", "jaxdict"}
    outside = {name.split(".")[0] for name in imports(ROOT / path)} - set(sys.stdlib_module_names)
    assert outside - own <= GROUND_FLOOR[path]
    inside = {name for name in imports(ROOT / path) if name.split(".")[0] in own}
    floor = {p.removesuffix(".py").replace("/", ".") for p in GROUND_FLOOR}
    assert inside <= floor | {"jaxdict.__version__"}


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
        "import harvest.store",
        "import harvest.sites",
        "import jaxdict.dictionary.files",
        "import jaxdict.cli; jaxdict.cli.main(['--help'])",
    ],
)
def test_light_imports(code):
    assert not loaded_by(code) & HEAVY


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
        ["git", "ls-files", "*.py", "*.md", "*.toml", "*.html", "Makefile"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    ).stdout.split()
    if not tracked:
        tracked = [str(path) for room in ROOMS for path in files(room)]
    banned = re.compile(r"/(?:work|home|root)/\w|/tmp/\w|issue #?\d")
    for name in tracked:
        for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
            assert not banned.search(line) or name.endswith("test_layers.py"), f"{name}:{number}"
