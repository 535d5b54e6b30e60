"""What an ITDA run leaves behind: its atoms, its numbers, and the dictionary made of it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from harvest.store import Store, open_store
from jaxdict import metrics, runs
from jaxdict.codes import decode
from jaxdict.config import TrainITDAConfig
from jaxdict.data import Source, source_of, stream_of
from jaxdict.export import Dictionary
from jaxdict.normalize import (
    Space,
    bfloat16_rows,
    denormalize,
    load_normalization,
    normalize,
)
from jaxdict.pursuit import PreparedAtoms, gradient_pursuit

ATOMS = "atoms.safetensors"
_BATCH = 2048
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
    """

    atoms: np.ndarray
    source: np.ndarray
    typical: np.ndarray | None = None


def save_atoms(run: Path, atoms: Atoms) -> Path:
    """Write a run's atoms, all of them or nothing."""
    tensors = {
        name: np.ascontiguousarray(value)
        for name, value in atoms._asdict().items()
        if value is not None
    }
    temporary = run / f".{ATOMS}.tmp"
    save_file(tensors, temporary)
    os.replace(temporary, run / ATOMS)
    return run / ATOMS


class Probe:
    """Measures atoms on held-out rows, and how strongly they fire on training rows; only reads."""

    def __init__(self, config: TrainITDAConfig, store: Store, source: Source, space: Space) -> None:
        """Choose the rows; they are read when they are measured."""
        self._space, self._k = space, config.k
        self._train = source.spread(config.eval_rows)
        self._held: Source | None = None
        if len(store.indices("validation")):
            held = source_of(store, config.site, split="validation", steps=config.steps)
            self._held = held.spread(config.eval_rows)

    @property
    def training_rows(self) -> int:
        """Rows behind `typical`."""
        return self._train.rows

    def heldout(self, atoms: PreparedAtoms, m: int) -> dict[str, Any] | None:
        """Held-out numbers (see `jaxdict.metrics.Measurement.summary`); None without such rows."""
        if self._held is None or not m:
            return None
        return self._measure(self._held, atoms, m)[0].summary()

    def typical(self, atoms: PreparedAtoms, m: int) -> np.ndarray:
        """Mean value of each atom over the training rows where it is active: [m], 0 if never."""
        if not m:
            return np.zeros(0, np.float32)
        measured, total = self._measure(self._train, atoms, m)
        times = measured.fired
        return np.where(times > 0, total / np.maximum(times, 1), 0).astype(np.float32)

    def _measure(
        self, source: Source, atoms: PreparedAtoms, m: int
    ) -> tuple[metrics.Measurement, np.ndarray]:
        total = np.zeros(m)

        def report(bits: np.ndarray, weight: np.ndarray) -> metrics.BatchReport:
            batch, values = _report(
                atoms, self._space, jnp.asarray(bits), jnp.asarray(weight), k=self._k
            )
            nonlocal total
            total = total + np.asarray(values[:m], np.float64)
            return batch._replace(fired=batch.fired[:m])

        measured = metrics.measure(source.blocks(), source.steps, report, batch=_BATCH)
        return measured, total


@partial(jax.jit, static_argnames="k")
def _report(
    atoms: PreparedAtoms, space: Space, bits: jax.Array, weight: jax.Array, *, k: int
) -> tuple[metrics.BatchReport, jax.Array]:
    x = bfloat16_rows(bits)
    z = normalize(space, x)
    codes = gradient_pursuit(z, atoms, k).codes
    z_hat = decode(codes, atoms.unit)
    values = jnp.zeros(atoms.m).at[codes.indices].add(codes.values * weight[:, None])
    report = metrics.BatchReport(
        metrics.batch_sums(x, denormalize(space, z_hat), weight, space.mean),
        metrics.batch_sums(z, z_hat, weight, jnp.zeros_like(space.mean)),
        metrics.fired(codes, atoms.m, weight),
    )
    return report, values


def run_to_dictionary(run: Path) -> Dictionary:
    """The dictionary of a run folder.

    Args:
        run: folder written by `jaxdict train itda`. The newest checkpoint is taken when the run is
            not finished; `typical` is then zero.

    Returns:
        A dictionary of kind "itda". Its card says, besides the usual, where atoms came from:
        `sources` holds the prompts of the images in `source`, by image number.

    Raises:
        FileNotFoundError: no run, or a run without any atoms yet.
        ValueError: the run is damaged.
    """
    run = Path(run)
    if not (run / runs.CONFIG).is_file():
        raise FileNotFoundError(
            f"expected a run (a folder with {runs.CONFIG}) at {run}, found none; "
            "name the --out of `jaxdict train itda`"
        )
    description = runs.read_json(run / runs.CONFIG)
    if description.get("kind") != "itda":
        raise ValueError(
            f"{run}: expected a run of kind 'itda', got {description.get('kind')!r}; "
            "export it with `jaxdict export`"
        )
    settings = description["config"]
    normalization = load_normalization(run / runs.NORMALIZATION)
    atoms, finished = _read_atoms(run, len(normalization.mean))
    if not len(atoms.atoms):
        raise ValueError(f"{run}: expected at least one atom, found none; lower --threshold")
    summary = runs.read_json(run / runs.SUMMARY) if (run / runs.SUMMARY).is_file() else {}
    typical = atoms.typical if atoms.typical is not None else np.zeros(len(atoms.atoms), np.float32)
    mean, transform, inverse = (
        getattr(normalization, name).astype(np.float32) for name in ("mean", "transform", "inverse")
    )
    site = settings["site"]
    card = {
        "site": site,
        "stream": stream_of(site),
        "model": description.get("model"),
        "store_fingerprint": description["store"]["fingerprint"],
        "normalization": {"kind": normalization.kind, "rows": normalization.rows, "folded": False},
        "threshold": summary.get("threshold", settings["threshold"] or None),
        "sources": _sources(description, atoms.source, site),
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
    return Dictionary(
        "itda",
        int(settings["k"]),
        atoms.atoms,
        mean=mean,
        transform=transform,
        inverse=inverse,
        typical=typical,
        source=atoms.source,
        card=card,
    )


def _read_atoms(run: Path, d: int) -> tuple[Atoms, bool]:
    """The finished atoms, or those of the newest checkpoint; whether they are finished."""
    if (run / ATOMS).is_file():
        return Atoms(**load_file(run / ATOMS)), True
    from jaxdict.checkpoint import FOLDER, Checkpoints

    if not (run / FOLDER).is_dir():  # opening them would make the folder
        raise FileNotFoundError(_NEITHER.format(run=run))
    with Checkpoints(run) as checkpoints:
        if checkpoints.latest is None:
            raise FileNotFoundError(_NEITHER.format(run=run))
        facts = checkpoints.facts()
        capacity = facts["capacity"]
        template = {
            "unit": np.zeros((capacity, d), np.float32),
            "source": np.zeros((capacity, 3), np.int32),
        }
        if facts["gram"]:
            template["gram"] = np.zeros((capacity, capacity), np.float32)
        arrays, _ = checkpoints.restore(template)
    m = facts["m"]
    return Atoms(np.array(arrays["unit"][:m]), np.array(arrays["source"][:m])), False


def _sources(description: dict[str, Any], source: np.ndarray, site: str) -> dict[str, Any]:
    """How to read `source`, and the prompts of its images where the store is still there.

    Steps and tokens count what the store keeps. `denoising_step` says which step each kept one is; where a store keeps
    a sample of the tokens, `position` says where in its stream each atom's token lies.
    """
    sources: dict[str, Any] = {"columns": ["image", "step", "token"]}
    try:
        store = open_store(description["store"]["path"])
    except ValueError:
        return {**sources, "prompts": {}, "note": "the store was not there at export"}
    if store.fingerprint != description["store"]["fingerprint"]:
        return {**sources, "prompts": {}, "note": "the store had changed at export"}
    images = np.unique(source[:, 0])
    sources["prompts"] = {str(image): store.prompts[image] for image in images}
    sources["seeds"] = {str(image): int(store.seeds[image]) for image in images}
    sources["denoising_step"] = store.step_numbers.tolist()
    if store.sampled:
        place = np.searchsorted(images, source[:, 0])
        sources["position"] = store.positions(site, images)[place, source[:, 2]].tolist()
    return sources
