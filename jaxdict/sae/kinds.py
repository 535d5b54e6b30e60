"""The kinds of sparse autoencoder: what each keeps of a row, and what it pays for.

Every kind encodes with one dense product, pre = encoder (z - bias) + encoder_bias, keeps at most
`slots` atoms of a row and decodes with those alone; they differ in which. All are used in the same way
once they are trained,

    e = TopK_slots(ReLU(pre) where pre > threshold),     z_hat = sum_j e_j atoms_j + bias

with a threshold that is 0 (topk, relu), one learned number (batchtopk, matryoshka) or learned for each
atom (jumprelu). A transcoder is any of them with rows of another site as its target and a bias of its own there.

A further kind is one more class here, in `REGISTRY`, and one more line in `jaxdict.dictionary.arrays.ENCODER_KINDS`:
what the settings leave open, and which of them it reads, are said by its class.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxdict.codes import Codes, sort_slots
from jaxdict.sae import losses, model
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.sae.model import SAEParams
from jaxdict.sae.step_config import SINGLE_DEVICE, Execution, Hyperparams, StepConfig
from jaxdict.sae.straight_through import jump, step


class Active(NamedTuple):
    """What a batch activates while training.

    Attributes:
        codes: [n, slots], differentiable; a slot of value 0 is empty.
        aux_codes: [n, k_aux] of dead features, or None.
        penalty: scalar added to the loss, 0 for none.
        threshold: scalar, the smallest value that was kept of the batch; 0 where none is learned.
    """

    codes: Codes
    aux_codes: Codes | None
    penalty: Array
    threshold: Array


class SAE(nnx.Module):
    """A trained autoencoder of any kind as a Flax module: holds arrays, leaves the mathematics to functions."""

    name: ClassVar[str] = ""
    batch_threshold: ClassVar[bool] = False
    """Whether one inference threshold is followed while training."""
    log_threshold: ClassVar[bool] = False
    """Whether every atom learns a threshold; the training weights hold its logarithm."""
    fixed_slots: ClassVar[bool] = False
    """Whether a row has at most k active atoms."""
    slots_per_k: ClassVar[int] = 4
    """Slots of a row in units of k, where neither they are fixed nor the settings say."""
    sparsity: ClassVar[float] = 0.0
    """Weight of the sparsity penalty where the settings leave it open; 0 for a kind without one."""

    def __init__(self, params: SAEParams, k: int) -> None:
        """Wrap weights that are ready to use.

        Args:
            params: arrays, see `SAEParams`.
            k: slots of a row.
        """
        self.arrays = nnx.Dict(
            {name: nnx.Param(leaf) for name, leaf in params._asdict().items() if leaf is not None}
        )
        self.k = k

    @property
    def params(self) -> SAEParams:
        """The arrays as a plain tuple."""
        return SAEParams(**{name: leaf[...] for name, leaf in self.arrays.items()})  # pyright: ignore

    def encode(self, x: Float[Array, "n d"]) -> Codes:
        """Codes of rows, empty slots as (0, 0.0)."""
        return encode(self.params, x, self.k)

    def decode(self, codes: Codes) -> Float[Array, "n d"]:
        """Rows rebuilt from codes."""
        return decode(self.params, codes)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d"]:
        """x_hat of rows."""
        return self.decode(self.encode(x))

    @classmethod
    def slots(cls, k: int, m: int, *, asked: int = 0) -> int:
        """Slots of a row while training.

        Args:
            k: active atoms a row.
            m: atoms.
            asked: what the settings say, 0 for nothing.
        """
        return k if cls.fixed_slots else min(m, asked or cls.slots_per_k * k)

    @classmethod
    def prefixes(cls, m: int) -> tuple[int, ...]:
        """Sizes of the nested dictionaries, ascending, the last one m; none where there is but one."""
        return ()

    @classmethod
    def own_settings(cls, config: TrainSAEConfig) -> dict[str, Any]:
        """Fields of `StepConfig` that only some kinds read; the recipes of the others do not differ in them."""
        return {}

    @classmethod
    @abstractmethod
    def active(
        cls,
        params: SAEParams,
        z: Float[Array, "n d"],
        step_config: StepConfig,
        hyperparams: Hyperparams,
        *,
        dead: Bool[Array, " m"] | None = None,
        k_aux: int = 0,
    ) -> Active:
        """What a batch activates while training.

        Args:
            params: the weights.
            z: normalized rows.
            step_config: fixed numbers.
            hyperparams: further numbers; `sparsity` is what a penalty is to weigh now.
            dead: bool [m], features of the AuxK codes; None where k_aux is 0.
            k_aux: slots of the AuxK codes.
        """

    @classmethod
    def error(
        cls,
        params: SAEParams,
        codes: Codes,
        y: Array,
        step_config: StepConfig,
        hyperparams: Hyperparams,
    ) -> tuple[Array, Array]:
        """The reconstruction loss that is learned from, and y_hat of all active atoms."""
        y_hat = decode(params, codes, execution=step_config.execution)
        return losses.reconstruction_loss(y, y_hat, variance=hyperparams.variance), y_hat


class TopK(SAE):
    """The k largest of each row.

        e = TopK_k(ReLU(pre)),    loss = FVU + aux AuxK

    Source: Gao et al. 2024 (arXiv 2406.04093). Differs: the loss is a share of the whole training
    split's variance, not of each batch's.
    """

    name = "topk"
    fixed_slots = True

    @classmethod
    def active(cls, params, z, step_config, hyperparams, *, dead=None, k_aux=0) -> Active:
        """See `SAE.active`."""
        codes, aux = model.encode(
            params, z, step_config.k, dead=dead, k_aux=k_aux, execution=step_config.execution
        )
        return Active(codes, aux, jnp.zeros(()), jnp.zeros(()))


class BatchTopK(SAE):
    """The n k largest of a batch of n rows: a row may have more atoms than another.

        e = ReLU(pre) where pre >= tau,  tau = the (n k)-th largest of the batch;   loss as topk

    The inference threshold is the average of tau over the batches, with the memory of the last
    thousand.
    Source: Bussmann et al. 2024 (arXiv 2412.06410). Differs: a row has at most `slots` active atoms.
    """

    name = "batchtopk"
    batch_threshold = True
    slots_per_k = 2

    @classmethod
    def active(cls, params, z, step_config, hyperparams, *, dead=None, k_aux=0) -> Active:
        """See `SAE.active`."""
        codes, aux = model.encode(
            params, z, step_config.slots, dead=dead, k_aux=k_aux, execution=step_config.execution
        )
        values, n = jax.lax.stop_gradient(codes.values), z.shape[0]
        if step_config.execution.data is not None:
            values = jax.lax.all_gather(values, step_config.execution.data, axis=0, tiled=True)
            n = values.shape[0]
        # The least of them, not the last: XLA takes a slice of a top-k for a sort of everything.
        tau = jnp.min(jax.lax.top_k(values.reshape(-1), n * step_config.k)[0])
        kept = jnp.where(codes.values >= tau, codes.values, 0.0)
        return Active(Codes(codes.indices, kept), aux, jnp.zeros(()), tau)


class Matryoshka(BatchTopK):
    """Nested dictionaries: the first atoms alone must rebuild a row too, as well as they can.

        e as batchtopk;    loss = mean over prefixes p of FVU(sum_{j < p} e_j atoms_j + bias) + aux AuxK

    Source: Bussmann et al. 2025 (arXiv 2503.17547). Differs: prefixes double (m/16, m/8, ..., m) instead of being
    drawn at random, all weigh the same, and AuxK looks at the residual of the whole.
    """

    name = "matryoshka"

    @classmethod
    def prefixes(cls, m: int) -> tuple[int, ...]:
        """See `SAE.prefixes`."""
        return tuple(sorted({max(1, m >> shift) for shift in range(5)}))

    @classmethod
    def error(cls, params, codes, y, step_config, hyperparams) -> tuple[Array, Array]:
        """See `SAE.error`."""
        bias = params.bias if params.out_bias is None else params.out_bias
        y_hat, total, low = jnp.broadcast_to(bias, y.shape), jnp.zeros(()), 0
        for high in step_config.prefixes:
            inside = (codes.indices >= low) & (codes.indices < high)
            part = Codes(codes.indices, jnp.where(inside, codes.values, 0.0))
            y_hat = y_hat + model.decode(part, params.atoms, None, execution=step_config.execution)
            total = total + losses.reconstruction_loss(y, y_hat, variance=hyperparams.variance)
            low = high
        return total / len(step_config.prefixes), y_hat


class JumpReLU(SAE):
    """Each atom has a threshold of its own, which learns through straight-through estimators.

        e = ReLU(pre) where pre > theta,    loss = FVU + sparsity * penalty
        penalty "l0":      mean L0 / k
        penalty "target":  (mean L0 / k - 1)^2
        penalty "tanh":    mean over rows of sum_j tanh(e_j / theta_j) / k

    dH(pre - theta)/dtheta = -K((pre - theta) / bandwidth) / bandwidth with the rectangle K, the
    bandwidth being a share of each threshold; the logarithm of theta is what learns, from a start that leaves
    about k atoms of a row active.
    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), tanh after Conerly et al. 2025 (Anthropic).
    Differs: the bandwidth is relative; a row has at most `slots` active atoms, the largest; tanh
    is taken of e_j over its threshold, which needs no scale.
    """

    name = "jumprelu"
    log_threshold = True
    sparsity = 0.3

    @classmethod
    def own_settings(cls, config: TrainSAEConfig) -> dict[str, Any]:
        """See `SAE.own_settings`."""
        return {"penalty": config.penalty, "bandwidth": config.bandwidth}

    @classmethod
    def active(cls, params, z, step_config, hyperparams, *, dead=None, k_aux=0) -> Active:
        """See `SAE.active`."""
        assert params.threshold is not None
        floor = jax.lax.stop_gradient(jnp.exp(params.threshold)) * (1 - step_config.bandwidth / 2)
        execution = step_config.execution
        codes, aux = model.encode(
            params, z, step_config.slots, dead=dead, k_aux=k_aux, floor=floor, execution=execution
        )
        log_theta = model.at_slots(params.threshold, codes.indices, execution)
        values: Any = jump(step_config.bandwidth, codes.values, log_theta)
        if step_config.penalty == "tanh":
            squashed = jnp.tanh(values * jnp.exp(-jax.lax.stop_gradient(log_theta)))
            penalty = _mean_sum(squashed) / step_config.k
        else:
            counted: Any = step(step_config.bandwidth, codes.values, log_theta)
            over = _mean_sum(counted) / step_config.k
            penalty = over
            if step_config.penalty == "target":
                mean = jax.lax.stop_gradient(over)
                if execution.data is not None:
                    mean = jax.lax.pmean(mean, execution.data)
                # The same value and slope as (over - 1)^2, linear in this device's rows.
                penalty = jnp.square(mean - 1) + 2 * (mean - 1) * (
                    over - jax.lax.stop_gradient(over)
                )
        return Active(
            Codes(codes.indices, values), aux, hyperparams.sparsity * penalty, jnp.zeros(())
        )


class ReLU(SAE):
    """The classic: whatever is positive, with an L1 penalty that shrinks it.

        e = ReLU(pre),    loss = FVU + sparsity * mean over rows of sum_j e_j / sqrt(k variance)

    Source: Bricken et al. 2023 (Towards Monosemanticity), unit-norm atoms. Differs: a row has at most `slots`
    active atoms, the largest; the penalty is divided so that its weight hardly depends on the site.
    """

    name = "relu"
    sparsity = 1.0

    @classmethod
    def active(cls, params, z, step_config, hyperparams, *, dead=None, k_aux=0) -> Active:
        """See `SAE.active`."""
        codes, aux = model.encode(
            params, z, step_config.slots, dead=dead, k_aux=k_aux, execution=step_config.execution
        )
        l1 = _mean_sum(codes.values) / jnp.sqrt(step_config.k * hyperparams.variance)
        return Active(codes, aux, hyperparams.sparsity * l1, jnp.zeros(()))


REGISTRY: dict[str, type[SAE]] = {
    kind.name: kind for kind in (TopK, BatchTopK, JumpReLU, Matryoshka, ReLU)
}


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
