"""A sparse autoencoder as a Flax module: it holds the arrays, the mathematics is in functions beside it."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxdict.codes import Codes
from jaxdict.dictionary import ENCODER_KINDS, Dictionary
from jaxdict.rows import Normalizer, denormalize, normalize
from jaxdict.sae import kinds, model
from jaxdict.sae.model import SAEParams


class Frozen(nnx.Variable):
    """An array that is not trained."""


class SAE(nnx.Module):
    """A sparse autoencoder of any kind.

    Trained by hand it is an ordinary Flax module, and its state a tree for Optax and Orbax:

        sae = SAE(d=64, m=512, k=8, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(sae, optax.adam(1e-2), wrt=nnx.Param)

        @nnx.jit
        def train_step(sae, optimizer, x):
            loss, grads = nnx.value_and_grad(lambda sae: jnp.mean((sae(x) - x) ** 2))(sae)
            optimizer.update(sae, grads)
            sae.normalize_atoms()
            return loss

        losses = [train_step(sae, optimizer, x) for x in batches]

    Gradients reach the weights through the active atoms alone. A threshold gets none: batchtopk, matryoshka and
    jumprelu learn theirs in `jaxdict train sae`, whose step adds each kind's own loss (`jaxdict.sae.kinds`).
    A trained one comes from a dictionary (`SAE.from_dictionary`) or a run (`jaxdict.load_sae`).

    Attributes:
        kind: one of `jaxdict.dictionary.ENCODER_KINDS`.
        k: active atoms that a row may have.
        encoder: float32 [m, d].
        encoder_bias: float32 [m].
        atoms: float32 [m, d_out].
        bias: float32 [d].
        threshold: float32 [m], what a pre-activation must exceed, or None for a kind without one.
        out_bias: float32 [d_out], or None if `bias` is added after decoding.
        normalizer: maps raw rows to those that are encoded, or None if rows are encoded as they are.
        target_normalizer: the same for the rows that a transcoder rebuilds.
    """

    # Not set in __init__: Flax would take None for a static attribute that no array may replace.
    normalizer: nnx.Dict | None = None
    target_normalizer: nnx.Dict | None = None

    def __init__(
        self,
        *,
        d: int,
        m: int,
        k: int,
        kind: str = "topk",
        d_out: int | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        """Draw random weights: unit atoms, the encoder their transpose, biases and thresholds 0.

        Args:
            d: width of a row.
            m: atoms.
            k: active atoms that a row may have.
            kind: of autoencoder.
            d_out: width of the rows that a transcoder rebuilds; None for an autoencoder.
            rngs: Flax's random streams; `params` is used.

        Raises:
            ValueError: an unknown kind, or k above m.
        """
        if kind not in ENCODER_KINDS:
            raise ValueError(f"kind: expected one of {', '.join(ENCODER_KINDS)}, got {kind!r}")
        if not 1 <= k <= m:
            raise ValueError(f"k: expected a number from 1 to the {m} atoms, got {k}")
        out_mean = None if d_out is None else jnp.zeros(d_out, jnp.float32)
        params = model.initial_params(
            rngs.params(), m, mean=jnp.zeros(d, jnp.float32), out_mean=out_mean
        )
        if ENCODER_KINDS[kind].threshold != "none":
            params = params._replace(threshold=jnp.zeros(m, jnp.float32))
        self.kind, self.k = kind, k
        self._hold(params)

    @classmethod
    def from_params(
        cls,
        params: SAEParams,
        k: int,
        *,
        kind: str,
        normalizer: Normalizer | None = None,
        target_normalizer: Normalizer | None = None,
    ) -> SAE:
        """Wrap weights that are ready to use, such as those of `TrainState.best`.

        Args:
            params: the weights.
            k: active atoms that a row may have.
            kind: of autoencoder.
            normalizer: of the rows that are read, to act on raw ones.
            target_normalizer: of the rows that a transcoder rebuilds.

        Raises:
            ValueError: a threshold that the kind does not have, or no threshold where it has one.
        """
        m, d = params.encoder.shape
        d_out = None if params.out_bias is None else params.atoms.shape[1]
        sae = nnx.eval_shape(lambda: cls(d=d, m=m, k=k, kind=kind, d_out=d_out, rngs=nnx.Rngs(0)))
        if (sae.threshold is None) != (params.threshold is None):
            wanted, got = ("none", "one") if sae.threshold is None else ("one", "none")
            raise ValueError(f"threshold: expected {wanted} for kind {kind}, got {got}")
        sae._hold(params)
        if normalizer is not None:
            sae.normalizer = _frozen(normalizer)
        if target_normalizer is not None:
            sae.target_normalizer = _frozen(target_normalizer)
        return sae

    @classmethod
    def from_dictionary(cls, dictionary: Dictionary) -> SAE:
        """The autoencoder of a dictionary; like the dictionary it acts on raw rows.

        Args:
            dictionary: of a kind with an encoder.

        Raises:
            ValueError: a dictionary without an encoder (itda).
        """
        if dictionary.kind not in ENCODER_KINDS:
            raise ValueError(
                f"expected a dictionary of a kind with an encoder ({', '.join(ENCODER_KINDS)}), got "
                f"{dictionary.kind}; use jaxdict.encode and jaxdict.decode"
            )
        assert dictionary.encoder is not None and dictionary.encoder_bias is not None
        out_bias = dictionary.bias
        threshold = dictionary.threshold
        params = SAEParams(
            encoder=jnp.asarray(dictionary.encoder),
            encoder_bias=jnp.asarray(dictionary.encoder_bias),
            atoms=jnp.asarray(dictionary.atoms),
            # A dictionary subtracts nothing before it encodes: that is in its encoder's bias.
            bias=jnp.zeros(dictionary.d, jnp.float32),
            threshold=None if threshold is None else jnp.asarray(threshold),
            out_bias=jnp.zeros(dictionary.d_out, jnp.float32)
            if out_bias is None
            else jnp.asarray(out_bias),
        )
        return cls.from_params(params, int(dictionary.k), kind=dictionary.kind)

    @property
    def params(self) -> SAEParams:
        """The weights as the tuple that the functions of this package take."""
        return SAEParams(
            encoder=self.encoder[...],
            encoder_bias=self.encoder_bias[...],
            atoms=self.atoms[...],
            bias=self.bias[...],
            threshold=None if self.threshold is None else self.threshold[...],
            out_bias=None if self.out_bias is None else self.out_bias[...],
        )

    def encode(self, x: Float[Array, "n d"]) -> Codes:
        """Codes of rows, sorted by value; empty slots are (0, 0.0).

        Raises:
            ValueError: not rows [n, d] of the width that it reads.
        """
        d = self.params.encoder.shape[1]
        if x.ndim != 2 or x.shape[1] != d:
            raise ValueError(
                f"expected rows [n, {d}], got {list(x.shape)}; give one activation a row"
            )
        normalizer = _normalizer(self.normalizer)
        return kinds.encode(
            self.params, x if normalizer is None else normalize(normalizer, x), self.k
        )

    def decode(self, codes: Codes) -> Float[Array, "n d_out"]:
        """Rows rebuilt from codes."""
        x_hat = kinds.decode(self.params, codes)
        own = self.normalizer if self.target_normalizer is None else self.target_normalizer
        normalizer = _normalizer(own)
        return x_hat if normalizer is None else denormalize(normalizer, x_hat)

    def __call__(self, x: Float[Array, "n d"]) -> Float[Array, "n d_out"]:
        """Rows rebuilt from their own codes."""
        return self.decode(self.encode(x))

    def normalize_atoms(self) -> None:
        """Scale every atom to unit norm, in place, as after each optimizer step."""
        self.atoms[...] = model.unit_norm(self.params).atoms

    def _hold(self, params: SAEParams) -> None:
        self.encoder = nnx.Param(params.encoder)
        self.encoder_bias = nnx.Param(params.encoder_bias)
        self.atoms = nnx.Param(params.atoms)
        self.bias = nnx.Param(params.bias)
        self.threshold = None if params.threshold is None else nnx.Param(params.threshold)
        self.out_bias = None if params.out_bias is None else nnx.Param(params.out_bias)


def _frozen(normalizer: Normalizer) -> nnx.Dict:
    return nnx.Dict({name: Frozen(leaf) for name, leaf in normalizer._asdict().items()})


def _normalizer(frozen: nnx.Dict | None) -> Normalizer | None:
    if frozen is None:
        return None
    return Normalizer(**{name: leaf[...] for name, leaf in frozen.items()})
