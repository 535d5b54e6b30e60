"""Held-out rows of a run and how weights are measured on them; nothing here changes a number of the training."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import jax
import numpy as np

from harvest.store import Store
from jaxdict.metrics import BatchReport, batch_sums, fired, measure_blocks
from jaxdict.rows import Normalizer, bfloat16_rows, denormalize, normalize, source_of
from jaxdict.sae import SAEParams, kinds
from jaxdict.training.sweep import Member

Block = tuple[np.ndarray, np.ndarray]


class HeldOut:
    """Rows of the validation split at a member's site, and at its target's."""

    def __init__(
        self, member: Member, store: Store, normalizer: Normalizer, target: Normalizer | None
    ) -> None:
        """Read the rows, once."""
        config = member.config
        self.blocks: list[Block] = []
        self.targets: list[np.ndarray] | None = None
        self.steps: tuple[int, ...] = ()
        self._normalizer, self._target, self._slots = normalizer, target, member.plan.slots
        if not len(store.indices("validation")):
            return
        source = source_of(store, config.site, split="validation", steps=config.steps)
        source = source.spread(config.eval_rows)
        self.blocks, self.steps = list(source.blocks()), source.steps
        if target is not None:
            other = source.beside(config.target)
            self.targets = [other.read(images) for images, _ in self.blocks]

    def of(self, member: Member) -> HeldOut:
        """The same rows for a member of the same site and normalization, not read again."""
        other = copy.copy(self)
        other._slots = member.plan.slots
        return other

    def summary(self, params: SAEParams) -> dict[str, Any] | None:
        """Held-out numbers of some weights; None when the store has no validation images."""
        if not self.blocks:
            return None
        report = partial(_report, params, self._normalizer, self._target, slots=self._slots)
        if self.targets is None:
            return measure_blocks(self.blocks, self.steps, report).summary()
        # A row and its target side by side: what is measured goes batch by batch.
        width = self.blocks[0][1].shape[-1]
        joined = [
            (images, np.concatenate([bits, other], axis=-1))
            for (images, bits), other in zip(self.blocks, self.targets, strict=True)
        ]
        return measure_blocks(
            joined,
            self.steps,
            lambda bits, weight: report(bits[:, :width], weight, bits[:, width:]),
        ).summary()

    def line(self, params: SAEParams, step: int, rows: int) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        numbers = self.summary(params) or {"note": "the store has no validation images"}
        measured = {"measured_rows": numbers.pop("rows", 0), **numbers}
        return {"kind": "heldout", "step": step, "rows": rows, **measured}


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
