"""First weights: random ones, or such as are taken from training rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from jaxdict.rows import Loader, Normalization, floats, normalize, to_device
from jaxdict.sae import SAE, SAEParams, TrainSAEConfig, TrainState, initial_state, kinds
from jaxdict.training import sweep
from jaxdict.training.batches import Normalizations
from jaxdict.training.sweep import Member, resolve


def random_state(member: Member, normalizations: Normalizations) -> TrainState:
    """The state of a member with random weights, as its seed gives them; every later state has its shapes."""
    mean, out_mean = (
        None if one is None else jnp.asarray(one.center, jnp.float32) for one in normalizations
    )
    assert mean is not None
    # Numbers, also where only the shapes of a state are asked for.
    with jax.ensure_compile_time_eval():
        step_config = sweep.step_config_of(member)
    return initial_state(
        jax.random.key(member.config.seed),
        member.resolved.m,
        mean=mean,
        step_config=step_config,
        out_mean=out_mean,
    )


def from_rows(
    params: SAEParams,
    loader: Loader,
    normalizations: Normalizations,
    *,
    target: Loader | None = None,
) -> SAEParams:
    """First weights whose atoms are training rows: centred, of unit norm, the encoder their transpose.

    Args:
        params: weights to start from; a row that is the mean itself leaves its atom as it is.
        loader: gives the rows; those of its first batches are taken.
        normalizations: of the rows.
        target: gives the rows that a transcoder's atoms are made of.

    Returns:
        The weights; a transcoder's encoder comes from the rows, its atoms from the target's.
    """
    m = params.encoder.shape[0]

    def units(source: Loader, normalization: Normalization, center: Array, old: Array) -> Array:
        rows, batches = [], source.batches()
        for _ in range(-(-m // source.batch)):
            rows.append(next(batches))
        batches.close()
        z = normalize(to_device(normalization), jnp.asarray(floats(np.concatenate(rows)[:m])))
        z = z - center
        norms = jnp.linalg.norm(z, axis=1, keepdims=True)
        return jnp.where(norms > 0, z / jnp.where(norms > 0, norms, 1.0), old)

    encoder = units(loader, normalizations.site, params.bias, params.encoder)
    if target is None:
        return params._replace(encoder=encoder, atoms=jnp.copy(encoder))
    assert params.out_bias is not None and normalizations.target is not None
    atoms = units(target, normalizations.target, params.out_bias, params.atoms)
    return params._replace(encoder=encoder, atoms=atoms)


def threshold_from_rows(
    params: SAEParams, loader: Loader, normalizations: Normalizations, *, k: int
) -> float:
    """A first threshold that leaves about k atoms of a row active: the mean of the rows' k-th largest values.

    Args:
        params: first weights.
        loader: gives the rows; those of its first batch are taken.
        normalizations: of the rows.
        k: active atoms a row.
    """
    batches = loader.batches()
    z = normalize(to_device(normalizations.site), jnp.asarray(floats(next(batches))))
    batches.close()
    codes = kinds.encode(params._replace(threshold=None), z, k)
    return float(jnp.maximum(jnp.mean(codes.values[:, -1]), 1e-6))


def initial_sae(config: TrainSAEConfig, d: int, *, d_out: int | None = None, rngs: nnx.Rngs) -> SAE:
    """An untrained autoencoder of the kind and size that settings ask for.

    Args:
        config: settings of `jaxdict train sae`.
        d: width of a row.
        d_out: width of the rows that a transcoder rebuilds; None for an autoencoder.
        rngs: Flax's random streams; `params` is used.

    Raises:
        ValueError: k is above m.
    """
    resolved, kind = resolve(config, d), config.model.kind
    sae = SAE(d=d, m=resolved.m, k=resolved.slots, kind=kind, d_out=d_out, rngs=rngs)
    sae.encoder[...] = config.model.encoder_scale * sae.encoder[...]
    return sae
