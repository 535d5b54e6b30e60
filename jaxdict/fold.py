"""`jaxdict export`: a run becomes a dictionary that acts on raw rows.

With z = (x - mean) T and x = z R + mean (T, R diagonal or full), a TopK autoencoder in z,

    e = TopK(ReLU(W (z - b) + c)),   z_hat = A^T e + b,

is the same function of raw rows as one with

    W' = W T^T,   c' = c - W b - W' mean,   A' = A R,   b' = b R + mean,

because ReLU and TopK see the same numbers. The folding is done in float64 and rounded once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from harvest.store import Store, open_store
from jaxdict import coder, itda_run, runs, sae
from jaxdict.checkpoint import Checkpoints
from jaxdict.config import ExportConfig, TrainSAEConfig
from jaxdict.data import Source, floats, source_of, stream_of, watched
from jaxdict.evaluate import measure_dictionary
from jaxdict.export import Dictionary, save_dictionary
from jaxdict.normalize import Normalization, denormalize, load_normalization, normalize, to_device
from jaxdict.sae import SAEParams
from jaxdict.train import fresh_state, resolve


def fold(params: SAEParams, normalization: Normalization, k: int) -> Dictionary:
    """Fold a normalization into a TopK autoencoder, exactly (see the top of this file).

    Args:
        params: the autoencoder in normalized space.
        normalization: the map it was trained behind.
        k: active atoms a row.

    Returns:
        A dictionary on raw rows; its `typical` is still zero.
    """
    encoder, encoder_bias, atoms, bias = (np.asarray(leaf, np.float64) for leaf in params)
    mean, transform, inverse = normalization.mean, normalization.transform, normalization.inverse
    flat = transform.ndim == 1
    raw_encoder = encoder * transform if flat else encoder @ transform.T
    raw_atoms = atoms * inverse if flat else atoms @ inverse
    raw_bias = (bias * inverse if flat else bias @ inverse) + mean
    raw_encoder_bias = encoder_bias - encoder @ bias - raw_encoder @ mean
    f32 = (x.astype(np.float32) for x in (raw_atoms, raw_bias, raw_encoder, raw_encoder_bias))
    return Dictionary("topk", k, *f32, typical=np.zeros(len(atoms), np.float32))


def export(config: ExportConfig) -> dict[str, Any]:
    """Export a run.

    Args:
        config: settings.

    Returns:
        The dictionary's card, with `path`.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: the run cannot be read, has no checkpoint, or the store is another one.
        FileExistsError: --out holds something that is not a dictionary.
    """
    description = read_run(config.run)
    place = config.store or Path(description["store"]["path"])
    store = open_store(place)
    wanted = description["store"].get("fingerprint")
    if wanted is not None and wanted != store.fingerprint:
        raise ValueError(
            f"expected the store the run was trained on (fingerprint {wanted}), got {place} "
            f"({store.fingerprint}); name it with --store"
        )
    settings = description["config"]
    steps = tuple(settings.get("steps") or ())
    rows = source_of(store, settings["site"], steps=steps).spread(config.rows)
    if description.get("kind") == "itda":
        dictionary = itda_run.run_to_dictionary(config.run)
    else:
        dictionary = _fold_run(config.run, description, store, rows)
    if dictionary.typical is None or not dictionary.typical.any():
        dictionary = dataclasses.replace(dictionary, typical=typical(dictionary, rows))
    card = dict(dictionary.card)
    if "metrics" not in card and len(store.indices("validation")):
        held = source_of(store, settings["site"], split="validation", steps=steps)
        measured = measure_dictionary(dictionary, held.spread(config.rows), name="held-out")
        card["metrics"] = {"split": "validation", **measured.summary()}
    dictionary = dataclasses.replace(dictionary, card=card)
    path = save_dictionary(dictionary, config.out)
    error = card.get("folding_error")
    if error:
        print(f"folding error: {error['relative']:.1e} of the rows' deviation (root mean square)")
    if "metrics" in card:
        numbers = card["metrics"]
        print(f"held-out FVU of the dictionary: {numbers['fvu']:.4f} raw, L0 {numbers['l0']:.2f}")
    print(f"dictionary: {path}")
    facts = {"kind": dictionary.kind, "d": dictionary.d, "m": dictionary.m, "k": int(dictionary.k)}
    return {**facts, **card, "path": str(path)}


def read_run(run: Path) -> dict[str, Any]:
    """config.json of a run.

    Raises:
        FileNotFoundError: no run there.
        ValueError: something else is there.
    """
    if not (run / runs.CONFIG).is_file():
        raise FileNotFoundError(
            f"expected a run (a folder with {runs.CONFIG}) at {run}, found none; "
            "name the --out of `jaxdict train sae` or `jaxdict train itda`"
        )
    description = runs.read_json(run / runs.CONFIG)
    if "config" not in description or "store" not in description:
        raise ValueError(
            f"{run / runs.CONFIG}: expected a run's config and store, got {sorted(description)}; "
            "name the --out of `jaxdict train sae` or `jaxdict train itda`"
        )
    return description


def read_sae(
    run: Path, description: dict[str, Any]
) -> tuple[SAEParams, Normalization, TrainSAEConfig, int]:
    """Weights to use (averaged where the run averages), normalization, settings, optimizer step."""
    settings = dict(description["config"])
    settings |= {name: Path(settings[name]) for name in ("store", "out")}
    config = TrainSAEConfig(**{**settings, "steps": tuple(settings["steps"])})
    normalization = load_normalization(run / runs.NORMALIZATION)
    plan = resolve(config, len(normalization.mean))
    template = jax.eval_shape(lambda: fresh_state(config, plan, normalization))
    with Checkpoints(run, keep=config.keep) as checkpoints:
        state, _ = checkpoints.restore(template)
    best = jax.tree.map(jnp.asarray, state).best
    return best, normalization, config, int(state.step)


def _fold_run(run: Path, description: dict[str, Any], store: Store, rows: Source) -> Dictionary:
    params, normalization, config, step = read_sae(run, description)
    dictionary = fold(params, normalization, config.k)
    summary = run / runs.SUMMARY
    card = {
        "site": config.site,
        "stream": stream_of(config.site),
        "model": store.attrs.get("model"),
        "store_fingerprint": store.fingerprint,
        "normalization": {"kind": normalization.kind, "rows": normalization.rows, "folded": True},
        "folding_error": folding_error(dictionary, params, normalization, rows),
        "training": {
            "rows": step * config.batch,
            "finished": step == description["resolved"]["steps"],
            **(runs.read_json(summary)["training"] if summary.is_file() else {}),
        },
        "config": description["config"],
        "resolved": description["resolved"],
        "versions": description["versions"],
    }
    return dataclasses.replace(dictionary, card=card)


def folding_error(
    dictionary: Dictionary,
    params: SAEParams,
    normalization: Normalization,
    rows: Source,
    *,
    batch: int = 4096,
) -> dict[str, Any]:
    """How far the folded dictionary is from the model it was folded from, both in float32.

    Args:
        dictionary: on raw rows.
        params: the model in normalized space.
        normalization: between the two.
        rows: where to compare; at most 8 batches are.
        batch: rows at a time.

    Returns:
        rows; relative, sqrt(sum ||x_hat' - x_hat||^2 / sum ||x - mean||^2); same_features, share of
        active slots that hold the same feature (two features within rounding of each other at the
        k-th place may change places).
    """
    space = to_device(normalization)
    far, spread, same, active, count = 0.0, 0.0, 0, 0, 0
    mean = np.asarray(normalization.center if normalization.transform.ndim == 1 else 0.0)
    center = normalization.mean + (mean * normalization.inverse if mean.ndim else 0.0)
    some = rows.spread(8 * batch)
    for _, bits in some.blocks():
        every = floats(bits)
        for start in range(0, len(every), batch):
            x = jnp.asarray(every[start : start + batch])
            codes, _ = sae.encode(params, normalize(space, x), dictionary.k)
            x_hat = denormalize(space, sae.decode(codes, params.atoms, params.bias))
            folded = coder.encode(dictionary, x)
            again = coder.decode(dictionary, folded)
            far += float(np.square(np.asarray(again - x_hat, np.float64)).sum())
            spread += float(np.square(np.asarray(x, np.float64) - center).sum())
            count += len(x)
            for one, other in zip(*map(_active, (codes, folded)), strict=True):
                same += len(one & other)
                active += max(len(one), len(other))
    return {
        "rows": count,
        "relative": float(np.sqrt(far / spread)) if spread else 0.0,
        "same_features": same / active if active else 1.0,
    }


def _active(codes: Any) -> list[set[int]]:
    """Active features of each row."""
    indices, values = np.asarray(codes.indices), np.asarray(codes.values)
    return [set(i[v != 0].tolist()) for i, v in zip(indices, values, strict=True)]


def typical(dictionary: Dictionary, rows: Source, *, batch: int = 4096) -> np.ndarray:
    """Mean value of each feature over the rows where it is active: float32 [m], 0 if never.

    Args:
        dictionary: on raw rows.
        rows: of the training split.
        batch: rows at a time; the last batch is filled up with its first row, which is not counted.

    Returns:
        The means.
    """
    total, times = np.zeros(dictionary.m), np.zeros(dictionary.m, np.int64)
    for _, bits in watched(rows, "typical"):
        every = floats(bits)
        for start in range(0, len(every), batch):
            part = every[start : start + batch]
            padded = np.concatenate([part, np.repeat(part[:1], batch - len(part), axis=0)])
            codes = coder.encode(dictionary, jnp.asarray(padded))
            indices = np.asarray(codes.indices)[: len(part)].ravel()
            values = np.asarray(codes.values, np.float64)[: len(part)].ravel()
            total += np.bincount(indices, values, dictionary.m)
            times += np.bincount(indices[values != 0], minlength=dictionary.m)
    return np.where(times > 0, total / np.maximum(times, 1), 0).astype(np.float32)
