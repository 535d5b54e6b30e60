"""The kinds of sparse autoencoder: what each keeps of a row, and what it pays for.

Every kind encodes with one dense product, pre = encoder (z - bias) + encoder_bias, keeps at most
`slots` atoms of a row and decodes with those alone; they differ in which. All are used in the same way
once they are trained,

    e = TopK_slots(ReLU(pre) where pre > threshold),     z_hat = sum_j e_j atoms_j + bias

with a threshold that is 0 (topk, relu), one learned number (batchtopk, matryoshka) or learned for each
atom (jumprelu). A transcoder is any of them with rows of another site as its target and a bias of its own there.

A further kind is one more class here, which satisfies `Kind` and stands in `REGISTRY`, and one more line in
`jaxdict.dictionary.ENCODER_KINDS`, which says what threshold it has. Its class says what the settings leave open and
which of them it reads.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxdict.codes import Codes, sort_slots
from jaxdict.sae import losses, model
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.sae.model import SAEParams
from jaxdict.sae.protocol import Active, Kind
from jaxdict.sae.step_config import SINGLE_DEVICE, Execution, Hyperparams, StepConfig
from jaxdict.sae.straight_through import heaviside, jumprelu


def one_dictionary(m: int) -> tuple[int, ...]:
    """The `prefixes` of a kind whose atoms are all used together."""
    return ()


def no_settings(config: TrainSAEConfig) -> dict[str, Any]:
    """The `own_settings` of a kind that reads none."""
    return {}


def whole_error(
    params: SAEParams,
    codes: Codes,
    targets: Float[Array, "n d_out"],
    step_config: StepConfig,
    hyperparams: Hyperparams,
) -> tuple[Array, Array]:
    """The `error` of a kind that rebuilds rows with all active atoms at once."""
    y_hat = decode(params, codes, execution=step_config.execution)
    return losses.reconstruction_loss(targets, y_hat, variance=hyperparams.variance), y_hat


def largest(
    params: SAEParams,
    z: Float[Array, "n d"],
    k: int,
    step_config: StepConfig,
    *,
    dead: Bool[Array, " m"] | None = None,
    floor: Float[Array, " m"] | None = None,
) -> tuple[Codes, Codes | None]:
    """The k largest activations of each row above a floor, and the AuxK codes if there are dead features."""
    return model.encode(
        params,
        z,
        k,
        dead=dead,
        k_aux=0 if dead is None else step_config.k_aux,
        floor=floor,
        execution=step_config.execution,
    )


def largest_of_batch(
    params: SAEParams,
    z: Float[Array, "n d"],
    step_config: StepConfig,
    *,
    dead: Bool[Array, " m"] | None = None,
) -> Active:
    """The n k largest activations of the batch, at most `slots` of a row, and the smallest of them."""
    codes, aux = largest(params, z, step_config.slots, step_config, dead=dead)
    values, n = jax.lax.stop_gradient(codes.values), z.shape[0]
    if step_config.execution.data is not None:
        values = jax.lax.all_gather(values, step_config.execution.data, axis=0, tiled=True)
        n = values.shape[0]
    # Not by an index: XLA takes a slice of a top-k for a sort of everything.
    tau = jnp.min(jax.lax.top_k(values.reshape(-1), n * step_config.k)[0])
    kept = jnp.where(codes.values >= tau, codes.values, 0.0)
    return Active(Codes(codes.indices, kept), aux, jnp.zeros((), jnp.float32), tau)


class TopK:
    """The k largest of each row.

        e = TopK_k(ReLU(pre)),    loss = FVU + aux AuxK

    Source: Gao et al. 2024 (arXiv 2406.04093). Differs: the loss is a share of the whole training
    split's variance, not of each batch's.
    """

    fixed_slots = True
    slots_per_k = 1
    sparsity = 0.0
    prefixes = staticmethod(one_dictionary)
    own_settings = staticmethod(no_settings)
    error = staticmethod(whole_error)

    @staticmethod
    def active(params, z, step_config, hyperparams, *, dead=None) -> Active:
        """See `Kind.active`."""
        codes, aux = largest(params, z, step_config.k, step_config, dead=dead)
        return Active(codes, aux, jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


class BatchTopK:
    """The n k largest of a batch of n rows: a row may have more atoms than another.

        e = ReLU(pre) where pre >= tau,  tau = the (n k)-th largest of the batch;   loss as topk

    The inference threshold is the average of tau over the last thousand batches or so.
    Source: Bussmann et al. 2024 (arXiv 2412.06410). Differs: a row has at most `slots` active atoms.
    """

    fixed_slots = False
    slots_per_k = 2
    sparsity = 0.0
    prefixes = staticmethod(one_dictionary)
    own_settings = staticmethod(no_settings)
    error = staticmethod(whole_error)

    @staticmethod
    def active(params, z, step_config, hyperparams, *, dead=None) -> Active:
        """See `Kind.active`."""
        return largest_of_batch(params, z, step_config, dead=dead)


class Matryoshka:
    """Nested dictionaries: the first atoms alone must rebuild a row too, as well as they can.

        e as batchtopk;    loss = mean over prefixes p of FVU(sum_{j < p} e_j atoms_j + bias) + aux AuxK

    Source: Bussmann et al. 2025 (arXiv 2503.17547). Differs: prefixes double (m/16, m/8, ..., m) instead of being
    drawn at random, all have the same weight, and AuxK looks at the residual of the whole.
    """

    fixed_slots = False
    slots_per_k = 2
    sparsity = 0.0
    own_settings = staticmethod(no_settings)

    @staticmethod
    def prefixes(m: int) -> tuple[int, ...]:
        """See `Kind.prefixes`."""
        return tuple(sorted({max(1, m >> shift) for shift in range(5)}))

    @staticmethod
    def active(params, z, step_config, hyperparams, *, dead=None) -> Active:
        """See `Kind.active`."""
        return largest_of_batch(params, z, step_config, dead=dead)

    @staticmethod
    def error(params, codes, targets, step_config, hyperparams) -> tuple[Array, Array]:
        """See `Kind.error`."""
        bias = params.bias if params.out_bias is None else params.out_bias
        y_hat, total, low = jnp.broadcast_to(bias, targets.shape), jnp.zeros((), jnp.float32), 0
        for high in step_config.prefixes:
            inside = (codes.indices >= low) & (codes.indices < high)
            part = Codes(codes.indices, jnp.where(inside, codes.values, 0.0))
            y_hat = y_hat + model.decode(part, params.atoms, None, execution=step_config.execution)
            total = total + losses.reconstruction_loss(
                targets, y_hat, variance=hyperparams.variance
            )
            low = high
        return total / len(step_config.prefixes), y_hat


class JumpReLU:
    """Each atom has a threshold of its own, which learns through straight-through estimators.

        e = ReLU(pre) where pre > theta,    loss = FVU + sparsity * penalty
        penalty "l0":      mean L0 / k
        penalty "target":  (mean L0 / k - 1)^2
        penalty "tanh":    mean over rows of sum_j tanh(e_j / theta_j) / k

    dH(pre - theta)/dtheta = -K((pre - theta) / bandwidth) / bandwidth with the rectangle K, the
    bandwidth being a share of each threshold; the logarithm of theta is learned, from a start that leaves
    about k atoms of a row active.
    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), tanh after Conerly et al. 2025 (Anthropic).
    Differs: the bandwidth is relative; a row has at most `slots` active atoms, the largest; tanh
    is taken of e_j over its threshold, which needs no scale.
    """

    fixed_slots = False
    slots_per_k = 4
    sparsity = 0.3
    prefixes = staticmethod(one_dictionary)
    error = staticmethod(whole_error)

    @staticmethod
    def own_settings(config: TrainSAEConfig) -> dict[str, Any]:
        """See `Kind.own_settings`."""
        penalty = config.sparsity_penalty
        return {"penalty": penalty.penalty, "bandwidth": penalty.bandwidth}

    @staticmethod
    def active(params, z, step_config, hyperparams, *, dead=None) -> Active:
        """See `Kind.active`."""
        assert params.threshold is not None
        width, execution = step_config.bandwidth, step_config.execution
        # Values half a bandwidth below a threshold teach it too.
        floor = jax.lax.stop_gradient(jnp.exp(params.threshold)) * (1 - width / 2)
        codes, aux = largest(params, z, step_config.slots, step_config, dead=dead, floor=floor)
        log_theta = model.at_slots(params.threshold, codes.indices, execution)
        values: Any = jumprelu(width, codes.values, log_theta)
        if step_config.penalty == "tanh":
            squashed = jnp.tanh(values * jnp.exp(-jax.lax.stop_gradient(log_theta)))
            penalty = _mean_sum(squashed) / step_config.k
        else:
            counted: Any = heaviside(width, codes.values, log_theta)
            over = _mean_sum(counted) / step_config.k
            penalty = over
            if step_config.penalty == "target":
                mean = jax.lax.stop_gradient(over)
                if execution.data is not None:
                    mean = jax.lax.pmean(mean, execution.data)
                # The same value and slope as (over - 1)^2, but linear in this device's rows.
                penalty = jnp.square(mean - 1) + 2 * (mean - 1) * (
                    over - jax.lax.stop_gradient(over)
                )
        return Active(
            Codes(codes.indices, values),
            aux,
            hyperparams.sparsity * penalty,
            jnp.zeros((), jnp.float32),
        )


class ReLU:
    """The classic: whatever is positive, with an L1 penalty that shrinks it.

        e = ReLU(pre),    loss = FVU + sparsity * mean over rows of sum_j e_j / sqrt(k variance)

    Source: Bricken et al. 2023 (Towards Monosemanticity), unit-norm atoms. Differs: a row has at most `slots`
    active atoms, the largest; the penalty is divided so that its weight hardly depends on the site.
    """

    fixed_slots = False
    slots_per_k = 4
    sparsity = 1.0
    prefixes = staticmethod(one_dictionary)
    own_settings = staticmethod(no_settings)
    error = staticmethod(whole_error)

    @staticmethod
    def active(params, z, step_config, hyperparams, *, dead=None) -> Active:
        """See `Kind.active`."""
        codes, aux = largest(params, z, step_config.slots, step_config, dead=dead)
        l1 = _mean_sum(codes.values) / jnp.sqrt(step_config.k * hyperparams.variance)
        return Active(codes, aux, hyperparams.sparsity * l1, jnp.zeros((), jnp.float32))


REGISTRY: dict[str, type[Kind]] = {
    "topk": TopK,
    "batchtopk": BatchTopK,
    "jumprelu": JumpReLU,
    "matryoshka": Matryoshka,
    "relu": ReLU,
}


def slots_of(kind: str, k: int, m: int, *, asked: int = 0) -> int:
    """Slots of a row while training.

    Args:
        kind: of autoencoder.
        k: active atoms a row.
        m: atoms.
        asked: what the settings say, 0 for nothing.
    """
    known = REGISTRY[kind]
    return k if known.fixed_slots else min(m, asked or known.slots_per_k * k)


def encode(
    params: SAEParams, x: Float[Array, "n d"], k: int, *, execution: Execution = SINGLE_DEVICE
) -> Codes:
    """Codes of normalized rows by trained weights of any kind, sorted; empty slots as (0, 0.0).

    Args:
        params: weights that are ready to use, `TrainState.best`.
        x: float32 [n, d].
        k: slots of a row.
        execution: precision, exactness.
    """
    codes, _ = model.encode(params, x, k, floor=params.threshold, execution=execution)
    return sort_slots(codes.indices, codes.values)


def decode(
    params: SAEParams, codes: Codes, *, execution: Execution = SINGLE_DEVICE
) -> Float[Array, "n d_out"]:
    """Rows rebuilt from codes; a transcoder adds its own bias."""
    bias = params.bias if params.out_bias is None else params.out_bias
    return model.decode(codes, params.atoms, bias, execution=execution)


def _mean_sum(values: Float[Array, "n k"]) -> Array:
    return jnp.mean(jnp.sum(values, axis=1))
