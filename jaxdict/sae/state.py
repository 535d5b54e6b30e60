"""What a training step reads and writes: the state, a batch, metrics."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from jaxdict.dictionary import ENCODER_KINDS
from jaxdict.rows import Normalizer, bfloat16_rows, normalize
from jaxdict.sae import model
from jaxdict.sae.model import SAEParams
from jaxdict.sae.optimizer import optimizer
from jaxdict.sae.step_config import StepConfig


class TrainState(NamedTuple):
    """What is learned or counted, and so what a checkpoint holds.

    Attributes:
        params: the weights.
        optimizer: Optax's state.
        step: int32 [], optimizer steps taken.
        since_fired: int32 [m], rows seen since each feature was last active.
        ema: moving average of the weights, or None.
        threshold: float32 [], average over batches of the smallest value kept; 0 for a kind without one.
    """

    params: SAEParams
    optimizer: Any
    step: Int[Array, ""]
    since_fired: Int[Array, " m"]
    ema: SAEParams | None
    threshold: Float[Array, ""]

    def best(self, kind: str) -> SAEParams:
        """The weights to use: averaged if the run averages, with unit atoms and the threshold of the kind."""
        threshold = ENCODER_KINDS[kind].threshold
        params = self.params if self.ema is None else model.unit_norm(self.ema)
        if threshold == "each":
            assert params.threshold is not None
            return params._replace(threshold=jnp.exp(params.threshold))
        if threshold == "one":
            every = jnp.full(params.encoder_bias.shape, self.threshold)
            return params._replace(threshold=every)
        return params

    def placed(self, split: Any, whole: Any) -> Any:
        """A tree of the same structure: `split` for each array whose first axis counts atoms, `whole` for the others.

        Weights, moments and averages know their own axes, so any optimizer will do whose state holds trees like
        the weights.
        """

        def of_node(node: Any) -> Any:
            if not isinstance(node, SAEParams):
                return whole
            return jax.tree.map(lambda atoms: split if atoms else whole, node.has_atom_axis())

        tree = jax.tree.map(of_node, self, is_leaf=lambda node: isinstance(node, SAEParams))
        return tree._replace(since_fired=split)


class NormalizedRows(NamedTuple):
    """Rows of a batch in the autoencoder's own space.

    Attributes:
        inputs: float32 [n, d].
        targets: float32 [n, d_out], what they are to be rebuilt as: the inputs, or a transcoder's target.
    """

    inputs: Float[Array, "n d"]
    targets: Float[Array, "n d_out"]


class Batch(NamedTuple):
    """The rows that a step learns from, as a store holds them.

    Attributes:
        bits: uint16 [n, d], bfloat16 bits of raw rows.
        normalizer: normalization of the site.
        target_bits: uint16 [n, d_out], the rows that a transcoder predicts, or None.
        target_normalizer: normalization of the target's site, or None.
    """

    bits: Array
    normalizer: Normalizer
    target_bits: Array | None = None
    target_normalizer: Normalizer | None = None

    def normalized(self) -> NormalizedRows:
        """The rows and their targets, normalized."""
        inputs = normalize(self.normalizer, bfloat16_rows(self.bits))
        if self.target_bits is None:
            return NormalizedRows(inputs, inputs)
        assert self.target_normalizer is not None
        return NormalizedRows(
            inputs, normalize(self.target_normalizer, bfloat16_rows(self.target_bits))
        )


class Metrics(NamedTuple):
    """Metrics of one step, scalars on the device.

    Attributes:
        loss: reconstruction loss of all active atoms, the batch's FVU in the normalized space.
        penalty: sparsity penalty, as added to the loss.
        aux: AuxK loss, 0 while no feature is dead.
        l0: mean active atoms a row.
        full: share of rows with no empty slot; unless the kind has fixed slots, these may have lost atoms.
        dead: share of features that have not fired for `dead_rows` rows.
        gradient: global norm of the gradient before clipping.
    """

    loss: Any
    penalty: Any
    aux: Any
    l0: Any
    full: Any
    dead: Any
    gradient: Any


def initial_state(
    key: Array, m: int, *, mean: Array, step_config: StepConfig, out_mean: Array | None = None
) -> TrainState:
    """The state before the first step, with random weights; no two arrays share memory, so it may be donated."""
    params = model.initial_params(key, m, mean=mean, out_mean=out_mean)
    return state_of(params, step_config)


def state_of(
    params: SAEParams, step_config: StepConfig, *, threshold: ArrayLike = 1.0
) -> TrainState:
    """The state before the first step, with the given weights; `threshold` is jumprelu's first, of all or [m]."""
    if ENCODER_KINDS[step_config.kind].threshold == "each":
        start = jnp.full(params.encoder_bias.shape, jnp.log(jnp.asarray(threshold, jnp.float32)))
        params = params._replace(threshold=start)
    average = jax.tree.map(jnp.copy, params) if step_config.ema else None
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros(params.encoder_bias.shape, jnp.int32)
    moments = optimizer(step_config).init(params)  # pyright: ignore[reportArgumentType]
    return TrainState(params, moments, zero, none, average, jnp.zeros((), jnp.float32))
