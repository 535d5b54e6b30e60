"""Where prompts come from, which split a prompt is in, and which seed an image has."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harvest.prompts.readers import COLUMN, FILE_KINDS, FILES, Prompt, read_dataset
from harvest.prompts.text import canonical

_HUB = "hf:"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


class PromptList(NamedTuple):
    """Prompts of one source, each text once.

    Attributes:
        prompts: in the order of the source; of equal texts the first.
        duplicates: how many were left out because an earlier one has the same text.
        blank: how many rows were left out because they hold no prompt.
    """

    prompts: list[Prompt]
    duplicates: int = 0
    blank: int = 0

    @property
    def note(self) -> str:
        """What was found and what was left out, as one line."""
        counts = {"duplicate": self.duplicates, "blank row": self.blank}
        left_out = [f"{n:,} {what}{'s' * (n > 1)}" for what, n in counts.items() if n]
        note = f"{len(self.prompts):,} prompts"
        return note + (f" ({' and '.join(left_out)} left out)" if left_out else "")

    def fill(self, images: int = 0) -> list[Prompt]:
        """One prompt for each image: repeated in order as needed, each once if `images` is 0."""
        return list(islice(cycle(self.prompts), images or len(self.prompts)))


def read_prompts(
    source: str,
    images: int = 0,
    *,
    seed: int = 0,
    prompt_column: str = COLUMN,
    repeats: bool = False,
) -> PromptList:
    """Read the prompts of a source, each once.

    Prompts that differ in white space or in Unicode's ways to write the same text count as the same
    (`harvest.prompts.canonical`). Files are UTF-8, or UTF-16 with a byte-order mark. Captions of the embedded
    world are kept as drawn, equal ones included, since caption i depends on `seed` and i only.

    Args:
        source: one of

            - `shapes`: captions of the embedded world, drawn from `seed`;
            - a `.txt` file with a prompt a line;
            - a `.jsonl` file with an object a line, its prompt and perhaps its `labels`;
            - a `.csv` or `.tsv` file with a column of prompts, its other columns being labels;
            - a `.json` file with a list of objects or texts, or of captions in COCO's form (`annotations`,
              each with a `caption`);
            - a `.parquet` file with a column of prompts and perhaps one of `labels`
              (needs pyarrow);
            - `hf:owner/name`, `hf:owner/name/config` or `hf:owner/name:split`, a data set of
              the hub that is streamed, or a folder of files that `datasets` can load (needs
              datasets); plain `owner/name` works too, unless there is a file of that name. The split is `train`
              unless there is only one.
        images: how many are needed at most; no more of the source is read. 0 means all of them, or
            1000 captions.
        seed: seed of the captions.
        prompt_column: field or column with the prompts, for all kinds but `shapes` and `.txt`.
            Where there is no `prompt`, the default also finds `caption` or `text`, if there is
            just one of them.
        repeats: keep equal texts, each with its own seed.

    Returns:
        the prompts, at least one, and how many were left out.

    Raises:
        ValueError: the source is of another kind, empty, malformed (naming the line) or
            unreachable, or a package that it needs is missing.
    """
    if source == "shapes":
        return PromptList(_captions(images or 1000, seed))
    path = Path(os.path.expanduser(source))
    kind = path.suffix.lower()
    if kind in FILES and not source.startswith(_HUB) and not path.is_dir():
        if not path.is_file():
            raise ValueError(f"expected a file of prompts at {path}, but nothing is there")
        rows = FILES[kind](path, prompt_column)
    elif path.is_file() and not source.startswith(_HUB):
        raise ValueError(f"expected prompts in a {FILE_KINDS}, got the file {path}; convert it")
    elif source.startswith(_HUB) or path.is_dir() or _HUB_NAME.fullmatch(source):
        place = str(path) if path.is_dir() else source.removeprefix(_HUB)
        rows = read_dataset(place, prompt_column)
    else:
        raise ValueError(
            f"expected prompts to be shapes, a {FILE_KINDS}, or a data set such as hf:owner/name, "
            f"got {source!r}"
        )
    found = _kept(rows, images, repeats=repeats)
    if not found.prompts:
        raise ValueError(
            f"expected at least one prompt in {source}, got none: it is empty, or every row is blank"
        )
    return found


def prompts_hash(texts: Sequence[str]) -> str:
    """Digest of a list of prompts, its order included.

    Args:
        texts: the prompts.

    Returns:
        SHA-256 of the list as compact JSON, in hex.
    """
    text = json.dumps(list(texts), ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def split_of(prompt: str, validation: float) -> int:
    """Split of a prompt, by the hash of its canonical form alone: the same prompt is in the same split everywhere.

    Args:
        prompt: its text.
        validation: share of prompts that is held out, in [0, 1).

    Returns:
        0 for training, 1 for validation.
    """
    digest = hashlib.sha256(canonical(prompt).encode()).digest()
    return int(int.from_bytes(digest[:8], "big") < validation * 2**64)


def image_seed(seed: int, image: int) -> int:
    """Seed of the noise of one image, from the run's seed and the image's number.

    Args:
        seed: seed of the run.
        image: number of the image.

    Returns:
        a whole number below 2**53 (exact in JSON).
    """
    state = np.random.SeedSequence((seed, image)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(11))


def _captions(images: int, seed: int) -> list[Prompt]:
    from harvest.shapes import draw

    scenes = [draw.sample_scene(np.random.default_rng((seed, i))) for i in range(images)]
    return [Prompt(draw.caption(scene), draw.labels(scene)) for scene in scenes]


def _kept(rows: Iterable[Prompt | None], enough: int, *, repeats: bool) -> PromptList:
    """Keep the first of equal prompts, or all, until there are `enough`; None stands for a row without one."""
    kept: dict[Any, Prompt] = {}
    duplicates = blank = 0
    for prompt in rows:
        if prompt is None:
            blank += 1
            continue
        # Digests rather than texts: long texts that are left out do not stay in memory.
        key = len(kept) if repeats else hashlib.sha256(canonical(prompt.text).encode()).digest()
        if key in kept:
            duplicates += 1
            continue
        kept[key] = prompt._replace(text=prompt.text.strip())
        if len(kept) == enough:
            break
    return PromptList(list(kept.values()), duplicates, blank)
