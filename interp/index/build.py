"""The verb `interp index`: read a store once through a dictionary and write down when each feature fires."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from harvest.atomic import write_json
from harvest.sites import parse_site
from harvest.store import open_store
from interp.config import IndexConfig
from interp.folder import check_free, replaced
from interp.index import ground_truth
from interp.index.arrays import (
    CONFIG_FILE,
    FACTS_FILE,
    FILES,
    SUMMARY_FILE,
    FeatureIndex,
    save_index,
)
from interp.index.encode import Fit, Selection, encode, select, spill, unspill
from interp.index.gather import Gatherer, HeatMaps, Postings, example_ranks
from interp.index.summary import summarize
from interp.index.words import Words, telling_words
from steer.coder import Coder

_STRONG = 0.5
_SCORE_CELLS = 2**22


def build_index(config: IndexConfig) -> dict[str, Any]:
    """Index every feature of a dictionary on a store and write the folder `config.out`.

    The activations are read and encoded once; the sparse codes wait in a temporary file beside the result for the
    second reading that histograms and heat maps need, because they depend on maxima.

    Args:
        config: what to read and what to keep.

    Returns:
        The summary, also written as summary.json: features, alive, dead_share, images, rows, fvu, l0, `attributes`
        (median AUROC and each tag's feature, AUROC where it was chosen and where it is reported), `clearest` (five).

    Raises:
        FileNotFoundError: no such dictionary or store.
        FileExistsError: `config.out` holds something other than an index.
        ValueError: the store has no such site, width, step or split; or it has no finished image.
    """
    check_free(config.out, marker=FACTS_FILE, names=FILES)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    coder = Coder.from_pretrained(config.dictionary, device=device)
    selection = select(config, coder, open_store(config.store))
    store, _, images, steps, tokens = selection
    with replaced(config.out, marker=FACTS_FILE, names=FILES) as folder:
        gatherer = Gatherer(coder.m, len(steps), tokens)
        with tempfile.TemporaryFile(dir=folder) as file:
            fit = Fit(coder.d_out)
            batches = encode(config, coder, selection, fit)
            sizes = [spill(file, gatherer, *batch) for batch in batches]
            file.seek(0)
            postings = gatherer.postings()
            ranks = example_ranks(postings.start, top=config.top, quantiles=config.quantiles)
            entry = ranks[ranks >= 0]
            maps = HeatMaps(
                postings.feature[entry],
                postings.image[entry],
                postings.row[entry] // tokens,
                maximum=gatherer.maximum,
                steps=len(steps),
                bins=config.bins,
            )
            for size in tqdm(sizes, desc="heat maps", unit="batch", disable=len(sizes) < 20):
                maps.add(*unspill(file, size))
        prompts = [store.prompts[image] for image in images]
        words = _words(postings, prompts, gatherer, keep=config.words)
        scores, tags = _scores(selection, prompts, gatherer, postings, seed=config.seed)
        arrays = _arrays(postings, gatherer, ranks, maps, selection)
        facts = _facts(config, coder, selection, prompts)
        summary = summarize(gatherer, scores, tags, fvu=fit.fvu)
        index = FeatureIndex(
            facts=facts
            | {
                "tokens": tokens,
                "words": words.vocabulary,
                "tags": [list(tag) for tag in tags],
                "tag_counts": scores.counts.tolist(),
                "top": config.top,
                "rows": gatherer.rows,
                "fvu": summary["fvu"],
                "l0": summary["l0"],
                "summary": summary,
            },
            strong_count=_strong_count(postings, gatherer),
            word=words.word,
            word_with=words.inside,
            word_without=words.outside,
            word_log_odds=words.log_odds,
            word_z=words.z,
            auroc_selected=scores.selected,
            auroc=scores.reported,
            pooling=scores.pooling,
            best_tag=scores.best_tag,
            tag_feature=scores.tag_feature,
            order=scores.order if tags else _order_by_words(words, gatherer),
            source=_source(coder),
            **arrays,
        )
        saved = {"verb": "interp index", **dataclasses.asdict(config)}
        write_json(folder / CONFIG_FILE, saved, allow_nan=False)
        write_json(folder / SUMMARY_FILE, summary, allow_nan=False)
        save_index(index, folder)
    print(f"index of {summary['alive']} live features of {coder.m}: {config.out}")
    return summary


def _strong(postings: Postings, gatherer: Gatherer) -> np.ndarray:
    """Bool [p]: entries whose value is at least half of the feature's maximum."""
    return postings.value >= _STRONG * gatherer.maximum[postings.feature]


def _strong_count(postings: Postings, gatherer: Gatherer) -> np.ndarray:
    strong = postings.feature[_strong(postings, gatherer)]
    return np.bincount(strong, minlength=gatherer.m).astype(np.int64)


def _words(postings: Postings, prompts: list[str], gatherer: Gatherer, *, keep: int) -> Words:
    strong = _strong(postings, gatherer)
    return telling_words(
        prompts, postings.feature[strong], postings.image[strong], m=gatherer.m, keep=keep
    )


def _scores(
    selection: Selection,
    prompts: list[str],
    gatherer: Gatherer,
    postings: Postings,
    *,
    seed: int,
) -> tuple[ground_truth.Scores, list[tuple[str, str]]]:
    """AUROC for every tag that has images enough; no tags when the store has no labels."""
    store = selection.store
    known = ground_truth.collect_tags([store.labels[image] for image in selection.images])
    reports = ground_truth.halves([prompts[place] for place in known.images], seed=seed)
    keep = ground_truth.enough(known.has, reports)
    tags = [tag for tag, good in zip(known.tags, keep, strict=True) if good]
    column = np.full(gatherer.images, -1, np.int64)
    column[known.images] = np.arange(len(known.images))
    size = max(1, _SCORE_CELLS // max(1, len(known.images)))

    def blocks() -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        for low in range(0, gatherer.m, size):
            high = min(low + size, gatherer.m)
            part = slice(postings.start[low], postings.start[high])
            row = column[postings.image[part]]
            taken = row >= 0
            place = row[taken], postings.feature[part][taken] - low
            largest = np.zeros((len(known.images), high - low), np.float32)
            mean = np.zeros_like(largest)
            largest[place] = postings.value[part][taken]
            mean[place] = postings.total[part][taken] / (gatherer.steps * gatherer.tokens)
            yield slice(low, high), largest, mean

    return ground_truth.score(blocks(), known.has[:, keep], reports, m=gatherer.m), tags


def _arrays(
    postings: Postings,
    gatherer: Gatherer,
    ranks: np.ndarray,
    maps: HeatMaps,
    selection: Selection,
) -> dict[str, np.ndarray]:
    """Statistics, examples and heat maps in the shapes of the index."""
    count = gatherer.active.sum(1)
    mean = gatherer.total.sum(1) / np.maximum(count, 1)
    heat_start, heat_token, heat_value = maps.result()
    # Offsets of the examples that exist, spread over the table; an empty place starts where the next one does.
    exists = ranks.reshape(-1) >= 0
    start = heat_start[np.concatenate([np.cumsum(exists) - exists, [exists.sum()]])]
    m, e = ranks.shape
    start = start[np.arange(m)[:, None] * e + np.arange(e + 1)]
    _, _, images, steps, tokens = selection
    cells = {
        "example_image": images[postings.image].astype(np.int64),
        "example_step": steps[postings.row // tokens].astype(np.int32),
        "example_token": (postings.row % tokens).astype(np.int32),
        "example_value": postings.value,
    }
    table = {}
    for name, column in cells.items():
        empty = np.zeros(1, column.dtype) if name == "example_value" else -np.ones(1, column.dtype)
        table[name] = np.concatenate([column, empty])[ranks]
    rows = gatherer.images * tokens
    return table | {
        "density": count / max(1, gatherer.rows),
        "image_count": np.diff(postings.start).astype(np.int64),
        "mean": mean.astype(np.float32),
        "maximum": gatherer.maximum,
        "histogram": maps.histogram,
        "step_mean": (gatherer.total / rows).astype(np.float32),
        "step_density": (gatherer.active / rows).astype(np.float32),
        "heat_start": start.astype(np.int64),
        "heat_token": heat_token,
        "heat_value": heat_value,
    }


def _order_by_words(words: Words, gatherer: Gatherer) -> np.ndarray:
    """Without ground truth: the features with the most telling word first, dead ones last."""
    z = words.z[:, 0] if words.z.shape[1] else np.zeros(gatherer.m)
    return np.lexsort((-z, gatherer.maximum <= 0)).astype(np.int32)


def _source(coder: Coder) -> np.ndarray:
    source = coder.dictionary.source
    return np.full((coder.m, 3), -1, np.int32) if source is None else source.astype(np.int32)


def _facts(
    config: IndexConfig, coder: Coder, selection: Selection, prompts: list[str]
) -> dict[str, Any]:
    """What the JSON file says beside what the arrays give."""
    store, site, images, steps, _ = selection
    dictionary = coder.dictionary
    card = {key: value for key, value in dictionary.card.items() if key != "sources"}
    same = card.get("store_fingerprint") == store.fingerprint
    source_prompts: list[str] = []
    if dictionary.source is not None and same:
        source_prompts = [store.prompts[image] for image in dictionary.source[:, 0]]
    return {
        "kind": dictionary.kind,
        "site": site,
        "stream": parse_site(site).stream,
        "m": coder.m,
        "d": coder.d,
        "k": coder.k,
        "grid": [int(side) for side in store.grid],
        "steps": [int(step) for step in steps],
        "sigmas": [float(store.sigmas[step]) for step in steps],
        "split": config.split,
        "images": images.tolist(),
        "prompts": prompts,
        "seeds": [int(store.seeds[image]) for image in images],
        "source_prompts": source_prompts,
        "dictionary": {"card": json.loads(json.dumps(card, default=str))},
        "store": {
            "path": _relative(store.path, config.out),
            "fingerprint": store.fingerprint,
            "model": json.loads(json.dumps(store.attrs.get("model", {}), default=str)),
            "trained_on": same,
        },
    }


def _relative(store: Path | str, out: Path) -> str:
    """The store's path seen from the index, so that both can move together; a URL as it is."""
    if isinstance(store, str):
        return store
    return Path(os.path.relpath(store.resolve(), out.resolve())).as_posix()
