"""What a harvest will make: every default filled in, and the store's spec."""

from __future__ import annotations

from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harvest import units
from harvest.capture import site_shape
from harvest.config import HarvestConfig
from harvest.models import LoadedModel
from harvest.prompts import Prompt, PromptList, image_seed, prompts_hash, read_prompts, split_of
from harvest.sites import STREAMS, expand_sites
from harvest.store import StoreSpec, stream_of

_BATCH_TOKENS = 16384
_SHARD_BYTES = 64 * 2**20
_SHARD_BATCHES = 16
_MB = 1e6
_OPERATIONAL = ("out", "buffer_mb", "offload", "dry_run")
"""Settings that change how a store is made, but not what is in it."""


class Plan(NamedTuple):
    """A harvest as it will be made.

    Attributes:
        config: the settings, with every default filled in.
        spec: what the store will hold.
        prompts: the prompts found, each once.
    """

    config: HarvestConfig
    spec: StoreSpec
    prompts: PromptList


def make_plan(config: HarvestConfig, model: LoadedModel) -> Plan:
    """Work out everything about a harvest before the first image.

    Args:
        config: the settings as given.
        model: the model, loaded or not.

    Raises:
        ValueError: the prompts cannot be read, the model lacks a site, or one batch does not fit
            into `buffer_mb`.
    """
    found = read_prompts(
        config.prompts, config.images, seed=config.seed, prompt_column=config.prompt_column
    )
    config = _resolve(config, model, len(found.prompts))
    return Plan(config, _spec(config, model, found.fill(config.images)), found)


def _resolve(config: HarvestConfig, model: LoadedModel, prompts: int) -> HarvestConfig:
    """Fill in every default that depends on the model, the number of prompts or the memory."""
    size = (config.height or model.size[0], config.width or model.size[1])
    grid = model.grid(size)
    images = config.images or prompts
    steps = config.steps or model.steps
    length = config.max_sequence_length or model.max_sequence_length
    blocks = {"double": model.info["double"], "single": model.info["single"]}
    sites = expand_sites(config.sites, **blocks)
    numbers = config.numbers(steps)
    shapes = [_shape(model, site, grid, length, config.tokens_per_image) for site in sites]
    image_bytes = sum(tokens * d for tokens, d in shapes) * len(numbers) * 2
    # In images: there are two batches and two shards at a time.
    room = config.buffer_mb * _MB / (4 * image_bytes)
    batch = config.batch or min(16, max(1, _BATCH_TOKENS // (grid[0] * grid[1])), int(room) or 1)
    batch = min(batch, images)
    batches = min(_SHARD_BATCHES, max(1, _SHARD_BYTES // (image_bytes * batch)))
    per_shard = config.images_per_shard or batch * max(1, min(batches, int(room // batch)))
    per_shard = min(per_shard, images)
    needed = 2 * (min(batch, per_shard) + per_shard) * image_bytes
    if needed > config.buffer_mb * _MB:
        raise ValueError(
            f"--buffer-mb: expected room for two batches of {batch} and two shards of {per_shard} "
            f"images of these sites, {units.size(needed)}, got {units.size(config.buffer_mb * _MB)}; raise "
            "it, lower --batch or --images-per-shard, or ask for fewer sites, steps or tokens"
        )
    return replace(
        config,
        model=model.name,
        sites=sites,
        images=images,
        steps=steps,
        batch=batch,
        images_per_shard=per_shard,
        max_sequence_length=length,
        height=size[0],
        width=size[1],
        guidance=model.guidance if config.guidance is None else config.guidance,
        quantize_text=model.info["text_quantization"],
        dtype=model.info["dtype"],
        device=model.info["device"],
    )


def _spec(config: HarvestConfig, model: LoadedModel, prompts: list[Prompt]) -> StoreSpec:
    """What the store will hold."""
    size = (config.height, config.width)
    grid = model.grid(size)
    texts = [prompt.text for prompt in prompts]
    length = config.max_sequence_length
    sigmas, timesteps = model.schedule(config.steps, size)
    numbers = config.numbers(config.steps)
    scheduler = model.pipe.scheduler
    picked = config.tokens_per_image
    sites = {site: _shape(model, site, grid, length, picked) for site in config.sites}
    kept = {name: plain(value) for name, value in asdict(config).items()}
    return StoreSpec(
        sites=sites,
        images=config.images,
        steps=len(numbers),
        denoising_steps=config.steps,
        step_numbers=numbers,
        prompts=texts,
        seeds=[image_seed(config.seed, i) for i in range(config.images)],
        split=[split_of(text, config.validation) for text in texts],
        labels=[prompt.labels for prompt in prompts],
        sigmas=[sigmas[n] for n in numbers],
        timesteps=[timesteps[n] for n in numbers],
        grid=grid,
        positions=_positions(config, sites, {"img": grid[0] * grid[1], "txt": length}),
        words=model.words(texts, length),
        picture=size if config.pictures else None,
        attrs={
            "model": model.info,
            "scheduler": {
                "class": type(scheduler).__name__,
                "config": {
                    name: value
                    for name, value in sorted(scheduler.config.items())
                    if not name.startswith("_")
                },
            },
            "guidance": config.guidance,
            "resolution": list(size),
            "config": {name: value for name, value in kept.items() if name not in _OPERATIONAL},
            "prompts_sha256": prompts_hash(texts),
            "versions": {name: version(name) for name in ("torch", "diffusers", "zarr")},
        },
        images_per_shard=config.images_per_shard,
        chunk_bytes=int(config.chunk_mb * _MB),
        compress=config.compress,
    )


def picked_tokens(seed: int, image: int, stream: str, *, tokens: int, count: int) -> np.ndarray:
    """Which tokens of an image are kept, drawn without replacement.

    Args:
        seed: seed of the run.
        image: number of the image.
        stream: `img` or `txt`.
        tokens: length of the stream.
        count: how many to keep.

    Returns:
        positions, ascending, int32 [count].
    """
    rng = np.random.default_rng((seed, image, 1 + STREAMS.index(stream)))
    return np.sort(rng.choice(tokens, count, replace=False)).astype(np.int32)


def plain(value: Any) -> Any:
    """A setting as a JSON value."""
    return str(value) if isinstance(value, Path) else value


def _positions(
    config: HarvestConfig, sites: dict[str, tuple[int, int]], lengths: dict[str, int]
) -> dict[str, np.ndarray]:
    """Positions of the kept tokens, [images, tokens], for each stream that is sampled."""
    streams = {stream_of(site) for site in sites}
    return {
        stream: np.stack(
            [
                picked_tokens(config.seed, i, stream, tokens=tokens, count=config.tokens_per_image)
                for i in range(config.images)
            ]
        )
        for stream, tokens in lengths.items()
        if stream in streams and 0 < config.tokens_per_image < tokens
    }


def _shape(
    model: LoadedModel, site: str, grid: tuple[int, int], length: int, picked: int
) -> tuple[int, int]:
    tokens = grid[0] * grid[1]
    whole, d = site_shape(model.pipe.transformer, site, image_tokens=tokens, text_tokens=length)
    return (min(whole, picked) if picked else whole), d
