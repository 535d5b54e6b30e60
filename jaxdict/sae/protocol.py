"""What a kind of autoencoder must say: the protocol that the classes of `jaxdict.sae.kinds` satisfy."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float

from jaxdict.codes import Codes
from jaxdict.sae.config import TrainSAEConfig
from jaxdict.sae.model import SAEParams
from jaxdict.sae.step_config import Hyperparams, StepConfig


class Active(NamedTuple):
    """What a batch activates while training.

    Attributes:
        codes: [n, slots], differentiable; a slot of value 0 is empty.
        aux_codes: [n, k_aux] of dead features, or None.
        penalty: scalar added to the loss, 0 for none.
        threshold: scalar, the smallest value of the batch that was kept; 0 for a kind without such a threshold.
    """

    codes: Codes
    aux_codes: Codes | None
    penalty: Array
    threshold: Array


class Kind(Protocol):
    """What the training step and the settings ask of a kind; its class is used as it is, never made.

    Attributes:
        fixed_slots: whether a row has at most k active atoms, while training as afterwards.
        slots_per_k: slots of a row in units of k, unless they are fixed or the settings say.
        sparsity: weight of the sparsity penalty if the settings leave it open; 0 for a kind without one.
    """

    fixed_slots: bool
    slots_per_k: int
    sparsity: float

    @staticmethod
    def prefixes(m: int) -> tuple[int, ...]:
        """Sizes of the nested dictionaries of m atoms, ascending, the last one m; () if there is only one."""
        ...

    @staticmethod
    def own_settings(config: TrainSAEConfig) -> dict[str, Any]:
        """Fields of `StepConfig` that only some kinds read; others share a compiled step whatever these say."""
        ...

    @staticmethod
    def active(
        params: SAEParams,
        z: Float[Array, "n d"],
        step_config: StepConfig,
        hyperparams: Hyperparams,
        *,
        dead: Bool[Array, " m"] | None = None,
    ) -> Active:
        """What a batch activates while training.

        Args:
            params: the weights.
            z: normalized rows.
            step_config: fixed numbers.
            hyperparams: further numbers; `sparsity` is the weight of the penalty at this step.
            dead: bool [m], the features that AuxK codes may use; None for no such codes.
        """
        ...

    @staticmethod
    def error(
        params: SAEParams,
        codes: Codes,
        targets: Float[Array, "n d_out"],
        step_config: StepConfig,
        hyperparams: Hyperparams,
    ) -> tuple[Array, Array]:
        """The reconstruction loss that is minimized, and the rows rebuilt by all active atoms."""
        ...
