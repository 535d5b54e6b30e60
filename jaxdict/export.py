"""The dictionary artefact: one folder that holds everything needed to encode and decode.

A dictionary is a folder with two files, readable without this package:

* `dictionary.safetensors`: the tensors (`atoms`, `bias`, `encoder`, ...), no pickle anywhere;
* `card.json`: kind, d, m, k, site, metrics, config, versions, where atoms came from.

It acts on **raw** activations x [n, d]. For kind `topk` every normalization is folded into the
tensors; for kind `itda` it is kept beside the atoms, because pursuit runs in the normalized space:

    z = (x - mean) * transform        (or (x - mean) @ transform for a [d, d] transform)
    x = z * inverse + mean            (or z @ inverse + mean)

Only numpy and safetensors are imported here: this file is on the ground floor of the house.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FORMAT = "jaxdict-dictionary"
VERSION = 1
KINDS = ("topk", "itda")
TENSORS_FILE = "dictionary.safetensors"
CARD_FILE = "card.json"

# name -> (dtype, shapes it may have); m atoms, d width
_TENSORS: dict[str, tuple[type[np.generic], tuple[str, ...]]] = {
    "atoms": (np.float32, ("m d",)),
    "bias": (np.float32, ("d",)),
    "encoder": (np.float32, ("m d",)),
    "encoder_bias": (np.float32, ("m",)),
    "mean": (np.float32, ("d",)),
    "transform": (np.float32, ("d", "d d")),
    "inverse": (np.float32, ("d", "d d")),
    "typical": (np.float32, ("m",)),
    "source": (np.int32, ("m 3",)),
}


@dataclass(frozen=True, eq=False)
class Dictionary:
    """A trained dictionary as plain numpy arrays; every shape and dtype is checked when it is made.

    Attributes:
        kind: "topk" (a linear encoder with TopK) or "itda" (gradient pursuit on the atoms).
        k: active atoms a row, at most.
        atoms: float32 [m, d], decoder rows in the dictionary's own space (unit norm for itda).
        bias: float32 [d] decoder bias, or None.
        encoder: float32 [m, d], or None (itda).
        encoder_bias: float32 [m], or None (itda).
        mean: float32 [d] subtracted from raw rows, or None.
        transform: float32 [d] or [d, d], raw (minus mean) to own space, or None.
        inverse: float32, the same shape, own space to raw (minus mean), or None.
        typical: float32 [m], mean value of a feature where it is active; 0 if never.
        source: int32 [m, 3], the (image, step, token) each atom came from (itda), or None.
        card: JSON-able facts: model, site, stream, store_fingerprint, metrics, config, versions.

    Raises:
        ValueError: a shape, dtype, value or combination that no encoder could use; the message
            names the field, what was expected and what came.
    """

    kind: str
    k: int
    atoms: np.ndarray
    bias: np.ndarray | None = None
    encoder: np.ndarray | None = None
    encoder_bias: np.ndarray | None = None
    mean: np.ndarray | None = None
    transform: np.ndarray | None = None
    inverse: np.ndarray | None = None
    typical: np.ndarray | None = None
    source: np.ndarray | None = None
    card: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check every field against the others."""
        _check(self)

    @property
    def m(self) -> int:
        """Number of atoms."""
        return int(self.atoms.shape[0])

    @property
    def d(self) -> int:
        """Width of a raw row."""
        return int(self.atoms.shape[1])

    @property
    def raw_atoms(self) -> np.ndarray:
        """Float32 [m, d]: what one unit of each feature adds to the raw activation."""
        if self.inverse is None:
            return self.atoms
        return self.atoms * self.inverse if self.inverse.ndim == 1 else self.atoms @ self.inverse


def save_dictionary(dictionary: Dictionary, path: str | os.PathLike[str]) -> Path:
    """Write a dictionary folder, all of it or nothing.

    A dictionary that is already there is replaced; anything else that is there is left alone.

    Args:
        dictionary: what to write.
        path: the folder to make.

    Returns:
        The folder's path.

    Raises:
        FileExistsError: `path` is a file, or a non-empty folder that is not a dictionary.
        ValueError: the card cannot be written as JSON, or contradicts the tensors.
    """
    target = Path(path)
    _refuse_foreign(target)
    _check(dictionary)
    text = _card_text(dictionary)
    tensors = {
        name: np.ascontiguousarray(value)
        for name in _TENSORS
        if (value := getattr(dictionary, name)) is not None
    }
    with whole_folder(target) as folder:
        save_file(tensors, folder / TENSORS_FILE, {"format": FORMAT, "version": str(VERSION)})
        (folder / CARD_FILE).write_text(text, encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)
    return target


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that takes its place when the block ends well.

    If the block raises, the temporary folder is removed and `target` is left as it was.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            # os.replace cannot put a folder over a non-empty one: step the old one aside first.
            aside = temporary.with_suffix(".old")
            os.replace(target, aside)
            try:
                os.replace(temporary, target)
            except BaseException:
                os.replace(aside, target)
                raise
            shutil.rmtree(aside)
        else:
            os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_dictionary(path: str | os.PathLike[str]) -> Dictionary:
    """Read a dictionary folder and check all of it.

    Args:
        path: a folder written by `save_dictionary`.

    Returns:
        The dictionary; its `card` also holds kind, d, m and k.

    Raises:
        FileNotFoundError: no such folder, or one of its two files is missing.
        ValueError: not a dictionary, written by a newer version, damaged, or inconsistent.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "nothing"
        raise FileNotFoundError(
            f"expected a dictionary folder at {folder}, found {what}; "
            "give the folder that `jaxdict export` made"
        )
    for name in (CARD_FILE, TENSORS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"expected {name} in {folder}, found none: this is not a dictionary folder; "
                "make one with `jaxdict export RUN --out FOLDER`"
            )
    card = read_facts(folder / CARD_FILE, format=FORMAT, version=VERSION)
    tensors = _read_tensors(folder / TENSORS_FILE)
    k = card.get("k")
    if not isinstance(k, int) or isinstance(k, bool):
        raise ValueError(f"{folder / CARD_FILE}: expected an integer k, got {k!r}")
    if "atoms" not in tensors:
        raise ValueError(
            f"{folder / TENSORS_FILE}: expected a tensor atoms, found {_list(tensors)}"
        )
    try:
        dictionary = Dictionary(kind=card.get("kind", ""), k=k, card=card, **tensors)
        _card_facts(dictionary)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; export the run again") from None
    return dictionary


def _check(x: Dictionary) -> None:
    """Raise ValueError, naming the field, unless every field fits the kind and each other."""
    if x.kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {x.kind!r}")
    for name, (dtype, _) in _TENSORS.items():
        value = getattr(x, name)
        if value is None:
            continue
        if not isinstance(value, np.ndarray):
            raise ValueError(f"{name}: expected a numpy array, got {type(value).__name__}")
        if value.dtype != dtype:
            raise ValueError(f"{name}: expected {np.dtype(dtype).name}, got {value.dtype.name}")
        if value.dtype == np.float32 and not np.isfinite(value).all():
            raise ValueError(f"{name}: expected finite numbers, found NaN or infinity")
    if not isinstance(x.atoms, np.ndarray) or x.atoms.ndim != 2 or 0 in x.atoms.shape:
        got = "none" if x.atoms is None else list(x.atoms.shape)
        raise ValueError(f"atoms: expected a shape [m, d] with m, d >= 1, got {got}")
    m, d = x.atoms.shape
    sizes = {"m": m, "d": d, "3": 3}
    for name, (_, shapes) in _TENSORS.items():
        value = getattr(x, name)
        allowed = [tuple(sizes[letter] for letter in shape.split()) for shape in shapes]
        if value is not None and value.shape not in allowed:
            wanted = " or ".join(str(list(shape)) for shape in allowed)
            found = list(value.shape)
            raise ValueError(f"{name}: expected {wanted} beside atoms [{m}, {d}], got {found}")
    if isinstance(x.k, bool) or not isinstance(x.k, int | np.integer) or x.k < 1:
        raise ValueError(f"k: expected an integer of at least 1, got {x.k!r}")
    if x.typical is None:
        raise ValueError("typical: expected a float32 array [m], got none; use zeros if unknown")
    if (x.transform is None) != (x.inverse is None):
        raise ValueError("transform and inverse: expected both or neither, got one")
    if x.transform is not None and x.inverse is not None and x.transform.ndim != x.inverse.ndim:
        wanted, found = list(x.transform.shape), list(x.inverse.shape)
        raise ValueError(f"inverse: expected the shape of transform {wanted}, got {found}")
    _check_kind(x)


def _check_kind(x: Dictionary) -> None:
    """Raise ValueError where a field does not belong to the kind."""
    if x.kind == "topk":
        needed, foreign = ("encoder", "encoder_bias"), ("mean", "transform", "inverse")
        if x.k > x.m:
            raise ValueError(f"k: expected at most m = {x.m}, got {x.k}")
    else:
        needed, foreign = (), ("encoder", "encoder_bias", "bias")
        norms = np.linalg.norm(x.atoms, axis=1)
        worst = int(np.argmax(np.abs(norms - 1)))
        if abs(norms[worst] - 1) > 1e-3:
            raise ValueError(
                f"atoms: expected unit norm for itda, got {norms[worst]:.4g} at atom {worst}"
            )
    for name in needed:
        if getattr(x, name) is None:
            raise ValueError(f"{name}: expected an array for kind {x.kind}, got none")
    for name in foreign:
        if getattr(x, name) is not None:
            raise ValueError(f"{name}: expected none for kind {x.kind}, got an array")


def _card_facts(x: Dictionary) -> dict[str, Any]:
    """The facts that the card repeats; ValueError when the card says something else."""
    facts = {"kind": x.kind, "d": x.d, "m": x.m, "k": int(x.k)}
    for key, value in facts.items():
        said = x.card.get(key, value)
        if said != value:
            raise ValueError(f"card: expected {key} = {value!r} as in the tensors, got {said!r}")
    return facts


def _card_text(x: Dictionary) -> str:
    """The card as JSON text: format and facts first, then what the maker put in."""
    card = {"format": FORMAT, "version": VERSION, **_card_facts(x)}
    card |= {key: value for key, value in x.card.items() if key not in card}
    try:
        text = json.dumps(card, indent=2, default=_plain, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"card: expected JSON values (null if unknown), got {error}") from None
    return text + "\n"


def _plain(value: Any) -> Any:
    """What json cannot write itself: numpy values, paths, dataclasses."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} {value!r}")


def read_facts(file: Path, *, format: str, version: int) -> dict[str, Any]:
    """What a JSON file says beside its format and version, which are checked: up to `version`.

    Raises:
        ValueError: damaged, of another format, or of a newer version.
    """
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected JSON, found a damaged file ({error})") from None
    found = facts.pop("format", None) if isinstance(facts, dict) else None
    if found != format:
        raise ValueError(f"{file}: expected format {format!r}, got {found!r}")
    written = facts.pop("version", None)
    if not isinstance(written, int) or not 1 <= written <= version:
        raise ValueError(
            f"{file}: expected version 1 to {version}, got {written!r}; install a newer jaxdict"
        )
    return facts


def _read_tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of the file; an unknown name is an error."""
    try:
        with safe_open(file, framework="np") as reader:
            tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{file}: expected safetensors, found a damaged file ({error})") from None
    unknown = set(tensors) - set(_TENSORS)
    if unknown:
        raise ValueError(
            f"{file}: expected tensors among {_list(_TENSORS)}, found {_list(unknown)}"
        )
    return tensors


def _refuse_foreign(target: Path) -> None:
    """FileExistsError unless target is free, empty, or already a dictionary."""
    if target.is_dir():
        names = {entry.name for entry in target.iterdir()}
        if names and names != {CARD_FILE, TENSORS_FILE}:
            other = _list(names - {CARD_FILE, TENSORS_FILE})
            raise FileExistsError(
                f"expected a free place or a dictionary at {target}, found other things ({other}); "
                "give another folder"
            )
    elif target.exists() or target.is_symlink():
        raise FileExistsError(f"expected a folder to write, found a file at {target}")


def _list(names: Any) -> str:
    return ", ".join(sorted(names)) or "nothing"
