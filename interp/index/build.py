"""The verb `interp index`: read a store once, encode it with a dictionary, write when each feature fires."""

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

from harvest.atomic import whole_folder, write_json
from harvest.flags import in_memory
from harvest.sites import parse_site
from harvest.store import before, open_store, padding_line, print_split
from interp.config import IndexConfig
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
from interp.index.examples import HeatMaps, example_ranks
from interp.index.postings import CodeStatistics, Postings
from interp.index.summary import summarize
from interp.index.words import Words, telling_words
from interp.overwrite import check_overwrite
from steer.coder import Coder

_STRONG = 0.5
"""Share of a feature's maximum from which on an image counts as strong."""
_KEPT = {
    "bins": (8, "the histograms"),
    "top": (16, "the features' images"),
    "quantiles": (16, "the features' images"),
    "words": (20, "the features' words"),
}
"""Settings of which each feature takes so many bytes in the index, and what takes them."""
_SCORE_CELLS = 2**22
"""Numbers in the largest [images, features] matrix that is scored at once."""


def build_index(config: IndexConfig) -> dict[str, Any]:
    """Index every feature of a dictionary on a store and write the folder `config.out`.

    The activations are read and encoded once. Histograms and heat maps depend on the features' maxima, so the sparse
    codes are kept in a temporary file beside the result and read a second time.

    Args:
        config: what to read and what to keep.

    Returns:
        The summary, also written as summary.json: features, alive, dead_share, images, rows, fvu, l0, `attributes`
        (the median AUROC, and for each tag its feature with the AUROC on both halves), and the five `clearest`.

    Raises:
        FileNotFoundError: the dictionary or the store does not exist.
        FileExistsError: `config.out` holds something other than an index.
        ValueError: the store has no such site, width, step or split, or no finished image.
    """
    check_overwrite(config.out, marker=FACTS_FILE, names=FILES)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    coder = Coder.from_pretrained(config.dictionary, device=device, verify=config.verify)
    for name, (size, what) in _KEPT.items():
        count = getattr(config, name)
        in_memory([name], count, size * coder.m * count, what)
    selection = select(config, coder, open_store(config.store))
    store, _, images, steps, tokens, _ = selection
    print_split(config.split, len(images))
    if parse_site(selection.site).stream == "txt":
        print(padding_line(selection.site, store, rows=selection.rows, left_out=selection.left_out))
    with whole_folder(config.out) as folder:
        statistics = CodeStatistics(coder.m, len(steps), tokens, left_out=selection.left_out)
        with tempfile.TemporaryFile(dir=folder) as file:
            fit = Fit(coder.d_out)
            batches = encode(config, coder, selection, fit)
            sizes = [spill(file, statistics, *batch) for batch in batches]
            file.seek(0)
            postings = statistics.postings()
            ranks = example_ranks(postings.start, top=config.top, quantiles=config.quantiles)
            entry = ranks[ranks >= 0]
            maps = HeatMaps(
                postings.feature[entry],
                postings.image[entry],
                postings.row[entry] // tokens,
                maximum=statistics.maximum,
                steps=len(steps),
                bins=config.bins,
            )
            for size in tqdm(sizes, desc="heat maps", unit="batch", disable=len(sizes) < 20):
                maps.add(*unspill(file, size))
        prompts = [store.prompts[image] for image in images]
        words = _words(postings, statistics, prompts, keep=config.words)
        scores, tags = _scores(postings, statistics, selection, prompts, seed=config.seed)
        arrays = _arrays(postings, statistics, selection, ranks=ranks, maps=maps)
        facts = _facts(config, coder, selection, prompts)
        summary = summarize(statistics, scores, tags, fvu=fit.fvu)
        index = FeatureIndex(
            facts=facts
            | {
                "tokens": tokens,
                "words": words.vocabulary,
                "tags": [list(tag) for tag in tags],
                "tag_counts": scores.counts.tolist(),
                "top": config.top,
                "rows": statistics.rows,
                "fvu": summary["fvu"],
                "l0": summary["l0"],
                "summary": summary,
            },
            strong_count=_strong_count(postings, statistics),
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
            order=scores.order if tags else _order_by_words(words, statistics),
            source=_source(coder),
            **arrays,
        )
        saved = {"verb": "interp index", **dataclasses.asdict(config)}
        write_json(folder / CONFIG_FILE, saved, allow_nan=False)
        write_json(folder / SUMMARY_FILE, summary, allow_nan=False)
        save_index(index, folder)
    print(f"index of {summary['alive']} live features of {coder.m}: {config.out}")
    return summary


def _strong(postings: Postings, statistics: CodeStatistics) -> np.ndarray:
    """Bool [p]: entries whose value is at least half of the feature's maximum."""
    return postings.value >= _STRONG * statistics.maximum[postings.feature]


def _strong_count(postings: Postings, statistics: CodeStatistics) -> np.ndarray:
    strong = postings.feature[_strong(postings, statistics)]
    return np.bincount(strong, minlength=statistics.m).astype(np.int64)


def _words(
    postings: Postings, statistics: CodeStatistics, prompts: list[str], *, keep: int
) -> Words:
    strong = _strong(postings, statistics)
    return telling_words(
        prompts, postings.feature[strong], postings.image[strong], m=statistics.m, keep=keep
    )


def _scores(
    postings: Postings,
    statistics: CodeStatistics,
    selection: Selection,
    prompts: list[str],
    *,
    seed: int,
) -> tuple[ground_truth.Scores, list[tuple[str, str]]]:
    """AUROC for every tag that enough images have and lack; no tags if the store has no labels."""
    store = selection.store
    known = ground_truth.collect_tags([store.labels[image] for image in selection.images])
    reports = ground_truth.halves([prompts[place] for place in known.images], seed=seed)
    keep = ground_truth.enough(known.has, reports)
    tags = [tag for tag, good in zip(known.tags, keep, strict=True) if good]
    column = np.full(statistics.images, -1, np.int64)
    column[known.images] = np.arange(len(known.images))
    size = max(1, _SCORE_CELLS // max(1, len(known.images)))

    def blocks() -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        for low in range(0, statistics.m, size):
            high = min(low + size, statistics.m)
            part = slice(postings.start[low], postings.start[high])
            row = column[postings.image[part]]
            taken = row >= 0
            place = row[taken], postings.feature[part][taken] - low
            largest = np.zeros((len(known.images), high - low), np.float32)
            mean = np.zeros_like(largest)
            largest[place] = postings.value[part][taken]
            tokens = selection.taken[postings.image[part][taken]]
            mean[place] = postings.total[part][taken] / (statistics.steps * tokens)
            yield slice(low, high), largest, mean

    return ground_truth.score(blocks(), known.has[:, keep], reports, m=statistics.m), tags


def _arrays(
    postings: Postings,
    statistics: CodeStatistics,
    selection: Selection,
    *,
    ranks: np.ndarray,
    maps: HeatMaps,
) -> dict[str, np.ndarray]:
    """Statistics, examples and heat maps in the shapes of the index."""
    count = statistics.active.sum(1)
    mean = statistics.total.sum(1) / np.maximum(count, 1)
    heat_start, heat_token, heat_value = maps.result()
    # Offsets of the examples, laid out as the table is: the heat of a place without one is empty.
    exists = ranks.reshape(-1) >= 0
    start = heat_start[np.concatenate([np.cumsum(exists) - exists, [exists.sum()]])]
    m, e = ranks.shape
    start = start[np.arange(m)[:, None] * e + np.arange(e + 1)]
    store, _, images, steps, tokens, taken = selection
    cells = {
        "example_image": images[postings.image].astype(np.int64),
        "example_step": store.step_numbers[steps][postings.row // tokens].astype(np.int32),
        "example_token": (postings.row % tokens).astype(np.int32),
        "example_value": postings.value,
    }
    table = {}
    for name, column in cells.items():
        empty = np.zeros(1, column.dtype) if name == "example_value" else -np.ones(1, column.dtype)
        table[name] = np.concatenate([column, empty])[ranks]
    rows = int(taken.sum())
    return table | {
        "density": count / max(1, statistics.rows),
        "image_count": np.diff(postings.start).astype(np.int64),
        "mean": mean.astype(np.float32),
        "maximum": statistics.maximum,
        "histogram": maps.histogram,
        "step_mean": (statistics.total / rows).astype(np.float32),
        "step_density": (statistics.active / rows).astype(np.float32),
        "heat_start": start.astype(np.int64),
        "heat_token": heat_token,
        "heat_value": heat_value,
    }


def _order_by_words(words: Words, statistics: CodeStatistics) -> np.ndarray:
    """Features by their most telling word, as there is no ground truth; dead ones last."""
    z = words.z[:, 0] if words.z.shape[1] else np.zeros(statistics.m)
    return np.lexsort((-z, statistics.maximum <= 0)).astype(np.int32)


def _source(coder: Coder) -> np.ndarray:
    source = coder.dictionary.source
    if source is None:
        return np.full((coder.m, 3), -1, np.int32)
    source = source.astype(np.int32)
    told = coder.dictionary.card.get("sources") or {}
    if (steps := told.get("denoising_step")) is not None:
        source[:, 1] = np.asarray(steps, np.int32)[source[:, 1]]
    return source


def _facts(
    config: IndexConfig, coder: Coder, selection: Selection, prompts: list[str]
) -> dict[str, Any]:
    """The part of the JSON file that does not depend on the codes."""
    store, site, images, steps, _, _ = selection
    dictionary = coder.dictionary
    card = {key: value for key, value in dictionary.card.items() if key != "sources"}
    same = before(store, str(card.get("store_fingerprint"))) is not None
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
        "steps": store.step_numbers[steps].tolist(),
        "captured_steps": steps.tolist(),
        "sigmas": [float(store.sigmas[step]) for step in steps],
        "split": config.split,
        "padding_left_out": selection.left_out,
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
    """The store's path seen from the index, so that both can move together; a URL stays as it is."""
    if isinstance(store, str):
        return store
    return Path(os.path.relpath(store.resolve(), out.resolve())).as_posix()
