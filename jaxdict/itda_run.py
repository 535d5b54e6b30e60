"""What an ITDA run leaves behind: its atoms, its numbers, and the dictionary made of it."""

from __future__ import annotations

import os
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from harvest.store import Store, open_store
from jaxdict import metrics, runs
from jaxdict.checkpoint import FOLDER, Checkpoints
from jaxdict.codes import decode
from jaxdict.config import TrainITDAConfig
from jaxdict.data import Source, source_of, stream_of
from jaxdict.export import Dictionary
from jaxdict.itda_build import Build, Spaces, stored
from jaxdict.itda_labels import COLUMNS, sources
from jaxdict.normalize import (
    bfloat16_rows,
    denormalize,
    load_normalization,
    normalize,
)
from jaxdict.pursuit import PreparedAtoms, gradient_pursuit

ATOMS, SOURCES = "atoms.safetensors", "sources.json"
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
        partner: float32 [m, d_out], what each atom stands for at the target, or None without one.
    """

    atoms: np.ndarray
    source: np.ndarray
    typical: np.ndarray | None = None
    partner: np.ndarray | None = None


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

    def __init__(
        self, config: TrainITDAConfig, store: Store, source: Source, spaces: Spaces
    ) -> None:
        """Choose the rows; they are read when they are measured."""
        self._spaces, self._k, self._target = spaces, config.k, config.target
        self.seconds = 0.0  # spent measuring
        self._train = source.spread(config.eval_rows)
        self._held: Source | None = None
        if len(store.indices("validation")):
            held = source_of(store, config.site, split="validation", steps=config.steps)
            self._held = held.spread(config.eval_rows)

    @property
    def training_rows(self) -> int:
        """Rows behind `typical`."""
        return self._train.rows

    def heldout(self, build: Build) -> dict[str, Any] | None:
        """Held-out numbers (see `jaxdict.metrics.Measurement.summary`); None without such rows."""
        if self._held is None or not build.m:
            return None
        return self._measure(self._held, build)[0].summary()

    def typical(self, build: Build) -> np.ndarray:
        """Mean value of each atom over the training rows where it is active: [m], 0 if never."""
        if not build.m:
            return np.zeros(0, np.float32)
        measured, total = self._measure(self._train, build)
        times = measured.fired
        return np.where(times > 0, total / np.maximum(times, 1), 0).astype(np.float32)

    def _measure(self, source: Source, build: Build) -> tuple[metrics.Measurement, np.ndarray]:
        total, blocks = np.zeros(build.m), source.blocks()
        if self._target:
            other = source.beside(self._target)
            # A row and its target side by side: what is measured goes batch by batch.
            blocks = (
                (images, np.concatenate([bits, other.read(images)], axis=-1))
                for images, bits in blocks
            )

        def report(bits: np.ndarray, weight: np.ndarray) -> metrics.BatchReport:
            batch, values = _report(
                build.atoms,
                build.partner,
                self._spaces,
                jnp.asarray(bits),
                jnp.asarray(weight),
                k=self._k,
            )
            nonlocal total
            total = total + np.asarray(values[: build.m], np.float64)
            return batch._replace(fired=batch.fired[: build.m])

        started = time.perf_counter()
        measured = metrics.measure(blocks, source.steps, report, batch=_BATCH)
        self.seconds += time.perf_counter() - started
        return measured, total


@partial(jax.jit, static_argnames="k")
def _report(
    atoms: PreparedAtoms,
    partner: jax.Array | None,
    spaces: Spaces,
    bits: jax.Array,
    weight: jax.Array,
    *,
    k: int,
) -> tuple[metrics.BatchReport, jax.Array]:
    x = bfloat16_rows(bits[:, : atoms.d])
    z = normalize(spaces.site, x)
    codes = gradient_pursuit(z, atoms, k).codes
    y_hat = decode(codes, atoms.unit if partner is None else partner)
    raw, own = x, z
    if partner is not None:
        raw = bfloat16_rows(bits[:, atoms.d :])
        own = normalize(spaces.out, raw)
    values = jnp.zeros(atoms.m).at[codes.indices].add(codes.values * weight[:, None])
    out = spaces.out
    report = metrics.BatchReport(
        metrics.batch_sums(raw, denormalize(out, y_hat), weight, out.mean),
        metrics.batch_sums(own, y_hat, weight, jnp.zeros_like(out.mean)),
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
    out, target = normalization, settings.get("target") or ""
    if target:
        out = load_normalization(run / runs.TARGET_NORMALIZATION)
    atoms, finished = _read_atoms(run, len(normalization.mean))
    if not len(atoms.atoms):
        raise ValueError(f"{run}: expected at least one atom, found none; lower --threshold")
    summary = runs.read_json(run / runs.SUMMARY) if (run / runs.SUMMARY).is_file() else {}
    typical = atoms.typical if atoms.typical is not None else np.zeros(len(atoms.atoms), np.float32)
    site = settings["site"]
    card = {
        "site": site,
        **({"target": target} if target else {}),
        "stream": stream_of(site),
        "model": description.get("model"),
        "store_fingerprint": description["store"]["fingerprint"],
        "normalization": {"kind": normalization.kind, "rows": normalization.rows, "folded": False},
        "threshold": summary.get("threshold", settings["threshold"] or None),
        "sources": _sources(run, description, atoms.source, site),
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
        atoms.atoms if atoms.partner is None else atoms.partner,
        bias=out.mean.astype(f32) if target else None,
        encoder=atoms.atoms if target else None,
        mean=normalization.mean.astype(f32),
        transform=normalization.transform.astype(f32),
        inverse=out.inverse.astype(f32),
        typical=typical,
        source=atoms.source,
        card=card,
    )


def _read_atoms(run: Path, d: int) -> tuple[Atoms, bool]:
    """The finished atoms, or those of the newest checkpoint; whether they are finished."""
    if (run / ATOMS).is_file():
        return Atoms(**load_file(run / ATOMS)), True
    if not (run / FOLDER).is_dir():  # opening them would make the folder
        raise FileNotFoundError(_NEITHER.format(run=run))
    with Checkpoints(run) as checkpoints:
        if checkpoints.latest is None:
            raise FileNotFoundError(_NEITHER.format(run=run))
        arrays, facts = stored(checkpoints, d)
    m, partner = facts["m"], arrays.get("partner")
    return Atoms(
        np.array(arrays["unit"][:m]),
        np.array(arrays["source"][:m]),
        partner=None if partner is None else np.array(partner[:m]),
    ), False


def _sources(
    run: Path, description: dict[str, Any], source: np.ndarray, site: str
) -> dict[str, Any]:
    """Labels as the finished run kept them; of an unfinished run, from its store if it is still there."""
    if (run / SOURCES).is_file() and (run / ATOMS).is_file():
        return runs.read_json(run / SOURCES)
    columns: dict[str, Any] = {"columns": list(COLUMNS), "prompts": {}}
    try:
        store = open_store(description["store"]["path"])
    except ValueError:
        return {**columns, "note": "the store was not there at export"}
    if store.fingerprint != description["store"]["fingerprint"]:
        return {**columns, "note": "the store had changed at export"}
    return sources(store, site, source)
