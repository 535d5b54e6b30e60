"""Adam, and the schedule of its learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxdict.sae.step_config import ScheduleConfig, StepConfig


def schedule(rate: ScheduleConfig) -> Callable[[Any], Array]:
    """Share of the peak learning rate at a step (from 0): linear warm-up, flat, then linear to 0."""

    def at(step: Any) -> Array:
        up = (step + 1) / max(1, rate.warmup)
        down = (rate.steps - step) / (rate.decay * rate.steps) if rate.decay > 0 else 1.0
        return jnp.clip(jnp.minimum(up, down), 0.0, 1.0)

    return at


def optimizer(step_config: StepConfig) -> optax.GradientTransformation:
    """Adam's direction; the clip comes before it and the learning rate after it, in the step."""
    adam = step_config.adam
    return optax.scale_by_adam(adam.b1, adam.b2, adam.eps)
