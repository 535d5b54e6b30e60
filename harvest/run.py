"""The harvest loop: prompts through a pipeline, activations and pictures into a store, shard by shard."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from harvest.capture import Capture, site_shape
from harvest.config import HarvestConfig
from harvest.models import LoadedModel, load_model
from harvest.prompts import image_seed, load_prompts, split_of
from harvest.sites import expand_sites
from harvest.store import StoreSpec, StoreWriter, create_store

_BATCH_TOKENS = 16384
_SHARD_BYTES = 64 * 2**20
_SHARD_BATCHES = 16


def harvest(config: HarvestConfig) -> dict[str, Any]:
    """Fill a store, or what is missing of it.

    Images are made in batches that lie within a shard, at fixed places, so a run that was cut off
    and resumed leaves the same bits as one that was not (on one machine and with one number of
    threads, as floating-point sums depend on both).

    Args:
        config: Settings; the store keeps them with every default filled in.

    Returns:
        Summary: where the store is, its fingerprint, images, rows and sites, images made now.

    Raises:
        ValueError: If the settings are wrong, `out` holds another store, or an activation is not
            finite (naming site, step and prompt).
    """
    model = load_model(
        config.model, quantize=config.quantize, dtype=config.dtype, device=config.device
    )
    config = _resolve(config, model)
    spec = _spec(config, model)
    writer = create_store(config.out, spec)
    beside = config.out.with_name(config.out.name + ".config.json")
    _save_json(beside, {name: _plain(value) for name, value in asdict(config).items()})
    made = _fill(writer, spec, config, model)
    writer.sweep()

    rows = {site: spec.images * spec.steps * tokens for site, (tokens, _) in spec.sites.items()}
    done = f"{made} images made, {spec.images - made} were there already"
    print(f"{config.out}: {spec.images} images ({done}), {sum(rows.values()):,} rows")
    return {
        "store": str(config.out),
        "fingerprint": writer.fingerprint,
        "model": model.name,
        "images": spec.images,
        "made": made,
        "steps": spec.steps,
        "rows": rows,
        "config": str(beside),
    }


def _resolve(config: HarvestConfig, model: LoadedModel) -> HarvestConfig:
    """Fill in every default that depends on the model or the prompts."""
    size = (config.height or model.size[0], config.width or model.size[1])
    grid = model.grid(size)
    images = config.images or len(load_prompts(config.prompts, seed=config.seed))
    steps = config.steps or model.steps
    length = config.max_sequence_length or model.max_sequence_length
    batch = config.batch or min(16, max(1, _BATCH_TOKENS // (grid[0] * grid[1])))
    batch = min(batch, images)
    blocks = {"double": model.info["double"], "single": model.info["single"]}
    sites = expand_sites(config.sites, **blocks)
    shapes = [_shape(model, site, grid, length) for site in sites]
    image_bytes = sum(tokens * d for tokens, d in shapes) * steps * 2
    batches = min(_SHARD_BATCHES, max(1, _SHARD_BYTES // (image_bytes * batch)))
    per_shard = config.images_per_shard or batch * batches
    return replace(
        config,
        model=model.name,
        sites=sites,
        images=images,
        steps=steps,
        batch=batch,
        images_per_shard=min(per_shard, images),
        max_sequence_length=length,
        height=size[0],
        width=size[1],
        guidance=model.guidance if config.guidance is None else config.guidance,
        dtype=model.info["dtype"],
        device=model.info["device"],
    )


def _shape(model: LoadedModel, site: str, grid: tuple[int, int], length: int) -> tuple[int, int]:
    tokens = grid[0] * grid[1]
    return site_shape(model.pipe.transformer, site, image_tokens=tokens, text_tokens=length)


def _spec(config: HarvestConfig, model: LoadedModel) -> StoreSpec:
    """What the store will hold, all of it known before the first image."""
    size = (config.height, config.width)
    grid = model.grid(size)
    prompts = load_prompts(config.prompts, config.images, seed=config.seed)
    texts = [prompt.text for prompt in prompts]
    length = config.max_sequence_length
    sigmas, timesteps = model.schedule(config.steps, size)
    scheduler = model.pipe.scheduler
    kept = {name: _plain(value) for name, value in asdict(config).items() if name != "out"}
    return StoreSpec(
        sites={site: _shape(model, site, grid, length) for site in config.sites},
        images=config.images,
        steps=config.steps,
        prompts=texts,
        seeds=[image_seed(config.seed, i) for i in range(config.images)],
        split=[split_of(text, config.validation) for text in texts],
        labels=[prompt.labels for prompt in prompts],
        sigmas=sigmas,
        timesteps=timesteps,
        grid=grid,
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
            "config": kept,
            "versions": {name: version(name) for name in ("torch", "diffusers", "zarr")},
        },
        images_per_shard=config.images_per_shard,
    )


def _fill(writer: StoreWriter, spec: StoreSpec, config: HarvestConfig, model: LoadedModel) -> int:
    """Make what is pending; one shard is written while the next is made. Gives the images made."""
    pending = writer.pending()
    missing = sum(_length(writer.images_of(shard)) for shard in pending)
    rows = sum(tokens for tokens, _ in spec.sites.values()) * spec.steps
    capture = Capture(model.pipe.transformer, list(spec.sites), steps=spec.steps)
    bar = tqdm(
        total=spec.images,
        initial=spec.images - missing,
        unit="image",
        desc="harvest",
        smoothing=0.1,
    )
    writing: Future[None] | None = None
    with bar, capture, ThreadPoolExecutor(1) as background:
        for shard in pending:
            made = _make_shard(writer.images_of(shard), spec, config, model, capture, bar, rows)
            if writing is not None:
                writing.result()
            writing = background.submit(writer.write, shard, *made)
        if writing is not None:
            writing.result()
    return missing


def _make_shard(
    where: slice,
    spec: StoreSpec,
    config: HarvestConfig,
    model: LoadedModel,
    capture: Capture,
    bar: tqdm,
    rows: int,
) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
    """Run the pipeline over one shard; gives bfloat16 bits by site, and the pictures."""
    count = _length(where)
    bits = {
        site: np.empty((count, spec.steps, *shape), np.uint16) for site, shape in spec.sites.items()
    }
    pictures = None if spec.picture is None else np.empty((count, *spec.picture, 3), np.uint8)
    for start in range(0, count, config.batch):
        stop = min(start + config.batch, count)
        chosen = slice(where.start + start, where.start + stop)
        made = model.generate(
            spec.prompts[chosen],
            spec.seeds[chosen],
            steps=spec.steps,
            size=(config.height, config.width),
            max_sequence_length=config.max_sequence_length,
            guidance=config.guidance,
        )
        _check_schedule(spec, model)
        for site, values in capture.take().items():
            bits[site][start:stop] = values.view(torch.int16).numpy().view(np.uint16)
        if pictures is not None:
            pictures[start:stop] = made
        bar.update(stop - start)
        rate = bar.format_dict["rate"]
        if rate:
            bar.set_postfix_str(f"{rate * rows:,.0f} rows/s", refresh=False)
    return bits, pictures


def _check_schedule(spec: StoreSpec, model: LoadedModel) -> None:
    """The store's noise levels were computed before the run: see that they were the ones used."""
    used = model.pipe.scheduler.sigmas[:-1].tolist()
    if used != list(spec.sigmas):
        raise RuntimeError(
            f"the pipeline used noise levels {used}, but the store says {list(spec.sigmas)}; this "
            "version of diffusers schedules otherwise: please report it"
        )


def _length(where: slice) -> int:
    return where.stop - where.start


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _save_json(path: Path, value: Any) -> None:
    """Write at once: the file is the old one or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, path)
