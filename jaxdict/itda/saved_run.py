"""What an ITDA run leaves behind: its atoms, its numbers, and the dictionary made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harvest.atomic import read_json, whole_file
from harvest.store import before, open_store, stream_of
from harvest.tensors import TensorFile, write_tensors
from jaxdict.dictionary import Dictionary
from jaxdict.itda.build import stored
from jaxdict.itda.labels import COLUMNS, sources
from jaxdict.rows import load_normalization
from jaxdict.runs import (
    FOLDER,
    NORMALIZATION,
    SUMMARY,
    TARGET_NORMALIZATION,
    Checkpoints,
    read_run,
)

ATOMS, SOURCES = "atoms.safetensors", "sources.json"
# Field of `Atoms` -> tensor in the file.
_TENSORS = {"atoms": "atoms", "source": "source", "typical": "typical", "target": "partner"}
_NEITHER = (
    f"expected {ATOMS} or a checkpoint in {{run}}, found neither; "
    "go on with `jaxdict train itda --resume`"
)


class Atoms(NamedTuple):
    """A finished dictionary in its own space.

    Attributes:
        atoms: float32 [m, d], unit norm.
        source: int32 [m, 3], (image, step, token) of each.
        typical: float32 [m], mean value where active, or None.
        target: float32 [m, d_out], what each atom stands for at the target, or None without one.
    """

    atoms: np.ndarray
    source: np.ndarray
    typical: np.ndarray | None = None
    target: np.ndarray | None = None


def save_atoms(run: Path, atoms: Atoms) -> Path:
    """Write a run's atoms, all of them or nothing."""
    tensors = {
        _TENSORS[name]: value for name, value in atoms._asdict().items() if value is not None
    }
    with whole_file(run / ATOMS) as draft:
        write_tensors(draft, tensors)
    return run / ATOMS


def run_to_dictionary(run: Path, *, verify: bool = True) -> Dictionary:
    """The dictionary of a run folder.

    Args:
        run: folder written by `jaxdict train itda`. The newest checkpoint is taken when the run is
            not finished; `typical` is then zero.
        verify: whether files have to have the hashes that were written into them.

    Returns:
        A dictionary of kind "itda". Its card says, besides the usual, where atoms came from:
        `sources` holds the prompts of the images in `source`, by image number.

    Raises:
        FileNotFoundError: there is no run, or none with atoms yet.
        ValueError: the run is damaged, or of another kind.
    """
    description = read_run(run, verify=verify)
    if description.get("kind") != "itda":
        raise ValueError(
            f"{run}: expected a run of kind 'itda', got {description.get('kind')!r}; "
            "export it with `jaxdict export`"
        )
    settings = description["config"]
    normalization = load_normalization(run / NORMALIZATION, verify=verify)
    out, target = normalization, settings.get("target") or ""
    if target:
        out = load_normalization(run / TARGET_NORMALIZATION, verify=verify)
    atoms, finished = _read_atoms(run, len(normalization.mean), verify=verify)
    if not len(atoms.atoms):
        raise ValueError(f"{run}: expected at least one atom, found none; lower --threshold")
    summary = read_json(run / SUMMARY, verify=verify) if (run / SUMMARY).is_file() else {}
    typical = atoms.typical if atoms.typical is not None else np.zeros(len(atoms.atoms), np.float32)
    site = settings["site"]
    card = {
        "site": site,
        **({"target": target} if target else {}),
        "stream": stream_of(site),
        "padding": settings.get("padding", "keep"),
        "model": description.get("model"),
        "store_fingerprint": description["store"]["fingerprint"],
        "normalization": {"kind": normalization.kind, "rows": normalization.rows, "folded": False},
        "threshold": summary.get("threshold", settings["threshold"] or None),
        "sources": _sources(run, description, atoms.source, verify=verify),
        "training": {
            "rows": summary.get("rows"),
            "finished": finished,
            **summary.get("training", {}),
        },
        "heldout": summary.get("heldout"),
        "config": settings,
        "resolved": description["resolved"],
        "versions": description["versions"],
    }
    f32 = np.float32
    return Dictionary(
        "itda",
        int(settings["k"]),
        atoms.atoms if atoms.target is None else atoms.target,
        bias=out.mean.astype(f32) if target else None,
        encoder=atoms.atoms if target else None,
        mean=normalization.mean.astype(f32),
        transform=normalization.transform.astype(f32),
        inverse=out.inverse.astype(f32),
        typical=typical,
        source=atoms.source,
        card=card,
    )


def _read_atoms(run: Path, d: int, *, verify: bool) -> tuple[Atoms, bool]:
    """The finished atoms, or those of the newest checkpoint; whether they are finished."""
    if (run / ATOMS).is_file():
        remedy = "copy the run again, or build it again"
        tensors = TensorFile(run / ATOMS, verify=verify, remedy=remedy).read_all()
        return Atoms(
            **{name: tensors[key] for name, key in _TENSORS.items() if key in tensors}
        ), True
    if not (run / FOLDER).is_dir():  # opening checkpoints would create the folder
        raise FileNotFoundError(_NEITHER.format(run=run))
    with Checkpoints(run, verify=verify) as checkpoints:
        if checkpoints.latest is None:
            raise FileNotFoundError(_NEITHER.format(run=run))
        arrays, facts = stored(checkpoints, d)
    m, target = facts["m"], arrays.get("partner")
    return Atoms(
        np.array(arrays["unit"][:m]),
        np.array(arrays["source"][:m]),
        target=None if target is None else np.array(target[:m]),
    ), False


def _sources(
    run: Path, description: dict[str, Any], source: np.ndarray, *, verify: bool
) -> dict[str, Any]:
    """Labels that the finished run saved; of an unfinished run, from its store if it is still there."""
    if (run / SOURCES).is_file() and (run / ATOMS).is_file():
        return read_json(run / SOURCES, verify=verify)
    columns: dict[str, Any] = {"columns": list(COLUMNS), "prompts": {}}
    try:
        store = open_store(description["store"]["path"])
    except ValueError:
        return {**columns, "note": "the store was not there at export"}
    if before(store, description["store"]["fingerprint"]) is None:
        return {**columns, "note": "the store had changed at export"}
    return sources(store, description["config"]["site"], source)
