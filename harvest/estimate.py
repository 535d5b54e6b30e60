"""What a harvest will take, before anything runs: rows, bytes on disk, memory and time."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from harvest.models import DTYPES, LoadedModel, read_config
from harvest.plan import Plan
from harvest.store import Location, check_extends, images_there
from harvest.units import duration, size

_BYTES = {"none": None, "int8": 1.0, "nf4": 0.53}
"""Bytes per weight; None means those of the dtype. NF4 takes 4 bits and its part of the scales."""
_REACHED = 0.5
"""Share of a large matrix product's speed that a whole forward pass reaches."""


class Estimate(NamedTuple):
    """What a harvest takes, or what is left of it where its store is there.

    Attributes:
        images: images that the store lacks.
        sites: sites that it lacks.
        rows: activation vectors, over all sites.
        store_bytes: activations and pictures on the disk, before compression.
        model_bytes: weights of the parts that are in memory at the same time.
        buffer_bytes: activations in memory.
        flops: floating-point operations of the transformer.
        seconds: time, extrapolated from the speed of one matrix product on the device.
        free: bytes left on the disk, or None for a URL.
    """

    images: int
    sites: tuple[str, ...]
    rows: int
    store_bytes: int
    model_bytes: int
    buffer_bytes: int
    flops: float
    seconds: float
    free: int | None


def estimate(plan: Plan, model: LoadedModel) -> Estimate:
    """Work out what a harvest takes.

    Args:
        plan: what it will make.
        model: loaded with `parts="none"`.

    Raises:
        ValueError: the store there holds something else.
    """
    config, spec = plan.config, plan.spec
    there, added = 0, tuple(spec.sites)
    if plan.there is not None:
        check_extends(plan.there, spec, plan.part)
        there = images_there(plan.there)
        added = tuple(site for site in spec.sites if site not in plan.there.sites)
    missing = spec.images - there
    # Sites: images that are made for it.
    counts = {site: spec.images if site in added else missing for site in spec.sites}
    rows = {site: count * spec.steps * spec.sites[site][0] for site, count in counts.items()}
    per_image = sum(tokens * d for tokens, d in spec.sites.values()) * spec.steps * 2
    stored = sum(rows[site] * spec.sites[site][1] * 2 for site in spec.sites)
    pictures = 0 if spec.picture is None else missing * prod(spec.picture) * 3
    parameters = _parameters(model.folder)
    whole = DTYPES[config.dtype].itemsize
    quantized = {"transformer": config.quantize, "text_encoder_2": config.quantize_text}
    weights = {
        part: count * (_BYTES[quantized.get(part, "none")] or whole)
        for part, count in parameters.items()
    }
    text = sum(weights[part] for part in ("text_encoder", "text_encoder_2"))
    image = sum(weights.values()) - text
    tokens = prod(spec.grid) + config.max_sequence_length
    flops = _flops(model.pipe.transformer, parameters["transformer"], tokens)
    flops *= config.steps * (spec.images if added else missing)
    shard = min(config.images_per_shard, spec.images)
    return Estimate(
        images=missing,
        sites=added,
        rows=sum(rows.values()),
        store_bytes=stored + pictures,
        model_bytes=int(max(text, image) if config.offload == "text" else text + image),
        buffer_bytes=2 * (min(config.batch, shard) + shard) * per_image,
        flops=flops,
        seconds=flops / (_REACHED * _matmul_rate(model.place, DTYPES[config.dtype])),
        free=Location(config.out).free(),
    )


def in_words(expected: Estimate, plan: Plan) -> str:
    """An estimate in words, for a terminal."""
    config, spec = plan.config, plan.spec
    compressed = " before compression" if config.compress != "none" else ""
    left = "" if expected.free is None else f" ({size(expected.free)} are free)"
    images, sites = f"{expected.images:,}", _some(len(spec.sites), "site")
    if plan.there is not None:
        images = f"{expected.images:,} more, {spec.images:,} in all,"
        if expected.sites:
            sites += f", {', '.join(expected.sites)} added"
    lines = [
        f"{Location(config.out)}: not {'made' if plan.there is None else 'added to'} (--dry-run)",
        f"  images   {images} of {_some(spec.denoising_steps, 'step')}, {spec.steps} kept",
        f"  rows     {expected.rows:,} at {sites}",
        f"  disk     {size(expected.store_bytes)}{compressed}{left}",
        f"  memory   {size(expected.model_bytes)} of weights, {size(expected.buffer_bytes)} of activations at most",
        f"  time     about {duration(expected.seconds)} on one {config.device} in {config.dtype} (from its speed at one matrix product)",
    ]
    if expected.free is not None and expected.store_bytes > expected.free:
        lines.append("  the disk is too small: ask for fewer images, sites, steps or tokens")
    return "\n".join(lines)


def _some(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _parameters(folder: Path) -> dict[str, int]:
    """Number of weights of each part, from its config alone."""
    from diffusers import AutoencoderKL, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    makers: dict[str, Callable[[dict[str, Any]], Any]] = {
        "transformer": FluxTransformer2DModel.from_config,
        "vae": AutoencoderKL.from_config,
        "text_encoder": lambda settings: CLIPTextModel(CLIPTextConfig(**settings)),
        "text_encoder_2": lambda settings: T5EncoderModel(T5Config(**settings)),
    }
    with torch.device("meta"):
        parts = {name: make(read_config(folder, name)) for name, make in makers.items()}
    return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}


def _flops(transformer: Any, parameters: int, tokens: int) -> float:
    """Operations of one forward pass of one image: its matrix products and its attention.

    A token passes half of a double block's weights (each stream has its own), and adaLN's weights act on one vector
    an image. Both are counted in full, which makes this an upper bound.
    """
    config = transformer.config
    width = config.num_attention_heads * config.attention_head_dim
    layers = config.num_layers + config.num_single_layers
    return 2.0 * parameters * tokens + 4.0 * layers * tokens**2 * width


def _matmul_rate(place: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of two large matrices, best of three."""
    side = 4096 if place.type == "cuda" else 1024
    left = torch.randn(side, side, dtype=dtype, device=place)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        (left @ left).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2.0 * side**3 / best
