"""What a training step reads and writes: the state, a batch, the numbers of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxdict.rows import Normalizer
from jaxdict.sae import kinds, model
from jaxdict.sae.model import SAEParams
from jaxdict.sae.optimizer import optimizer
from jaxdict.sae.step_config import StepConfig


class TrainState(NamedTuple):
    """All that a checkpoint holds of the model.

    Attributes:
        params: the weights.
        optimizer: Optax's state.
        step: int32 [], optimizer steps taken.
        since_fired: int32 [m], rows seen since each feature was last active.
        ema: moving average of the weights, or None.
        threshold: float32 [], average of the smallest value that a batch kept; 0 where none is learned.
    """

    params: SAEParams
    optimizer: Any
    step: Int[Array, ""]
    since_fired: Int[Array, " m"]
    ema: SAEParams | None
    threshold: Float[Array, ""]

    def best(self, kind: str) -> SAEParams:
        """The weights to use: the average where there is one, unit atoms, the threshold of the kind."""
        learned = kinds.REGISTRY[kind]
        params = self.params if self.ema is None else model.unit_norm(self.ema)
        if learned.log_threshold:
            assert params.threshold is not None
            return params._replace(threshold=jnp.exp(params.threshold))
        if learned.batch_threshold:
            every = jnp.full(params.encoder_bias.shape, self.threshold)
            return params._replace(threshold=every)
        return params


class Batch(NamedTuple):
    """What a step is given.

    Attributes:
        bits: uint16 [n, d], bfloat16 bits of raw rows.
        normalizer: of the site.
        target_bits: uint16 [n, d_out], the rows that a transcoder predicts, or None.
        target_normalizer: normalization of the target's site, or None.
    """

    bits: Array
    normalizer: Normalizer
    target_bits: Array | None = None
    target_normalizer: Normalizer | None = None


class Metrics(NamedTuple):
    """Numbers of one step, scalars on the device.

    Attributes:
        loss: reconstruction loss of all active atoms, the batch's FVU in the normalized space.
        penalty: sparsity penalty as it was added to the loss.
        aux: AuxK loss, 0 while no feature is dead.
        l0: mean active atoms a row.
        full: share of rows all of whose slots are taken; of a kind without fixed slots they may be cut.
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
    """A state before the first step; no two of its arrays share memory, so it may be donated."""
    params = model.initial_params(key, m, mean=mean, out_mean=out_mean)
    return state_of(params, step_config)


def state_of(params: SAEParams, step_config: StepConfig, *, threshold: float = 1.0) -> TrainState:
    """The state before the first step, with weights to start from and jumprelu's first threshold."""
    if kinds.REGISTRY[step_config.kind].log_threshold:
        start = jnp.full(params.encoder_bias.shape, jnp.log(threshold), jnp.float32)
        params = params._replace(threshold=start)
    average = jax.tree.map(jnp.copy, params) if step_config.ema else None
    zero, none = jnp.zeros((), jnp.int32), jnp.zeros(params.encoder_bias.shape, jnp.int32)
    moments = optimizer(step_config).init(params)  # pyright: ignore[reportArgumentType]
    return TrainState(params, moments, zero, none, average, jnp.zeros(()))
