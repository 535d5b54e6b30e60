"""Making the images that shards lack: a pipeline runs, hooks copy its activations, and one shard is written while the next is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from harvest.capture import Capture, Enough
from harvest.config import HarvestConfig
from harvest.models import LoadedModel, NotFiniteError
from harvest.plan import Plan
from harvest.prompts import TextCache
from harvest.store import Location, StoreSpec, StoreWriter
from harvest.units import size


class Task(NamedTuple):
    """What is to be made of a shard.

    Attributes:
        shard: its number.
        images: its images.
        kept: how many of them, from the first on, keep the rows that they have.
        added: sites that are made for those.
    """

    shard: int
    images: slice
    kept: int
    added: tuple[str, ...]

    @property
    def made(self) -> slice:
        """The images that the pipeline has to make."""
        return self.images if self.added else slice(self.images.start + self.kept, self.images.stop)


def tasks_of(writer: StoreWriter, shards: Sequence[int], batch: int) -> list[Task]:
    """What is to be made of some shards.

    A last batch that is not full is made again once there are more images, as its activations depend on how many are
    made together.

    Args:
        writer: the store.
        shards: numbers of the shards.
        batch: images that are made together.
    """
    tasks = []
    for shard in shards:
        where, part = writer.images_of(shard), writer.there(shard)
        whole = part.images == length(where)
        kept = part.images if whole else part.images // batch * batch
        added = tuple(site for site in writer.spec.sites if site not in part.sites)
        tasks.append(Task(shard, where, kept, added if kept else ()))
    return tasks


def fill(
    writer: StoreWriter,
    plan: Plan,
    model: LoadedModel,
    *,
    shards: Sequence[int],
    cache: TextCache | None = None,
    quiet: bool = False,
) -> int:
    """Make what shards of a store lack; one is written while the next is made.

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
    tasks = tasks_of(writer, shards, plan.config.batch)
    missing = sum(length(task.made) for task in tasks)
    bar = tqdm(
        total=plan.spec.images,
        initial=plan.spec.images - missing,
        unit="image",
        desc="harvest",
        smoothing=0.1,
        disable=quiet,
    )
    writing: Future[None] | None = None
    with bar, ThreadPoolExecutor(1) as writers, ThreadPoolExecutor(1) as copiers:
        maker = _ShardMaker(writer, plan, model, bar=bar, copiers=copiers)
        for task in tasks:
            made = maker.make(task, None if cache is None else cache.read(task.shard))
            if writing is not None:
                writing.result()
            writing = writers.submit(_write, writer, task.shard, made, cache)
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
    """Runs the pipeline over shards, one after another."""

    def __init__(
        self,
        writer: StoreWriter,
        plan: Plan,
        model: LoadedModel,
        *,
        bar: tqdm,
        copiers: ThreadPoolExecutor,
    ) -> None:
        self.config, self.spec = plan.config, plan.spec
        self.writer, self.model = writer, model
        self.bar, self.copiers = bar, copiers
        self.captures: dict[tuple[str, ...], Capture] = {}

    def make(
        self, task: Task, text: Mapping[str, torch.Tensor] | None
    ) -> tuple[Mapping[str, np.ndarray], np.ndarray | None]:
        """bfloat16 bits by site, and the pictures, of what `StoreWriter.write` is to write."""
        spec, count, kept = self.spec, length(task.images), task.kept
        sites = task.added if kept == count else tuple(spec.sites)
        bits = {site: np.empty((count, spec.steps, *spec.sites[site]), np.uint16) for site in sites}
        pictures = None
        if spec.picture is not None and kept < count:
            pictures = np.empty((count, *spec.picture, 3), np.uint8)
        before = slice(task.images.start, task.images.start + kept)
        if 0 < kept < count:
            for site in set(sites) - set(task.added):
                bits[site][:kept] = self.writer.stored(f"sites/{site}", before)
            if pictures is not None:
                pictures[:kept] = self.writer.stored("images/picture", before)
        if task.added:
            self._run(task, (0, kept), {site: bits[site] for site in task.added}, None, text)
        if kept < count:
            self._run(task, (kept, count), bits, pictures, text)
        return bits, pictures

    def _run(
        self,
        task: Task,
        span: tuple[int, int],
        bits: Mapping[str, np.ndarray],
        pictures: np.ndarray | None,
        text: Mapping[str, torch.Tensor] | None,
    ) -> None:
        """Make a range of a shard's images at some sites; a batch is copied while the next one is made."""
        spec, capture = self.spec, self._capture(tuple(bits), stop=pictures is None)
        skipped = task.made.start - task.images.start  # images without encoded text
        copying: Future[None] | None = None
        with capture:
            for start in range(*span, self.config.batch):
                own = slice(start, min(start + self.config.batch, span[1]))
                chosen = slice(task.images.start + own.start, task.images.start + own.stop)
                capture.pick({name: at[chosen] for name, at in spec.positions.items()})
                there = slice(own.start - skipped, own.stop - skipped)
                part = None if text is None else {name: all_[there] for name, all_ in text.items()}
                made, broken = None, None
                try:
                    made = generate(self.model, self.config, spec, chosen, part)
                except NotFiniteError as error:
                    broken = error
                _check_schedule(spec, self.model)
                taken = capture.take()
                if broken is not None and all(rows.isfinite().all() for rows in taken.values()):
                    raise broken  # else the writer says at which site it began
                if copying is not None:
                    copying.result()  # the next batch reuses its buffers
                copying = self.copiers.submit(_copy, taken, bits, own)
                if pictures is not None and made is not None:
                    pictures[own] = made
                self._show(length(own), {site: spec.sites[site] for site in bits})
        if copying is not None:
            copying.result()

    def _capture(self, sites: tuple[str, ...], *, stop: bool) -> Capture:
        """The hooks of some sites, whose buffers are used for all shards."""
        if sites not in self.captures:
            self.captures[sites] = Capture(
                self.model.pipe.transformer,
                list(sites),
                steps=self.config.steps,
                numbers=self.spec.numbers,
                stop=stop,
            )
        return self.captures[sites]

    def _show(self, images: int, sites: Mapping[str, tuple[int, int]]) -> None:
        self.bar.update(images)
        rate = self.bar.format_dict["rate"]
        if rate and not self.bar.disable:
            rows = sum(tokens for tokens, _ in sites.values()) * self.spec.steps
            values = sum(tokens * d for tokens, d in sites.values()) * self.spec.steps
            free = Location(self.config.out).free()
            left = "" if free is None else f", {size(free)} left"
            text = f"{rate * rows:,.0f} rows/s, {rate * values * 2 / 1e6:,.3g} MB/s{left}"
            self.bar.set_postfix_str(text, refresh=False)


def generate(
    model: LoadedModel,
    config: HarvestConfig,
    spec: StoreSpec,
    chosen: slice,
    text: Mapping[str, torch.Tensor] | None,
) -> np.ndarray | None:
    """Run the pipeline for a batch of images; their pictures, or None where it was stopped after the last site."""
    try:
        return model.generate(
            spec.prompts[chosen],
            spec.seeds[chosen],
            steps=config.steps,
            size=(config.height, config.width),
            max_sequence_length=config.max_sequence_length,
            guidance=config.guidance,
            text=text,
        )
    except Enough:
        model.pipe.maybe_free_model_hooks()
        return None


def rows_of(
    plan: Plan,
    model: LoadedModel,
    images: slice,
    site: str,
    text: Mapping[str, torch.Tensor] | None,
) -> np.ndarray:
    """Make a batch of images for the rows of one site, float32 [image, step, token, d]."""
    config, spec = plan.config, plan.spec
    transformer = model.pipe.transformer
    with Capture(
        transformer, [site], steps=config.steps, numbers=spec.numbers, stop=True
    ) as capture:
        capture.pick({name: at[images] for name, at in spec.positions.items()})
        generate(model, config, spec, images, text)
        return capture.take()[site].float().numpy()


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


def length(where: slice) -> int:
    """Images in a range."""
    return where.stop - where.start
