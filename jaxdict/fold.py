"""`jaxdict export`: a run becomes a dictionary that acts on raw rows.

With z = (x - mean) T and x = z R + mean (T, R diagonal or full), an autoencoder in z,

    e = TopK(ReLU(pre) where pre > threshold),   pre = W (z - b) + c,   z_hat = A^T e + b_out,

(b_out = b, except in a transcoder) is the same function of raw rows as one with

    W' = W T^T,   c' = c - W b - W' mean,   A' = A R_out,   b' = b_out R_out + mean_out

and the same thresholds, because ReLU, thresholds and TopK see the same numbers. R_out and mean_out
belong to the rows that are rebuilt: the same normalization, or in a transcoder its target's. The
folding is done in float64 and rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from harvest.store import Store, open_store
from jaxdict import coder, itda_run, kinds, runs
from jaxdict.checkpoint import Checkpoints
from jaxdict.config import ExportConfig
from jaxdict.config_sae import TrainSAEConfig
from jaxdict.data import Source, floats, source_of, stream_of, watched
from jaxdict.evaluate import measure_dictionary
from jaxdict.export import Dictionary, save_dictionary
from jaxdict.feed import Fitted
from jaxdict.members import Member, resolve
from jaxdict.normalize import Normalization, denormalize, load_normalization, normalize, to_device
from jaxdict.sae import SAEParams
from jaxdict.train import first_state


def fold(
    params: SAEParams,
    normalization: Normalization,
    k: int,
    *,
    kind: str = "topk",
    target: Normalization | None = None,
    target_site: str | None = None,
) -> Dictionary:
    """Fold a normalization into an autoencoder of any kind, exactly (see the top of this file).

    Args:
        params: the autoencoder in normalized space.
        normalization: the map of the rows it reads.
        k: slots kept a row.
        kind: one of `jaxdict.export.ENCODER_KINDS`.
        target: of a transcoder, the map of the rows it rebuilds.
        target_site: of a transcoder, the site it rebuilds, for the dictionary's card.

    Returns:
        A dictionary on raw rows; its `typical` is still zero, its card empty but for `target`.

    Raises:
        ValueError: one of `target` and `target_site` without the other; a threshold that the kind
            has not, or lacks.
    """
    if (target is None) != (not target_site):
        raise ValueError(
            "expected both target and target_site (a transcoder) or neither, got "
            f"{'no target' if target is None else 'no target_site'}; give both"
        )
    encoder, encoder_bias, atoms, bias = (np.asarray(leaf, np.float64) for leaf in params[:4])
    raw_encoder = _times(encoder, normalization.transform.T)
    raw_encoder_bias = encoder_bias - encoder @ bias - raw_encoder @ normalization.mean
    out = normalization if target is None else target
    out_bias = bias if params.out_bias is None else np.asarray(params.out_bias, np.float64)
    raw_atoms = _times(atoms, out.inverse)
    raw_bias = _times(out_bias, out.inverse) + out.mean
    f32 = (x.astype(np.float32) for x in (raw_atoms, raw_bias, raw_encoder, raw_encoder_bias))
    threshold = params.threshold
    return Dictionary(
        kind,
        k,
        *f32,
        threshold=None if threshold is None else np.asarray(threshold, np.float32),
        typical=np.zeros(len(atoms), np.float32),
        card={"target": target_site} if target_site else {},
    )


def _times(rows: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rows times a diagonal [d] or full [d, d] matrix."""
    return rows * matrix if matrix.ndim == 1 else rows @ matrix


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
        dictionary = _fold_run(config.run, description, store, rows, config.checkpoint)
    if dictionary.typical is None or not dictionary.typical.any():
        dictionary = dataclasses.replace(dictionary, typical=typical(dictionary, rows))
    card = dict(dictionary.card)
    if "metrics" not in card and len(store.indices("validation")):
        held = source_of(store, settings["site"], split="validation", steps=steps)
        held, other = held.spread(config.rows), None
        if settings.get("target"):
            other = held.beside(settings["target"])
        measured = measure_dictionary(dictionary, held, name="held-out", target=other)
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


class Trained(NamedTuple):
    """What a run of `train sae` holds.

    Attributes:
        params: weights to use, averaged where the run averages.
        fitted: normalizations.
        config: settings.
        slots: active atoms that a row may have.
        step: of the optimizer.
    """

    params: SAEParams
    fitted: Fitted
    config: TrainSAEConfig
    slots: int
    step: int


def read_sae(run: Path, description: dict[str, Any], *, checkpoint: str = "newest") -> Trained:
    """Read a run of `train sae`.

    Args:
        run: its folder.
        description: its config.json.
        checkpoint: newest, or best by held-out FVU.

    Raises:
        ValueError: it has no such checkpoint, none with a score where the best is asked for, or it
            holds the runs of several members.
    """
    if "members" in description:
        names = ", ".join(description["members"])
        raise ValueError(
            f"expected the run of one dictionary, got {run}, which holds several ({names}); name "
            "the folder of one in it"
        )
    settings = dict(description["config"])
    known = {field.name for field in dataclasses.fields(TrainSAEConfig)}
    for age, names in (("an older", known - set(settings)), ("a newer", set(settings) - known)):
        if names:
            raise ValueError(
                f"expected a run of this version, got {run}, which {age} jaxdict made and whose settings differ in "
                f"{', '.join(sorted(names))}; train again with `jaxdict train sae`"
                + (", or install a newer jaxdict" if age == "a newer" else "")
            )
    settings |= {name: Path(settings[name]) for name in ("store", "out")}
    settings |= {name: tuple(settings[name]) for name in ("steps", "sweep")}
    config = TrainSAEConfig(**settings)
    target = load_normalization(run / runs.TARGET_NORMALIZATION) if config.target else None
    fitted = Fitted(load_normalization(run / runs.NORMALIZATION), target)
    member = Member("", config, resolve(config, len(fitted.site.mean)))
    template = jax.eval_shape(lambda: first_state(member, fitted))
    with Checkpoints(run, keep=config.keep) as checkpoints:
        wanted = None
        if checkpoint == "best" and checkpoints.latest is not None:
            wanted = checkpoints.best
            if wanted is None:
                raise ValueError(
                    f"--checkpoint best: expected one measured on held-out rows in {checkpoints.folder}, "
                    "found none; use --checkpoint newest"
                )
        state, _ = checkpoints.restore(template, wanted)
    best = jax.tree.map(jnp.asarray, state).best(config.kind)
    return Trained(best, fitted, config, member.plan.slots, int(state.step))


def _fold_run(
    run: Path, description: dict[str, Any], store: Store, rows: Source, checkpoint: str
) -> Dictionary:
    params, fitted, config, slots, step = read_sae(run, description, checkpoint=checkpoint)
    dictionary = fold(
        params,
        fitted.site,
        slots,
        kind=config.kind,
        target=fitted.target,
        target_site=config.target or None,
    )
    summary, other = run / runs.SUMMARY, None
    if config.target:
        other = rows.beside(config.target)
    card = {
        "site": config.site,
        **({"target": config.target} if config.target else {}),
        "stream": stream_of(config.site),
        "model": store.attrs.get("model"),
        "store_fingerprint": store.fingerprint,
        "normalization": {
            "kind": config.normalize,
            "rows": fitted.site.rows,
            "folded": True,
        },
        "folding_error": folding_error(
            dictionary, params, fitted.site, rows, target=fitted.target, target_rows=other
        ),
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
    target: Normalization | None = None,
    target_rows: Source | None = None,
    batch: int = 4096,
) -> dict[str, Any]:
    """How far the folded dictionary is from the model it was folded from, both in float32.

    Args:
        dictionary: on raw rows, of any kind with an encoder.
        params: the model in normalized space.
        normalization: between the two, of the rows that are read.
        rows: where to compare; at most 8 batches are.
        target: of a transcoder, the normalization of the rows it rebuilds.
        target_rows: of a transcoder, those rows, of the same images and steps.
        batch: rows at a time.

    Returns:
        rows; relative, sqrt(sum ||y_hat' - y_hat||^2 / sum ||y - mean||^2) for raw rows y that are
        rebuilt (those that are read, or a transcoder's target's); same_features, share of active
        slots that hold the same feature (two features within rounding of each other at the k-th
        place may change places, one within rounding of its threshold may be lost).
    """
    space, out = to_device(normalization), to_device(target or normalization)
    far, spread, same, active, count = 0.0, 0.0, 0, 0, 0
    center = _raw_mean(target or normalization)
    some = rows.spread(8 * batch)
    for images, bits in some.blocks():
        every = floats(bits)
        rebuilt = every if target_rows is None else floats(target_rows.read(images))
        for start in range(0, len(every), batch):
            x = jnp.asarray(every[start : start + batch])
            codes = kinds.encode(params, normalize(space, x), int(dictionary.k))
            y_hat = denormalize(out, kinds.decode(params, codes))
            folded = coder.encode(dictionary, x)
            again = coder.decode(dictionary, folded)
            y = rebuilt[start : start + batch]
            far += float(np.square(np.asarray(again - y_hat, np.float64)).sum())
            spread += float(np.square(np.asarray(y, np.float64) - center).sum())
            count += len(x)
            for one, other in zip(*map(_active, (codes, folded)), strict=True):
                same += len(one & other)
                active += max(len(one), len(other))
    return {
        "rows": count,
        "relative": float(np.sqrt(far / spread)) if spread else 0.0,
        "same_features": same / active if active else 1.0,
    }


def _raw_mean(normalization: Normalization) -> np.ndarray:
    """Mean of the rows a normalization was fitted on, raw: float64 [d]."""
    return normalization.mean + _times(normalization.center, normalization.inverse)


def _active(codes: Any) -> list[set[int]]:
    """Active features of each row."""
    indices, values = np.asarray(codes.indices), np.asarray(codes.values)
    return [set(i[v != 0].tolist()) for i, v in zip(indices, values, strict=True)]


def typical(dictionary: Dictionary, rows: Source, *, batch: int = 4096) -> np.ndarray:
    """Mean value of each feature over the rows where it is active: float32 [m], 0 if never.

    Args:
        dictionary: on raw rows, of any kind.
        rows: of the training split, of the site that is read.
        batch: rows at a time.

    Returns:
        The means.
    """
    total, times = np.zeros(dictionary.m), np.zeros(dictionary.m, np.int64)
    for indices, values in encoded(dictionary, rows, "typical", batch=batch):
        total += np.bincount(indices, values, dictionary.m)
        times += np.bincount(indices[values != 0], minlength=dictionary.m)
    return np.where(times > 0, total / np.maximum(times, 1), 0).astype(np.float32)


def encoded(
    dictionary: Dictionary, rows: Source, name: str, *, batch: int = 4096
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The slots of all rows, a batch at a time, behind a progress bar.

    Args:
        dictionary: on raw rows, of any kind.
        rows: of the site that is read.
        name: of the progress bar.
        batch: rows at a time; the last batch is filled up with its first row, which is not given.

    Yields:
        Indices int [rows k] and values float64 [rows k]; a slot of value 0 is empty.
    """
    for _, bits in watched(rows, name):
        every = floats(bits)
        for start in range(0, len(every), batch):
            part = every[start : start + batch]
            padded = np.concatenate([part, np.repeat(part[:1], batch - len(part), axis=0)])
            codes = coder.encode(dictionary, jnp.asarray(padded))
            indices = np.asarray(codes.indices)[: len(part)].ravel()
            yield indices, np.asarray(codes.values, np.float64)[: len(part)].ravel()
