"""What an activation store holds: its spec, its fingerprint and its chunks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

FORMAT = "jaxdict-activations"
VERSION = 2
COMPRESSIONS = ("none", "zstd")
TARGET_CHUNK = 1_500_000
"""Target size of an inner chunk in bytes: large enough to read fast, small enough to read little."""

PASS = "pass"
"""Attribute of a store to which images or sites are being added: its `stages`, fingerprint -> the images and sites that
a shard so stamped has, and whether its arrays are `ready`."""
READY = "ready"

_RESERVED = (
    *(PASS, "format", "version", "fingerprint", "images", "steps", "images_per_shard", "grid"),
    *("picture", "sites", "words", "prompts", "seeds", "split", "labels", "sigmas", "timesteps"),
    *("denoising_steps", "step_numbers", "positions", "chunk_bytes", "compress"),
)
_UNCOMPARED = ("versions",)


@dataclass(frozen=True)
class StoreSpec:
    """Everything that defines a store's contents, known before the first activation.

    Attributes:
        sites: site -> (tokens, d).
        images: number of images.
        steps: number of captured denoising steps.
        prompts: prompt of each image.
        seeds: seed of each image.
        split: 0 (train) or 1 (validation) for each image.
        labels: ground-truth tags of each image, attribute -> values; `{}` where unknown.
        sigmas: noise level of each captured step, in [0, 1].
        timesteps: the scheduler's timestep of each captured step.
        grid: (h, w) of the image tokens; token t lies at y = t // w, x = t % w.
        words: text token strings of each image, or None where there are none.
        picture: (height, width) of the pictures in pixels, or None to keep no pictures.
        attrs: further attributes (model, scheduler, guidance, resolution, config), JSON-able.
        images_per_shard: images that are written, and resumed, together.
        denoising_steps: denoising steps of an image, captured or not; 0 means `steps`.
        step_numbers: which of them each captured step is, ascending; empty means the first `steps`.
        positions: stream -> positions [images, tokens] of the tokens that are kept of each image, ascending;
            other streams are kept whole.
        chunk_bytes: target size of an inner chunk in bytes.
        compress: `none`, or `zstd` (Zstandard after a byte shuffle).

    Raises:
        ValueError: the lengths disagree, naming the field.
    """

    sites: Mapping[str, tuple[int, int]]
    images: int
    steps: int
    prompts: Sequence[str]
    seeds: Sequence[int]
    split: Sequence[int]
    sigmas: Sequence[float]
    timesteps: Sequence[float]
    grid: tuple[int, int]
    labels: Sequence[Mapping[str, Sequence[str]]] = ()
    words: Sequence[Sequence[str]] | None = None
    picture: tuple[int, int] | None = None
    attrs: Mapping[str, Any] = field(default_factory=dict)
    images_per_shard: int = 64
    denoising_steps: int = 0
    step_numbers: Sequence[int] = ()
    positions: Mapping[str, np.ndarray] = field(default_factory=dict)
    chunk_bytes: int = TARGET_CHUNK
    compress: str = "none"

    def __post_init__(self) -> None:
        """Check that the parts agree."""
        if self.images < 1 or self.steps < 1 or self.images_per_shard < 1 or not self.sites:
            raise ValueError(
                "expected at least one site, image, step and image per shard, got "
                f"{len(self.sites)}, {self.images}, {self.steps} and {self.images_per_shard}"
            )
        for name, length in (
            *(("prompts", self.images), ("seeds", self.images), ("split", self.images)),
            *(("sigmas", self.steps), ("timesteps", self.steps)),
        ):
            if len(getattr(self, name)) != length:
                raise ValueError(f"expected {length} {name}, got {len(getattr(self, name))}")
        if len(self.labels) not in (0, self.images):
            raise ValueError(f"expected {self.images} labels or none, got {len(self.labels)}")
        if self.words is not None and len(self.words) != self.images:
            raise ValueError(f"expected words of {self.images} images, got {len(self.words)}")
        if self.words is not None and len({len(row) for row in self.words}) > 1:
            raise ValueError("expected as many words for each image; pad them to one length")
        numbers, total = self.numbers, self.denoising_steps or self.steps
        if len(numbers) != self.steps or list(numbers) != sorted(
            {n for n in numbers if 0 <= n < total}
        ):
            raise ValueError(
                f"expected {self.steps} ascending numbers of {total} denoising steps, got {list(numbers)}"
            )
        if self.compress not in COMPRESSIONS:
            raise ValueError(
                f"expected compress to be one of {COMPRESSIONS}, got {self.compress!r}"
            )
        if self.chunk_bytes < 1:
            raise ValueError(f"expected chunks of at least 1 byte, got {self.chunk_bytes}")
        for name, (tokens, _) in self.sites.items():
            stream = stream_of(name)
            if stream in self.positions:
                shape = np.shape(self.positions[stream])
                if shape != (self.images, tokens):
                    raise ValueError(
                        f"expected positions of shape {(self.images, tokens)} for {name}, got {shape}"
                    )
                continue
            if stream == "img" and tokens != math.prod(self.grid):
                raise ValueError(f"{name} has {tokens} tokens, but the grid is {self.grid}")
            if stream == "txt" and self.words is not None and tokens != len(self.words[0]):
                raise ValueError(f"{name} has {tokens} tokens, but {len(self.words[0])} words")
        clash = sorted(set(self.attrs) & set(_RESERVED))
        if clash:
            raise ValueError(f"attrs may not hold the store's own names, got {clash}; rename them")

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.images_per_shard)

    @property
    def numbers(self) -> tuple[int, ...]:
        """Which denoising step each captured one is."""
        return tuple(int(n) for n in self.step_numbers) or tuple(range(self.steps))

    def part(self, images: int, sites: Collection[str]) -> StoreSpec:
        """The spec of the first images at some of the sites; `attrs` are left as they are."""
        kept = {name: shape for name, shape in self.sites.items() if name in sites}
        streams = {stream_of(name) for name in kept}
        lists = {
            name: value[:images]
            for name in ("prompts", "seeds", "split", "labels", "words")
            if (value := getattr(self, name)) is not None
        }
        positions = {
            stream: where[:images] for stream, where in self.positions.items() if stream in streams
        }
        return replace(self, sites=kept, images=images, positions=positions, **lists)

    def content(self) -> dict[str, Any]:
        """All fields as plain JSON values (tuples are lists)."""
        plain = {
            "sites": {name: [int(n) for n in shape] for name, shape in self.sites.items()},
            "images": int(self.images),
            "steps": int(self.steps),
            "images_per_shard": int(self.images_per_shard),
            "grid": [int(n) for n in self.grid],
            "picture": None if self.picture is None else [int(n) for n in self.picture],
            "seeds": [int(n) for n in self.seeds],
            "split": [int(n) for n in self.split],
            "sigmas": [float(x) for x in self.sigmas],
            "timesteps": [float(x) for x in self.timesteps],
            "prompts": list(self.prompts),
            "labels": [dict(tags) for tags in self.labels] or [{}] * self.images,
            "words": None if self.words is None else [list(row) for row in self.words],
            "denoising_steps": int(self.denoising_steps or self.steps),
            "step_numbers": list(self.numbers),
            "positions": {
                stream: hashlib.sha256(np.asarray(where, "<i4").tobytes()).hexdigest()
                for stream, where in self.positions.items()
            },
            "chunk_bytes": int(self.chunk_bytes),
            "compress": self.compress,
            **self.attrs,
        }
        return json.loads(json.dumps(plain))


def stream_of(site: str) -> str:
    """`img` or `txt`, from a site's name; empty where the name has none."""
    return next((part for part in site.split(".") if part in ("img", "txt")), "")


def fingerprint(content: Mapping[str, Any]) -> str:
    """Digest of what defines a store's contents.

    Args:
        content: from `StoreSpec.content`; `versions` in it does not count.

    Returns:
        SHA-256 of the canonical JSON text, in hex.
    """
    kept = {name: value for name, value in content.items() if name not in _UNCOMPARED}
    text = json.dumps(kept, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def stamp(digest: str) -> int:
    """First 64 bits of a fingerprint: each finished shard carries it."""
    return int(digest[:16], 16)


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Find where two JSON values differ.

    Args:
        old: one value.
        new: the other value.
        name: dotted path of both, so far.

    Returns:
        (path, old value, new value) of the first difference, or None.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            if not name and key in _UNCOMPARED:
                continue
            path = f"{name}.{key}" if name else str(key)
            found = first_difference(old.get(key), new.get(key), path)
            if found:
                return found
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 3:
        pairs = enumerate(zip(old, new, strict=True))
        return next(((f"{name}[{i}]", a, b) for i, (a, b) in pairs if a != b), None)
    return None if old == new else (name, old, new)


def chunk_shape(
    shape: tuple[int, ...], itemsize: int = 2, target: int = TARGET_CHUNK
) -> tuple[int, ...]:
    """Inner chunk of a shard: whole rows, then tokens, steps, images, near `target` bytes.

    Args:
        shape: shape of the shard, with the width last.
        itemsize: bytes of one value.
        target: target size of the chunk in bytes.

    Returns:
        a shape that divides `shape`.
    """
    chunk = [1] * len(shape)
    chunk[-1] = shape[-1]
    size = shape[-1] * itemsize
    for axis in reversed(range(len(shape) - 1)):
        length = shape[axis]
        divisors = [n for n in range(1, length + 1) if length % n == 0]
        chunk[axis] = min(divisors, key=lambda n: abs(math.log(n * size / target)))
        size *= chunk[axis]
        if chunk[axis] < length:
            break
    return tuple(chunk)
