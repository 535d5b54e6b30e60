"""Where prompts come from, which split a prompt is in, and which seed an image has."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Prompt(NamedTuple):
    """A prompt and what is known to be true of its picture.

    Args:
        text: What the model is asked for.
        labels: Attribute -> values, for example ``{"colour": ["red"]}``; ``{}`` where unknown.
    """

    text: str
    labels: dict[str, list[str]]


def load_prompts(source: str, images: int = 0, *, seed: int = 0) -> list[Prompt]:
    """Give one prompt for each image.

    Args:
        source: ``shapes`` for captions of the embedded world, drawn from `seed`; or a file:
            ``.txt`` with a prompt a line; ``.jsonl`` with an object a line, its ``prompt`` and
            perhaps its ``labels``; ``.csv`` with a column ``prompt``, its other columns labels.
        images: How many; prompts of a file are repeated in order as needed. 0 means each prompt of
            the file once, or 1000 captions.
        seed: Seed of the captions; caption i depends on `seed` and i only.

    Returns:
        `images` prompts.

    Raises:
        ValueError: If the file is of another kind, empty or malformed, naming the line.
    """
    if source == "shapes":
        return _captions(images or 1000, seed)
    path = Path(source)
    if path.suffix not in _READERS:
        raise ValueError(
            f"expected prompts to be shapes or a .txt, .jsonl or .csv file, got {source!r}"
        )
    if not path.is_file():
        raise ValueError(f"expected a file of prompts at {path}, but nothing is there")
    try:
        found = _READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"expected {path} to be UTF-8 text, got {error.reason}") from error
    if not found:
        raise ValueError(f"expected at least one prompt in {path}, got an empty file")
    return [found[i % len(found)] for i in range(images or len(found))]


def split_of(prompt: str, validation: float) -> int:
    """Split of a prompt, by its hash alone: the same prompt is in the same split everywhere.

    Args:
        prompt: Its text.
        validation: Share of prompts that is held out, in [0, 1).

    Returns:
        0 for training, 1 for validation.
    """
    digest = hashlib.sha256(prompt.encode()).digest()
    return int(int.from_bytes(digest[:8], "big") < validation * 2**64)


def image_seed(seed: int, image: int) -> int:
    """Seed of the noise of one image, from the run's seed and the image's number.

    Args:
        seed: Seed of the run.
        image: Number of the image.

    Returns:
        A whole number below 2**53 (exact in JSON).
    """
    state = np.random.SeedSequence((seed, image)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(11))


def _captions(images: int, seed: int) -> list[Prompt]:
    from harvest.shapes import draw

    scenes = [draw.sample_scene(np.random.default_rng((seed, i))) for i in range(images)]
    return [Prompt(draw.caption(scene), draw.labels(scene)) for scene in scenes]


def _read_txt(path: Path) -> list[Prompt]:
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [Prompt(line.strip(), {}) for line in lines if line.strip()]


def _read_jsonl(path: Path) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        wanted = f"expected line {number} of {path} to be an object with a text 'prompt'"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{wanted}, got no JSON ({error.msg})") from error
        if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
            raise ValueError(f"{wanted}, got {line[:80]}")
        prompts.append(Prompt(entry["prompt"], _labels(entry.get("labels") or {}, wanted)))
    return prompts


def _read_csv(path: Path) -> list[Prompt]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if "prompt" not in (rows.fieldnames or ()):
            raise ValueError(f"expected a column 'prompt' in {path}, got {rows.fieldnames}")
        prompts = []
        for row in rows:
            if not (row["prompt"] or "").strip():
                raise ValueError(f"expected a prompt in line {rows.line_num} of {path}, got none")
            others = {k: [v] for k, v in row.items() if k and k != "prompt" and v}
            prompts.append(Prompt(row["prompt"].strip(), others))
    return prompts


def _labels(labels: Any, wanted: str) -> dict[str, list[str]]:
    if not isinstance(labels, dict):
        raise ValueError(f"{wanted} and 'labels' from attributes to values, got {labels!r}")
    lists = {k: v if isinstance(v, list) else [v] for k, v in labels.items()}
    if not all(isinstance(value, str) for values in lists.values() for value in values):
        raise ValueError(f"{wanted} and labels that are texts, got {labels!r}")
    return lists


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
