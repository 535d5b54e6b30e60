"""Training losses, each a share of a variance, so that the data's scale does not matter."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def reconstruction_loss(
    x: Float[Array, "n d"], x_hat: Float[Array, "n d"], *, variance: Float[Array, ""] | float
) -> Float[Array, ""]:
    """Squared error as a share of the training data's variance: mean_n ||x - x_hat||^2 / variance.

    Args:
        x: float32 [n, d], rows in the autoencoder's own (normalized) space.
        x_hat: float32 [n, d], their reconstructions.
        variance: total variance of the training rows, mean ||x - mean||^2; above 0.

    Returns:
        the batch's FVU against the variance of the whole training split (a constant, so that a batch
        of unusual rows counts for as much as it should).

    Source: Gao et al. 2024 (arXiv 2406.04093), who divide each row by its own norm.
    """
    return jnp.mean(jnp.sum(jnp.square(x - x_hat), axis=1)) / variance


def auxk_loss(
    residual: Float[Array, "n d"],
    residual_hat: Float[Array, "n d"],
    *,
    form: str = "residual",
    variance: Float[Array, ""] | float = 1.0,
    share: Float[Array, ""] | float = 1.0,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """How badly dead features rebuild the residual r = x - x_hat of the live ones.

        residual:  mean ||r - r_hat||^2 / mean ||r||^2
        variance:  share * mean ||r - r_hat||^2 / variance

    The residual is a constant here: only the features that rebuild it learn from this loss. A zero
    residual gives a loss of 0, not 0/0.

    Args:
        residual: float32 [n, d], x - x_hat of the live features.
        residual_hat: float32 [n, d], decoding of the dead features' largest activations, no bias.
        form: residual (the loss weighs the same throughout training) or variance (it fades with the residual,
            as the main loss does).
        variance: total variance of the training rows, for form variance.
        share: number of dead features as a share of the slots they may fill, at most 1, for form variance.
        axis_name: mesh axis that rows are split over, None for none.

    Returns:
        the loss; in form residual it is 1 if the dead features add nothing.

    Source: form residual Gao et al. 2024 (AuxK, weight 1/32), with a guard against 0/0 in place of theirs
    against NaN; form variance as in EleutherAI's sparsify.
    """
    residual = jax.lax.stop_gradient(residual)
    error = jnp.mean(jnp.sum(jnp.square(residual - residual_hat), axis=1))
    if form == "variance":
        return share * error / variance
    power = jnp.mean(jnp.sum(jnp.square(residual), axis=1))
    if axis_name is not None:
        power = jax.lax.pmean(power, axis_name)
    safe = jnp.where(power > 0, power, 1.0)
    return jnp.where(power > 0, error / safe, 0.0)
