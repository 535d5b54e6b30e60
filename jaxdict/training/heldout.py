"""Held-out rows of a run and how weights are measured on them; nothing here changes a number of the training."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax

from harvest.store import Store
from jaxdict.metrics import BatchReport, batch_sums, fired, measure_blocks
from jaxdict.rows import (
    Block,
    Normalizer,
    bfloat16_rows,
    denormalize,
    normalize,
    side_by_side,
    source_of,
    to_device,
)
from jaxdict.sae import SAEParams, TrainSAEConfig, kinds
from jaxdict.training.batches import Normalizations
from jaxdict.training.sweep import BatchKey, Group


class HeldOut:
    """Rows of the validation split at a site, and at its target's."""

    def __init__(
        self, config: TrainSAEConfig, store: Store, normalizations: Normalizations
    ) -> None:
        """Read the rows, once."""
        self._blocks: list[Block] = []
        self._normalizer, self._target = (
            None if one is None else to_device(one) for one in normalizations
        )
        if not len(store.indices("validation")):
            return
        taken = {"steps": config.data.steps, "padding": config.data.padding}
        source = source_of(store, config.site, split="validation", **taken)
        source = source.spread(config.run.eval_rows)
        target = source.beside(config.target) if config.target else None
        self._blocks = list(side_by_side(source.blocks(), target))
        self._steps, self._width = source.denoising_steps, source.d

    def summary(self, params: SAEParams, *, slots: int) -> dict[str, Any] | None:
        """Held-out numbers of some weights; None when the store has no validation images.

        Args:
            params: weights that are ready to use.
            slots: active atoms that a row may have.
        """
        if not self._blocks:
            return None
        report = partial(_report, params, self._normalizer, self._target, slots=slots)
        if self._target is None:
            return measure_blocks(self._blocks, self._steps, report).summary()
        d = self._width
        return measure_blocks(
            self._blocks,
            self._steps,
            lambda bits, weight: report(bits[:, :d], weight, bits[:, d:]),
        ).summary()

    def line(self, params: SAEParams, *, slots: int, step: int, rows: int) -> dict[str, Any]:
        """A line of metrics.jsonl, measured after optimizer step `step` and `rows` training rows."""
        found = self.summary(params, slots=slots)
        numbers = found or {"note": "the store has no validation images"}
        measured = {"measured_rows": numbers.pop("rows", 0), **numbers}
        return {"kind": "heldout", "step": step, "rows": rows, **measured}


def read_held_out(
    groups: list[Group], store: Store, normalizations: list[Normalizations]
) -> dict[BatchKey, HeldOut]:
    """Held-out rows for all groups, read once a site and normalization."""
    found: dict[BatchKey, HeldOut] = {}
    for group, fitted in zip(groups, normalizations, strict=True):
        if group.batch_key not in found:
            found[group.batch_key] = HeldOut(group.config, store, fitted)
    return found


@partial(jax.jit, static_argnames="slots")
def _report(
    params: SAEParams,
    normalizer: Normalizer,
    target: Normalizer | None,
    bits: jax.Array,
    weight: jax.Array,
    target_bits: jax.Array | None = None,
    *,
    slots: int,
) -> BatchReport:
    x = bfloat16_rows(bits)
    z = normalize(normalizer, x)
    codes = kinds.encode(params, z, slots)
    y_hat, y, raw, own = kinds.decode(params, codes), z, x, normalizer
    if target is not None:
        assert target_bits is not None
        raw, own = bfloat16_rows(target_bits), target
        y = normalize(target, raw)
    bias = params.bias if params.out_bias is None else params.out_bias
    return BatchReport(
        batch_sums(raw, denormalize(own, y_hat), weight, own.mean),
        batch_sums(y, y_hat, weight, bias),
        fired(codes, len(params.atoms), weight),
    )
