"""The feature index: when every feature of a dictionary fires on a store, as arrays in one folder.

Two files hold it, readable without this package:

* `index.npz`: the arrays, one row a feature (see `ARRAYS`);
* `index.json`: format and version, dictionary, store, prompts, words, tags, and hashes of the arrays and of itself.

`summary.json` and `config.json` are beside them. Heat maps are sparse: the tokens where the feature is active at the
step of an example, and their values.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from harvest.atomic import write_json
from harvest.hashing import hash_file
from jaxdict.dictionary import read_facts

FORMAT = "jaxdict-index"
VERSION = 1
FACTS_FILE = "index.json"
ARRAYS_FILE = "index.npz"
SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.json"
_HASH, _OLD_HASH = "arrays_xxh3_128", "arrays_sha256"
FILES = (FACTS_FILE, ARRAYS_FILE, SUMMARY_FILE, CONFIG_FILE)

# name -> (dtype, shape); letters are m features, s steps, b bins, e examples, w words, t tags, h heat entries
ARRAYS: dict[str, tuple[str, str]] = {
    "density": ("float64", "m"),
    "image_count": ("int64", "m"),
    "mean": ("float32", "m"),
    "maximum": ("float32", "m"),
    "histogram": ("int64", "m b"),
    "step_mean": ("float32", "m s"),
    "step_density": ("float32", "m s"),
    "example_image": ("int64", "m e"),
    "example_step": ("int32", "m e"),
    "example_token": ("int32", "m e"),
    "example_value": ("float32", "m e"),
    "heat_start": ("int64", "m e+1"),
    "heat_token": ("int32", "h"),
    "heat_value": ("float32", "h"),
    "strong_count": ("int64", "m"),
    "word": ("int32", "m w"),
    "word_with": ("int64", "m w"),
    "word_without": ("int64", "m w"),
    "word_log_odds": ("float32", "m w"),
    "word_z": ("float32", "m w"),
    "auroc_selected": ("float32", "m t"),
    "auroc": ("float32", "m t"),
    "pooling": ("uint8", "m t"),
    "best_tag": ("int32", "m"),
    "tag_feature": ("int32", "t"),
    "order": ("int32", "m"),
    "source": ("int32", "m 3"),
}

_FACTS: dict[str, type | tuple[type, ...]] = {
    "kind": str,
    "site": str,
    "stream": str,
    "m": int,
    "d": int,
    "k": int,
    "grid": list,
    "tokens": int,
    "steps": list,
    "captured_steps": list,
    "sigmas": list,
    "split": str,
    "images": list,
    "prompts": list,
    "seeds": list,
    "words": list,
    "tags": list,
    "top": int,
    "rows": int,
    "fvu": (float, int, type(None)),
    "l0": (float, int),
    "dictionary": dict,
    "store": dict,
    "summary": dict,
}


@dataclass(frozen=True, eq=False)
class FeatureIndex:
    """A feature index: `facts` is the JSON file, the rest are arrays with one row a feature.

    Attributes:
        facts: kind, site, stream, m, d, k, grid, steps (denoising), captured_steps (their indices in the store), prompts, seeds, words, tags, dictionary, store, summary, ...
        density: share of all rows where the feature is active (value above 0).
        image_count: images where it is active at least once.
        mean: mean value over the rows where it is active; 0 if never.
        maximum: largest value; 0 if never active.
        histogram: counts of positive values in equal bins from 0 to `maximum`.
        step_mean: mean value over all rows of a step, zeros included.
        step_density: share of the rows of a step where it is active.
        example_image: image (in the store) of each example, -1 where there is none; the first `facts["top"]` columns
            are the strongest images in order, the others come from further down the feature's range.
        example_step: denoising step of the example's strongest row.
        example_token: token of the example's strongest row.
        example_value: its value.
        heat_start: offsets of each example's heat in `heat_token` and `heat_value`: that of example j of feature f is
            at heat_start[f, j] to heat_start[f, j + 1].
        heat_token: tokens where the feature is active at the example's step.
        heat_value: values there.
        strong_count: images where its largest value is at least half its maximum.
        word: indices into `facts["words"]`, -1 where there is none; most telling first.
        word_with: strong images whose prompt has the word.
        word_without: other images whose prompt has the word.
        word_log_odds: smoothed log-odds ratio of the word in strong images against the others.
        word_z: the log-odds ratio over its standard error.
        auroc_selected: AUROC for each tag on the half of the images that chooses.
        auroc: AUROC on the other half, which is the one to report. NaN where a tag has too few images.
        pooling: 0 = the image's largest value, 1 = its mean value; chosen on the first half.
        best_tag: the tag with the largest `auroc_selected`, -1 without tags or if never active.
        tag_feature: for each tag the feature with the largest `auroc_selected`.
        order: features, clearest first: by `auroc_selected` of their best tag.
        source: (image, denoising step, token) that an ITDA atom came from, else -1.
    """

    facts: dict[str, Any]
    density: np.ndarray
    image_count: np.ndarray
    mean: np.ndarray
    maximum: np.ndarray
    histogram: np.ndarray
    step_mean: np.ndarray
    step_density: np.ndarray
    example_image: np.ndarray
    example_step: np.ndarray
    example_token: np.ndarray
    example_value: np.ndarray
    heat_start: np.ndarray
    heat_token: np.ndarray
    heat_value: np.ndarray
    strong_count: np.ndarray
    word: np.ndarray
    word_with: np.ndarray
    word_without: np.ndarray
    word_log_odds: np.ndarray
    word_z: np.ndarray
    auroc_selected: np.ndarray
    auroc: np.ndarray
    pooling: np.ndarray
    best_tag: np.ndarray
    tag_feature: np.ndarray
    order: np.ndarray
    source: np.ndarray

    def __post_init__(self) -> None:
        """Check every array against the facts."""
        _check(self)

    @property
    def m(self) -> int:
        """Number of features."""
        return int(self.facts["m"])

    @property
    def alive(self) -> np.ndarray:
        """Bool [m]: whether a feature is active at least once."""
        return self.maximum > 0

    def examples(self, feature: int) -> np.ndarray:
        """Columns of a feature's examples."""
        return np.flatnonzero(self.example_image[feature] >= 0)

    def heat(self, feature: int, example: int) -> np.ndarray:
        """Float32 [tokens]: the feature's value on every token of an example's image, at its step."""
        heat = np.zeros(self.facts["tokens"], np.float32)
        part = slice(
            int(self.heat_start[feature, example]), int(self.heat_start[feature, example + 1])
        )
        heat[self.heat_token[part]] = self.heat_value[part]
        return heat


def save_index(index: FeatureIndex, folder: Path) -> None:
    """Write the arrays, then the facts with the hashes of both, into an existing folder."""
    arrays = folder / ARRAYS_FILE
    with open(arrays, "wb") as file:
        np.savez(file, **{name: getattr(index, name) for name in ARRAYS})
    facts = {"format": FORMAT, "version": VERSION, _HASH: hash_file(arrays), **index.facts}
    write_json(folder / FACTS_FILE, facts, indent=1, allow_nan=False, hashed=True)


def load_index(path: str | os.PathLike[str], *, verify: bool = True) -> FeatureIndex:
    """Read and check a feature index.

    Args:
        path: a folder written by `jaxdict interp index`.
        verify: whether both files have to have the hashes that were written into it.

    Returns:
        The index.

    Raises:
        FileNotFoundError: there is no such folder, or one of its two files is missing.
        ValueError: it is not an index, or a newer version's, or damaged.
    """
    folder = Path(os.path.expanduser(path))
    for name in (FACTS_FILE, ARRAYS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"expected {name} in {folder}, found none: this is not a feature index; "
                "make one with `jaxdict interp index`"
            )
    facts = read_facts(folder / FACTS_FILE, format=FORMAT, version=VERSION, verify=verify)
    arrays = folder / ARRAYS_FILE
    hashes = {_HASH: facts.pop(_HASH, None), _OLD_HASH: facts.pop(_OLD_HASH, None)}
    if verify and not _has_one_of(arrays, hashes):
        raise ValueError(
            f"{arrays}: expected the arrays that {FACTS_FILE} describes, found others or a damaged "
            "file; make the index again"
        )
    try:
        with np.load(arrays, allow_pickle=False) as data:
            fields = {name: data[name] for name in data.files}
    except (zipfile.BadZipFile, ValueError, OSError) as error:
        raise ValueError(f"{arrays}: expected numpy arrays, found {error}") from None
    if set(fields) != set(ARRAYS):
        odd = ", ".join(sorted(set(fields) ^ set(ARRAYS)))
        raise ValueError(f"{arrays}: expected the arrays of an index, missing or unknown: {odd}")
    try:
        return FeatureIndex(facts=facts, **fields)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}; make the index again") from None


def _check(index: FeatureIndex) -> None:
    """Check that facts and arrays fit each other.

    Raises:
        ValueError: they do not; the message names the field.
    """
    facts = index.facts
    for name, kind in _FACTS.items():
        if name not in facts or not isinstance(facts[name], kind):
            raise ValueError(f"{name}: expected it among the facts, got {facts.get(name)!r:.60}")
    e = index.example_image.shape[-1]
    sizes = {
        "m": facts["m"],
        "s": len(facts["steps"]),
        "e": e,
        "e+1": e + 1,
        "t": len(facts["tags"]),
        "b": index.histogram.shape[-1],
        "w": index.word.shape[-1],
        "h": index.heat_token.shape[-1],
        "3": 3,
    }
    for name, (dtype, letters) in ARRAYS.items():
        value = getattr(index, name)
        shape = tuple(sizes[letter] for letter in letters.split())
        if value.dtype != np.dtype(dtype) or value.shape != shape:
            raise ValueError(
                f"{name}: expected {dtype} {list(shape)}, got {value.dtype.name} {list(value.shape)}"
            )
    if not 1 <= facts["top"] <= e:
        raise ValueError(f"top: expected 1 to {e} (the examples of a feature), got {facts['top']}")
    if not len(facts["images"]) == len(facts["prompts"]) == len(facts["seeds"]):
        raise ValueError("images, prompts, seeds: expected one of each an image, got others")
    flat = index.heat_start.reshape(-1)
    if flat.size and (flat[0] < 0 or flat[-1] != sizes["h"] or (np.diff(flat) < 0).any()):
        raise ValueError("heat_start: expected rising offsets into heat_token, got others")
    for name, limit in (
        ("heat_token", facts["tokens"]),
        ("word", len(facts["words"])),
        ("best_tag", sizes["t"]),
        ("tag_feature", facts["m"]),
        ("order", facts["m"]),
    ):
        value = getattr(index, name)
        if value.size and not (value.min() >= -1 and value.max() < limit):
            raise ValueError(f"{name}: expected indices below {limit}, got {value.max()}")


def _has_one_of(arrays: Path, hashes: dict[str, str | None]) -> bool:
    """Whether the arrays have the hash that the facts name; those of an earlier jaxdict name SHA-256."""
    if hashes[_HASH] is not None:
        return hashes[_HASH] == hash_file(arrays)
    with open(arrays, "rb") as reader:
        return hashes[_OLD_HASH] == hashlib.file_digest(reader, "sha256").hexdigest()
