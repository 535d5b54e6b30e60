"""The state before the first step: of random weights, of training rows, or of a dictionary (`--init-from`).

A dictionary acts on raw rows x, an autoencoder in training on z = (x - mean) T, x = z R + mean, and its atoms have unit
norm. With pre = W' x + c' and x_hat = A'^T e + b' the same function of z is, with s_j the norms of A' T_out,

    A = A' T_out / s,   b_out = (b' - mean_out) T_out,   W = s W' R^T,   c = s (c' + W' mean) + W b,   threshold = s threshold'

for any b; an autoencoder has b = b_out. Where s is 1, as in the normalization that the dictionary was trained in, a row's
largest activations stay the largest ones; elsewhere each feature adds what it did, but others may be the k largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from harvest.flags import expect
from harvest.hashing import NAME, hasher
from jaxdict.dictionary import ENCODER_KINDS, load_dictionary
from jaxdict.rows import Loader
from jaxdict.runs import CONFIG, read_run
from jaxdict.sae import SAEParams, TrainSAEConfig, TrainState, state_of
from jaxdict.training.batches import Normalizations
from jaxdict.training.initialize import from_rows, random_state, threshold_from_rows
from jaxdict.training.saved_run import read_sae
from jaxdict.training.sweep import Member, step_config_of

INIT_FROM = "init_from"


class Start(NamedTuple):
    """A dictionary to start from, acting on raw rows.

    Attributes:
        encoder: [m, d].
        encoder_bias: [m].
        atoms: [m, d_out].
        bias: [d_out].
        threshold: [m], None for a kind without one.
        transcoder: whether it rebuilds rows of another site.
        facts: what config.json and the card keep of it.
    """

    encoder: np.ndarray
    encoder_bias: np.ndarray
    atoms: np.ndarray
    bias: np.ndarray
    threshold: np.ndarray | None
    transcoder: bool
    facts: dict[str, Any]


def first_state(
    member: Member, normalizations: Normalizations, loaders: Mapping[str, Loader]
) -> TrainState:
    """The state of a member before the first step.

    Args:
        member: what is trained.
        normalizations: of its rows.
        loaders: give its first training rows, by site.
    """
    config, step_config = member.config, step_config_of(member)
    loader = loaders[config.site]
    if config.model.init_from is not None:
        return state_from(read_start(config.model.init_from), member, normalizations, loader)
    params = random_state(member, normalizations).params
    if config.model.init == "rows":
        target = loaders[config.target] if config.target else None
        params = from_rows(params, loader, normalizations, target=target)
    params = params._replace(encoder=params.encoder * config.model.encoder_scale)
    if ENCODER_KINDS[config.model.kind].threshold != "each":
        return state_of(params, step_config)
    threshold = threshold_from_rows(params, loader, normalizations, k=config.model.k)
    return state_of(params, step_config, threshold=threshold)


def read_start(path: Path) -> Start:
    """Read an exported dictionary (its folder or its file), or a run of `jaxdict train sae`.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: it is damaged, or has no encoder.
    """
    if (path / CONFIG).is_file():
        return _of_run(path)
    dictionary = load_dictionary(path.parent if path.is_file() else path)
    kinds = f"a kind with an encoder ({', '.join(ENCODER_KINDS)})"
    expect(dictionary.kind in ENCODER_KINDS, INIT_FROM, kinds, dictionary.kind, "name another")
    assert dictionary.encoder is not None and dictionary.encoder_bias is not None
    assert dictionary.bias is not None
    return _start(
        path,
        {"kind": dictionary.kind, "site": dictionary.card.get("site"), "k": int(dictionary.k)},
        (dictionary.encoder, dictionary.encoder_bias, dictionary.atoms, dictionary.bias),
        threshold=dictionary.threshold,
        transcoder=dictionary.transcoder,
    )


def _of_run(run: Path) -> Start:
    """The newest weights of a run, on raw rows: the normalization is folded in as at export."""
    description = read_run(run)
    kinds = f"a kind with an encoder ({', '.join(ENCODER_KINDS)})"
    kind = description.get("kind")
    expect(kind in ENCODER_KINDS, INIT_FROM, kinds, kind, "name another")
    trained = read_sae(run, description)
    site, out = trained.normalizations.site, trained.normalizations.out
    names = ("encoder", "encoder_bias", "atoms", "bias")
    encoder, encoder_bias, atoms, bias = (
        np.asarray(getattr(trained.params, name), np.float64) for name in names
    )
    raw = _times(encoder, site.transform.T)
    last = bias if trained.params.out_bias is None else np.asarray(trained.params.out_bias)
    threshold = trained.params.threshold
    return _start(
        run,
        {"kind": kind, "site": trained.config.site, "k": trained.slots, "step": trained.step},
        (
            raw,
            encoder_bias - encoder @ bias - raw @ site.mean,
            _times(atoms, out.inverse),
            _times(last, out.inverse) + out.mean,
        ),
        threshold=None if threshold is None else np.asarray(threshold),
        transcoder=bool(trained.config.target),
    )


def _start(
    path: Path,
    facts: dict[str, Any],
    arrays: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    *,
    threshold: np.ndarray | None,
    transcoder: bool,
) -> Start:
    found = hasher()
    for array in (*arrays, *([] if threshold is None else [threshold])):
        found.update(np.ascontiguousarray(array, np.float32).data)
    m, d = arrays[0].shape
    shape = {"m": m, "d": d, "transcoder": transcoder}
    whole = {"path": str(path.resolve()), **facts, **shape, NAME: found.hexdigest()}
    return Start(*arrays, threshold, transcoder, whole)


def chosen_start(config: TrainSAEConfig) -> tuple[TrainSAEConfig, dict[str, Any] | None]:
    """The settings with the number of atoms of the dictionary to start from, and what is kept of that.

    A run that is resumed knows it: the dictionary need not be there any more.
    """
    if config.model.init_from is None:
        return config, None
    known = config.run.resume and (config.out / CONFIG).is_file()
    facts = read_run(config.out).get(INIT_FROM) if known else None
    if facts is None:
        facts = read_start(config.model.init_from).facts
    return config if config.model.atoms else config.replace(atoms=facts["m"]), facts


def check_start(facts: dict[str, Any] | None, members: list[Member]) -> None:
    """Refuse members that a dictionary does not fit.

    Raises:
        ValueError: atoms, widths or the target differ.
    """
    for member in members if facts else []:
        assert facts is not None
        config, resolved, of = member.config, member.resolved, f"of {facts['path']} (--init-from)"
        m, d = facts["m"], facts["d"]
        expect(resolved.m == m, "atoms", f"the {m} {of}", resolved.m, "leave it out")
        expect(resolved.d == d, "site", f"the width {d} {of}", resolved.d, "name another site")
        have = "a target, for the transcoder" if facts["transcoder"] else "no target, for the rows"
        expect(bool(config.target) == facts["transcoder"], "target", f"{have} {of}", config.target)
        expect(config.model.init == "random", "init", "no other start", "rows", "leave out one")


def state_from(
    start: Start, member: Member, normalizations: Normalizations, loader: Loader
) -> TrainState:
    """The state before the first step that does on raw rows what a dictionary does.

    Args:
        start: the dictionary.
        member: what is trained.
        normalizations: of its rows, fitted for this training.
        loader: gives training rows, which set the thresholds of a kind that the dictionary has none for.
    """
    config, step_config = member.config, step_config_of(member)
    params, norms = weights_from(start, normalizations)
    threshold = None if start.threshold is None else start.threshold * norms
    form = ENCODER_KINDS[config.model.kind].threshold
    if form == "each":
        if threshold is None:
            threshold = threshold_from_rows(params, loader, normalizations, k=config.model.k)
        return state_of(params, step_config, threshold=np.maximum(threshold, 1e-6))
    state = state_of(params, step_config)
    if form == "one" and threshold is not None:
        return state._replace(threshold=jnp.float32(np.mean(threshold)))
    return state


def weights_from(start: Start, normalizations: Normalizations) -> tuple[SAEParams, np.ndarray]:
    """Weights in normalized space, computed in float64, and the norms that the atoms had there (see the top)."""
    site, out = normalizations.site, normalizations.out
    encoder, encoder_bias, atoms, bias = (np.asarray(one, np.float64) for one in start[:4])
    moved = _times(atoms, out.transform)
    norms = np.linalg.norm(moved, axis=1)
    norms = np.where(norms > 0, norms, 1)
    out_bias = _times(bias - out.mean, out.transform)
    own = np.asarray(site.center) if start.transcoder else out_bias
    here = norms[:, None] * _times(encoder, site.inverse.T)
    here_bias = norms * (encoder_bias + encoder @ site.mean) + here @ own
    params = SAEParams(
        _single(here),
        _single(here_bias),
        _single(moved / norms[:, None]),
        _single(own),
        None,
        _single(out_bias) if start.transcoder else None,
    )
    return params, norms


def _single(array: np.ndarray) -> jax.Array:
    return jnp.asarray(array, jnp.float32)


def _times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rows times a diagonal [d] or full [d, d] matrix."""
    return rows * matrix if matrix.ndim == 1 else rows @ matrix


def told(start: dict[str, Any], measured: dict[str, dict[str, Any]]) -> str:
    """A line about where a training starts from, with the held-out numbers of each member."""
    fvu = [line["fvu"] for line in measured.values() if "fvu" in line]
    numbers = "unknown"
    if fvu:
        low, high = f"{min(fvu):.4f}", f"{max(fvu):.4f}"
        numbers = low if low == high else f"{low} to {high}"
    return (
        f"starts from {start['path']} ({start['kind']}, {start['m']} atoms, site {start['site']}): "
        f"held-out FVU {numbers} raw before the first step"
    )
