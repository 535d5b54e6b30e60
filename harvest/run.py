"""The harvest loop: prompts through a pipeline, activations and pictures into a store, shard by shard."""

from __future__ import annotations

import json
import platform
import socket
from contextlib import ExitStack
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvest.config import HarvestConfig
from harvest.estimate import estimate, in_words
from harvest.fill import fill, length, rows_of, tasks_of
from harvest.models import LoadedModel, load_model, tell_cut_prompts
from harvest.plan import Plan, make_plan, plain
from harvest.prompts import TextCache
from harvest.ranks import Ranks, joined_ranks
from harvest.store import (
    Location,
    Store,
    StoreWriter,
    alone,
    create_store,
    extend_store,
    passes_of,
    write_passes,
)


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
        ValueError: the settings are wrong, `out` holds another store, or an activation or a picture
            is not finite (naming site, step and prompt).
        OSError: the store cannot be written.
    """
    with joined_ranks() as ranks, ExitStack() as held:
        if not config.dry_run:
            place = Location(config.out)
            ranks.lead(lambda: held.enter_context(alone(place, "harvested")))
        config = replace(config, device=ranks.device(config.device))
        parts = "none" if config.dry_run else "text" if config.offload == "text" else "all"
        model = _load(config, parts)
        plan = make_plan(config, model)
        if ranks.rank == 0 and config.prompts != "shapes":
            print(f"{config.prompts}: {plan.prompts.note}")
            tell_cut_prompts(model, plan.spec.prompts, plan.config.max_sequence_length)
        if config.dry_run:
            expected = estimate(plan, model)
            print(in_words(expected, plan))
            return {"store": str(Location(config.out)), "dry_run": True, **expected._asdict()}
        ranks.wait()  # every rank has looked at what was there
        return _harvest(plan, model, config, ranks)


def _harvest(plan: Plan, model: LoadedModel, asked: HarvestConfig, ranks: Ranks) -> dict[str, Any]:
    config, spec = plan.config, plan.spec
    place = Location(config.out)
    ranks.lead(lambda: _open(plan))
    writer = StoreWriter(place, spec)
    beside = place.sibling(".config.json")
    if ranks.rank == 0:
        settings = {name: plain(value) for name, value in asdict(config).items()}
        beside.write_text(json.dumps(settings | {"out": str(place)}, indent=2) + "\n")
    pending = writer.pending()
    there = {shard: writer.there(shard) for shard in pending}
    made = sum(length(writer.images_of(shard)) - there[shard].images for shard in pending)
    added = [
        site for site in spec.sites if any(site not in p.sites for p in there.values() if p.images)
    ]
    ranks.wait()  # every rank must have seen the same store before any of them writes
    own = pending[ranks.rank :: ranks.world]
    check = None
    if ranks.rank == 0 and pending:
        check = _Check(
            plan,
            model,
            {
                "fingerprint": writer.fingerprint,
                "made": made,
                "added": added,
                "processes": ranks.world,
            },
        )
    cache = None
    if config.offload == "text" and own:
        cache = TextCache(place, writer.fingerprint)
        cache.fill(
            model,
            {task.shard: spec.prompts[task.made] for task in tasks_of(writer, own, config.batch)},
            batch=config.batch,
            max_sequence_length=config.max_sequence_length,
        )
        model = _load(asked, "image", instead_of=model)
    if check is not None:
        check.compare(model)
    fill(writer, plan, model, shards=own, cache=cache, quiet=ranks.rank > 0)
    ranks.wait()

    rows = {site: spec.images * spec.steps * tokens for site, (tokens, _) in spec.sites.items()}
    if ranks.rank == 0:
        writer.finish()
        writer.sweep()
        if config.offload == "text":  # no process needs the folder any more
            TextCache(place, writer.fingerprint).close()
        done = f"{made} images made, {spec.images - made} were there already"
        if added:
            done += f"; {', '.join(added)} added to those"
        print(f"{place}: {spec.images} images ({done}), {sum(rows.values()):,} rows")
    if check is not None:
        check.end()
    return {
        "store": str(place),
        "fingerprint": writer.fingerprint,
        "model": model.name,
        "images": spec.images,
        "made": made,
        "added": added,
        "steps": spec.steps,
        "rows": rows,
        "config": str(beside),
    }


def _open(plan: Plan) -> None:
    """Make the store, or make room in the one that is there."""
    if plan.there is None:
        create_store(plan.config.out, plan.spec)
    else:
        extend_store(plan.config.out, plan.spec, plan.part)


class _Check:
    """This run's entry among the passes of its store, and whether it computes what they did.

    The same bits come of the same processor, threads and versions. Where a pass before had others, or is not known,
    the first batch is made again at one site.
    """

    def __init__(self, plan: Plan, model: LoadedModel, facts: dict[str, Any]) -> None:
        self.place, self.plan = Location(plan.config.out), plan
        self.passes = _passes(plan.there)
        self.entry = {
            "images": plan.spec.images,
            "sites": list(plan.spec.sites),
            **facts,
            "started": _now(),
            "finished": None,
            "host": socket.gethostname(),
            "environment": _environment(plan, model),
            "differs": None,
        }
        known = [one.get("environment") for one in self.passes] or [None]
        config, there = plan.config, plan.there
        count = min(config.batch, config.images_per_shard, 0 if there is None else there.images)
        sure = all(one == self.entry["environment"] for one in known)
        self.images = 0 if there is None or sure or not there.done[:count].all() else count
        self.text: dict[str, torch.Tensor] | None = None
        if self.images and config.offload == "text":
            encoded = model.encode(plan.spec.prompts[: self.images], config.max_sequence_length)
            self.text = {name: value.cpu().clone() for name, value in encoded.items()}
        write_passes(self.place, [*self.passes, self.entry])

    def compare(self, model: LoadedModel) -> None:
        """Make the first batch again, where needed, and say in one line if it differs from what is stored."""
        there, images = self.plan.there, slice(0, self.images)
        if there is None or not self.images:
            return
        site = there.sites[-1]
        rows = rows_of(self.plan, model, images, site, self.text)
        stored = there.read(site, images)
        self.entry["differs"] = float(
            np.linalg.norm(rows - stored) / max(np.linalg.norm(stored), 1e-30)
        )
        if not np.array_equal(rows, stored):
            print(
                f"{self.place}: rows of {site} made here differ from those stored by {self.entry['differs']:.1e} of their "
                f"norm (images 0 to {images.stop - 1}): another processor, number of threads or version made "
                "them; what is added is not to the bit what it would have been there"
            )

    def end(self) -> None:
        """Note that the run has ended."""
        self.entry["finished"] = _now()
        write_passes(self.place, [*self.passes, self.entry])


def _passes(there: Store | None) -> list[dict[str, Any]]:
    """The passes before; where their file is missing or another store's, what the store holds now is one."""
    if there is None:
        return []
    own = {"images": there.images, "sites": list(there.sites), "fingerprint": there.fingerprint}
    unknown = dict.fromkeys(("made", "started", "finished", "host", "environment", "differs"))
    return passes_of(there) or [own | unknown]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _environment(plan: Plan, model: LoadedModel) -> dict[str, Any]:
    """What the bits of an activation depend on, apart from the settings."""
    versions = {**plan.spec.attrs["versions"], "transformers": version("transformers")}
    if "nf4" in (plan.config.quantize, plan.config.quantize_text):
        versions["bitsandbytes"] = version("bitsandbytes")
    if model.place.type == "cuda":
        return {"processor": torch.cuda.get_device_name(model.place), "versions": versions}
    return {
        "processor": _processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


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
