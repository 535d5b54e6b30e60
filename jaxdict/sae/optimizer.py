"""Adam, and the schedule of its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxdict.sae.step_config import ScheduleConfig, StepConfig


def learning_rate_schedule(config: ScheduleConfig) -> Callable[[Any], Array]:
    """The learning rate as a share of its peak, a function of the step (from 0).

    Linear warm-up, flat, then linear decay to 0; and once more a warm-up in a run that goes on after its rate had
    begun to decay. The peak is not in it, because it may differ between the members of a sweep that share one
    compiled step.
    """

    def schedule(step: Any) -> Array:
        warmup = (step + 1) / max(1, config.warmup)
        decay = (config.steps - step) / (config.decay * config.steps) if config.decay > 0 else 1.0
        share = jnp.clip(jnp.minimum(warmup, decay), 0.0, 1.0)
        if config.share < 1:
            again = (step + 1 - config.since) / max(1, config.warmup)
            share = share * jnp.minimum(config.share + (1 - config.share) * again, 1.0)
        return share

    return schedule


def optimizer(step_config: StepConfig) -> optax.GradientTransformation:
    """Adam before the learning rate; the training step clips the gradient first and applies the rate last."""
    adam = step_config.adam
    return optax.scale_by_adam(adam.b1, adam.b2, adam.eps)
