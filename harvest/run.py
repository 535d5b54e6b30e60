"""The harvest loop: prompts through a pipeline, activations and pictures into a store, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from harvest.capture import Capture, Enough
from harvest.config import HarvestConfig
from harvest.estimate import estimate, in_words
from harvest.models import LoadedModel, load_model
from harvest.plan import Plan, make_plan, plain
from harvest.prompts import TextCache
from harvest.ranks import Ranks, joined_ranks
from harvest.store import Location, StoreSpec, StoreWriter, create_store
from harvest.units import size


def harvest(config: HarvestConfig) -> dict[str, Any]:
    """Fill a store, or whatever part of it is missing.

    Images are made in fixed batches within each shard, so a run that was interrupted and resumed, or
    shared by several processes, writes the same bits as one that was not (on one machine and with
    one number of threads, as floating-point sums depend on both).

    Args:
        config: settings; the store keeps them with every default filled in.

    Returns:
        summary: where the store is, its fingerprint, images, rows and sites, images made now. After a
        dry run: what it would take.

    Raises:
        ValueError: the settings are wrong, `out` holds another store, or an activation is not
            finite (naming site, step and prompt).
        OSError: the store cannot be written.
    """
    with joined_ranks() as ranks:
        config = replace(config, device=ranks.device(config.device))
        parts = "none" if config.dry_run else "text" if config.offload == "text" else "all"
        model = _load(config, parts)
        plan = make_plan(config, model)
        if ranks.rank == 0 and config.prompts != "shapes":
            print(f"{config.prompts}: {plan.prompts.note}")
        if config.dry_run:
            expected = estimate(plan, model)
            print(in_words(expected, plan))
            return {"store": str(Location(config.out)), "dry_run": True, **expected._asdict()}
        return _harvest(plan, model, config, ranks)


def _harvest(plan: Plan, model: LoadedModel, asked: HarvestConfig, ranks: Ranks) -> dict[str, Any]:
    config, spec, _ = plan
    place = Location(config.out)
    if ranks.rank == 0:
        create_store(config.out, spec)
    ranks.wait()
    writer = create_store(config.out, spec)  # opens the store that rank 0 made
    beside = place.sibling(".config.json")
    if ranks.rank == 0:
        settings = {name: plain(value) for name, value in asdict(config).items()}
        beside.write_text(json.dumps(settings | {"out": str(place)}, indent=2) + "\n")
    pending = writer.pending()
    ranks.wait()  # every rank must have seen the same store before any of them writes
    own = [shard for shard in pending if shard % ranks.world == ranks.rank]
    cache = None
    if config.offload == "text" and own:
        cache = TextCache(place, writer.fingerprint)
        cache.fill(
            model,
            {n: spec.prompts[writer.images_of(n)] for n in own},
            batch=config.batch,
            max_sequence_length=config.max_sequence_length,
        )
        model = _load(asked, "image", instead_of=model)
    made = fill(writer, plan, model, shards=own, cache=cache, quiet=ranks.rank > 0)
    ranks.wait()

    rows = {site: spec.images * spec.steps * tokens for site, (tokens, _) in spec.sites.items()}
    if ranks.rank == 0:
        writer.sweep()
        if config.offload == "text":  # no process needs the folder any more
            TextCache(place, writer.fingerprint).close()
        made = sum(_length(writer.images_of(shard)) for shard in pending)
        done = f"{made} images made, {spec.images - made} were there already"
        print(f"{place}: {spec.images} images ({done}), {sum(rows.values()):,} rows")
    return {
        "store": str(place),
        "fingerprint": writer.fingerprint,
        "model": model.name,
        "images": spec.images,
        "made": made,
        "steps": spec.steps,
        "rows": rows,
        "config": str(beside),
    }


def _load(
    config: HarvestConfig, parts: str, *, instead_of: LoadedModel | None = None
) -> LoadedModel:
    """Load parts of the model, after freeing the text encoders of another."""
    if instead_of is not None:
        for part in ("text_encoder", "text_encoder_2"):
            setattr(instead_of.pipe, part, None)
        if instead_of.place.type == "cuda":
            torch.cuda.empty_cache()
    return load_model(
        config.model,
        quantize=config.quantize,
        quantize_text=config.quantize_text,
        dtype=config.dtype,
        device=config.device,
        offload=config.offload,
        parts=parts,
    )


def fill(
    writer: StoreWriter,
    plan: Plan,
    model: LoadedModel,
    *,
    shards: Sequence[int],
    cache: TextCache | None = None,
    quiet: bool = False,
) -> int:
    """Make shards of a store; one is written while the next is made.

    Args:
        writer: the store.
        plan: what is made.
        model: the model, loaded.
        shards: numbers of the shards.
        cache: their encoded prompts, where the model has no text encoders.
        quiet: show no progress bar.

    Returns:
        the number of images made.
    """
    config, spec, _ = plan
    missing = sum(_length(writer.images_of(shard)) for shard in shards)
    capture = Capture(
        model.pipe.transformer,
        list(spec.sites),
        steps=config.steps,
        numbers=spec.numbers,
        stop=not config.pictures,
    )
    bar = tqdm(
        total=spec.images,
        initial=spec.images - missing,
        unit="image",
        desc="harvest",
        smoothing=0.1,
        disable=quiet,
    )
    writing: Future[None] | None = None
    with bar, capture, ThreadPoolExecutor(1) as writers, ThreadPoolExecutor(1) as copiers:
        for shard in shards:
            shard_text = None if cache is None else cache.read(shard)
            maker = _ShardMaker(plan, model, capture, bar=bar, copiers=copiers)
            made = maker.make(writer.images_of(shard), shard_text)
            if writing is not None:
                writing.result()
            writing = writers.submit(_write, writer, shard, made, cache)
        if writing is not None:
            writing.result()
    return missing


def _write(
    writer: StoreWriter,
    shard: int,
    made: tuple[Mapping[str, np.ndarray], np.ndarray | None],
    cache: TextCache | None,
) -> None:
    writer.write(shard, *made)
    if cache is not None:
        cache.drop(shard)


class _ShardMaker:
    """Runs the pipeline over one shard."""

    def __init__(
        self,
        plan: Plan,
        model: LoadedModel,
        capture: Capture,
        *,
        bar: tqdm,
        copiers: ThreadPoolExecutor,
    ) -> None:
        self.config, spec, _ = plan
        self.spec, self.model, self.capture = spec, model, capture
        self.bar, self.copiers = bar, copiers
        self.rows = sum(tokens for tokens, _ in spec.sites.values()) * spec.steps
        values = sum(tokens * d for tokens, d in spec.sites.values()) * spec.steps
        self.megabytes = values * 2 / 1e6

    def make(
        self, where: slice, text: Mapping[str, torch.Tensor] | None
    ) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
        """bfloat16 bits by site, and the pictures; a batch is copied while the next one is made."""
        spec, config, count = self.spec, self.config, _length(where)
        bits = {
            site: np.empty((count, spec.steps, *shape), np.uint16)
            for site, shape in spec.sites.items()
        }
        pictures = None if spec.picture is None else np.empty((count, *spec.picture, 3), np.uint8)
        copying: Future[None] | None = None
        for start in range(0, count, config.batch):
            own = slice(start, min(start + config.batch, count))
            chosen = slice(where.start + own.start, where.start + own.stop)
            self.capture.pick({name: at[chosen] for name, at in spec.positions.items()})
            part = None if text is None else {name: value[own] for name, value in text.items()}
            made = self._generate(chosen, part)
            _check_schedule(spec, self.model)
            taken = self.capture.take()
            if copying is not None:
                copying.result()  # the next batch reuses its buffers
            copying = self.copiers.submit(_copy, taken, bits, own)
            if pictures is not None and made is not None:
                pictures[own] = made
            self._show(own.stop - own.start)
        if copying is not None:
            copying.result()
        return bits, pictures

    def _generate(
        self, chosen: slice, text: Mapping[str, torch.Tensor] | None
    ) -> np.ndarray | None:
        config, spec = self.config, self.spec
        try:
            return self.model.generate(
                spec.prompts[chosen],
                spec.seeds[chosen],
                steps=config.steps,
                size=(config.height, config.width),
                max_sequence_length=config.max_sequence_length,
                guidance=config.guidance,
                text=text,
            )
        except Enough:
            self.model.pipe.maybe_free_model_hooks()
            return None

    def _show(self, images: int) -> None:
        self.bar.update(images)
        rate = self.bar.format_dict["rate"]
        if rate and not self.bar.disable:
            free = Location(self.config.out).free()
            left = "" if free is None else f", {size(free)} left"
            text = f"{rate * self.rows:,.0f} rows/s, {rate * self.megabytes:,.3g} MB/s{left}"
            self.bar.set_postfix_str(text, refresh=False)


def _copy(taken: Mapping[str, torch.Tensor], bits: Mapping[str, np.ndarray], own: slice) -> None:
    for site, values in taken.items():
        bits[site][own] = values.view(torch.int16).numpy().view(np.uint16)


def _check_schedule(spec: StoreSpec, model: LoadedModel) -> None:
    """Check that the noise levels in the store, computed before the run, are those that were used."""
    used = model.pipe.scheduler.sigmas.tolist()
    if [used[number] for number in spec.numbers] != list(spec.sigmas):
        raise RuntimeError(
            f"the pipeline used noise levels {used[:-1]}, but the store says {list(spec.sigmas)}; "
            "this version of diffusers schedules otherwise: please report it"
        )


def _length(where: slice) -> int:
    return where.stop - where.start
