"""What a harvest will make: every default filled in, and the store's spec."""

from __future__ import annotations

from collections.abc import Sequence
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
from harvest.store import Location, Store, StoreSpec, existing_store, stages_of, stream_of

_BATCH_TOKENS = 16384
_SHARD_BYTES = 64 * 2**20
_SHARD_BATCHES = 16
_MB = 1e6
_SMALL_STORE = 4096
"""Images up to which a shard may be larger than its store, so that more images may follow."""
_OPERATIONAL = ("out", "buffer_mb", "offload", "dry_run")
"""Settings that change how a store is made, but not what is in it."""


class Plan(NamedTuple):
    """A harvest as it will be made.

    Attributes:
        config: the settings, with every default filled in.
        spec: what the store will hold.
        prompts: the prompts found, each once.
        there: the store at its place, if there is one.
    """

    config: HarvestConfig
    spec: StoreSpec
    prompts: PromptList
    there: Store | None = None

    def part(self, images: int, sites: Sequence[str]) -> StoreSpec:
        """The spec of the first images and of some sites alone, of prompts in the file that the store there names."""
        spec = self.spec.part(images, sites)
        config = spec.attrs["config"] | {"images": images, "sites": list(spec.sites)}
        if self.there is not None:
            config["prompts"] = self.there.attrs.get("config", {}).get("prompts")
        changed = {"config": config, "prompts_sha256": prompts_hash(spec.prompts)}
        return replace(spec, attrs={**spec.attrs, **changed})


def make_plan(config: HarvestConfig, model: LoadedModel) -> Plan:
    """Work out everything about a harvest before the first image.

    Args:
        config: the settings as given.
        model: the model, loaded or not.

    Raises:
        ValueError: the prompts cannot be read, the model lacks a site, or one batch does not fit
            into `buffer_mb`.
    """
    there = existing_store(Location(config.out))
    config = _as_there(config, model, there)
    found = read_prompts(
        config.prompts, config.images, seed=config.seed, prompt_column=config.prompt_column
    )
    if not config.images:
        config = replace(config, images=max(len(found.prompts), _images(there)))
    config = _resolve(config, model)
    return Plan(config, _spec(config, model, found.fill(config.images)), found, there)


def _as_there(config: HarvestConfig, model: LoadedModel, there: Store | None) -> HarvestConfig:
    """Take what a setting leaves open from the store there, and add its sites to any that it lacks."""
    blocks = {"double": model.info["double"], "single": model.info["single"]}
    sites = expand_sites(config.sites, **blocks)
    if there is None:
        return replace(config, sites=sites)
    kept = there.attrs.get("config", {})
    stored = list(stages_of(there).values())[-1]["sites"]
    if set(sites) - set(stored):
        sites = expand_sites((*stored, *sites), **blocks)
    return replace(
        config,
        sites=sites,
        images=config.images or (_images(there) if config.prompts == "shapes" else 0),
        batch=config.batch or kept.get("batch", 0),
        images_per_shard=config.images_per_shard or kept.get("images_per_shard", 0),
    )


def _images(there: Store | None) -> int:
    return 0 if there is None else list(stages_of(there).values())[-1]["images"]


def _resolve(config: HarvestConfig, model: LoadedModel) -> HarvestConfig:
    """Fill in every default that depends on the model or the memory; none depends on the number of images, so that more may follow."""
    size = (config.height or model.size[0], config.width or model.size[1])
    grid = model.grid(size)
    steps = config.steps or model.steps
    length = config.max_sequence_length or model.max_sequence_length
    numbers = config.numbers(steps)
    shapes = [_shape(model, site, grid, length, config.tokens_per_image) for site in config.sites]
    image_bytes = sum(tokens * d for tokens, d in shapes) * len(numbers) * 2
    # In images: there are two batches and two shards at a time.
    room = config.buffer_mb * _MB / (4 * image_bytes)
    batch = config.batch or min(16, max(1, _BATCH_TOKENS // (grid[0] * grid[1])), int(room) or 1)
    batches = min(_SHARD_BATCHES, max(1, _SHARD_BYTES // (image_bytes * batch)))
    per_shard = min(config.images_per_shard, max(config.images, _SMALL_STORE))
    per_shard = per_shard or batch * max(1, min(batches, int(room // batch)))
    shard = min(per_shard, config.images)
    needed = 2 * (min(batch, shard) + shard) * image_bytes
    if needed > config.buffer_mb * _MB:
        raise ValueError(
            f"--buffer-mb: expected room for two batches of {min(batch, shard)} and two shards of {shard} "
            f"images of these sites, {units.size(needed)}, got {units.size(config.buffer_mb * _MB)}; raise "
            "it, lower --batch or --images-per-shard, or ask for fewer sites, steps or tokens"
        )
    return replace(
        config,
        model=model.name,
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
