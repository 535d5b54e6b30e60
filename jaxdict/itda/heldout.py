"""How well an ITDA dictionary that is being built rebuilds held-out rows."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from harvest.store import Store
from jaxdict.codes import decode
from jaxdict.itda.build import Build, Normalizers
from jaxdict.itda.config import TrainITDAConfig
from jaxdict.itda.growing_atoms import GrowingAtoms
from jaxdict.metrics import BatchReport, Measurement, batch_sums, fired, measure_blocks
from jaxdict.pursuit import gradient_pursuit
from jaxdict.rows import (
    Source,
    bfloat16_rows,
    denormalize,
    normalize,
    side_by_side,
    source_of,
)

_BATCH = 2048


class Evaluator:
    """Measures atoms on held-out rows, and their typical activations on training rows; changes nothing."""

    def __init__(
        self, config: TrainITDAConfig, store: Store, source: Source, normalizers: Normalizers
    ) -> None:
        """Choose the rows; nothing is read yet."""
        self._normalizers, self._k, self._target = normalizers, config.k, config.target
        self.seconds = 0.0  # spent measuring
        self._train = source.spread(config.eval_rows)
        self._held: Source | None = None
        if len(store.indices("validation")):
            taken = {"steps": config.steps, "padding": config.padding}
            held = source_of(store, config.site, split="validation", **taken)
            self._held = held.spread(config.eval_rows)

    @property
    def training_rows(self) -> int:
        """Number of rows that `typical` is measured on."""
        return self._train.rows

    def heldout(self, build: Build) -> dict[str, Any] | None:
        """Held-out numbers (see `jaxdict.metrics.fidelity.Measurement.summary`); None without such rows."""
        if self._held is None or not build.m:
            return None
        return self._measure(self._held, build)[0].summary()

    def typical(self, build: Build) -> np.ndarray:
        """Mean value of each atom over the training rows on which it is active: [m], 0 if none."""
        if not build.m:
            return np.zeros(0, np.float32)
        measured, total = self._measure(self._train, build)
        times = measured.fired
        return np.where(times > 0, total / np.maximum(times, 1), 0).astype(np.float32)

    def _measure(self, source: Source, build: Build) -> tuple[Measurement, np.ndarray]:
        total = np.zeros(build.m)
        target = source.beside(self._target) if self._target else None

        def report(bits: np.ndarray, weight: np.ndarray) -> BatchReport:
            batch, values = _report(
                jnp.asarray(bits),
                jnp.asarray(weight),
                atoms=build.atoms,
                normalizers=self._normalizers,
                k=self._k,
            )
            nonlocal total
            total = total + np.asarray(values[: build.m], np.float64)
            return batch._replace(fired=batch.fired[: build.m])

        started = time.perf_counter()
        blocks = side_by_side(source.blocks(), target)
        measured = measure_blocks(blocks, source.denoising_steps, report, batch=_BATCH)
        self.seconds += time.perf_counter() - started
        return measured, total


@partial(jax.jit, static_argnames="k")
def _report(
    bits: jax.Array,
    weight: jax.Array,
    *,
    atoms: GrowingAtoms,
    normalizers: Normalizers,
    k: int,
) -> tuple[BatchReport, jax.Array]:
    x = bfloat16_rows(bits[:, : atoms.d])
    z = normalize(normalizers.site, x)
    codes = gradient_pursuit(z, atoms.prepared, k).codes
    y_hat = decode(codes, atoms.rebuilt)
    raw, own = x, z
    if atoms.target is not None:
        raw = bfloat16_rows(bits[:, atoms.d :])
        own = normalize(normalizers.out, raw)
    values = (
        jnp.zeros(atoms.capacity, jnp.float32).at[codes.indices].add(codes.values * weight[:, None])
    )
    out = normalizers.out
    report = BatchReport(
        batch_sums(raw, denormalize(out, y_hat), weight, out.mean),
        batch_sums(own, y_hat, weight, jnp.zeros_like(out.mean)),
        fired(codes, atoms.capacity, weight),
    )
    return report, values
