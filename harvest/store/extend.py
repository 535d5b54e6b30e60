"""A store takes more images, or more sites of the images that it has.

While such a pass is under way, readers see the store as it was: what is added lies beyond the images and sites that
its attributes tell of. They are replaced last. Of the shards, each one's stamp says what it has already.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from harvest.store.layout import GROUP, empty_files, group_file
from harvest.store.location import Location, first_line
from harvest.store.read import Store, open_store
from harvest.store.schema import PASS, READY, StoreSpec, fingerprint
from harvest.store.write import StoreWriter, create_store, refuse_other, short

PartOf = Callable[[int, Sequence[str]], StoreSpec]
"""What a spec would be with its first images and some of its sites alone."""
_PASSES = ".passes.json"
"""Ending of the file beside a store that tells which runs made what of it, when, and on which processor and versions."""
_MARKS = ("images/done/c/", "shards/stamp/c/")


def extend_store(path: str | Path, spec: StoreSpec, part_of: PartOf) -> StoreWriter:
    """Create a store, go on with one, or begin to add images and sites to it.

    Args:
        path: folder or URL of the store.
        spec: what it is to hold in the end.
        part_of: what `spec` would be with its first images and some of its sites alone; what is there must be that.

    Returns:
        a writer; `pending()` lists what is still missing.

    Raises:
        ValueError: `path` holds a store of other or of more images, sites or settings (naming the field and both
            values), or something else.
        OSError: it cannot be written.
    """
    place = Location(path)
    store = existing_store(place)
    if store is None or (PASS not in store.attrs and _same(store.fingerprint, spec)):
        return create_store(path, spec)
    stages = check_extends(store, spec, part_of)
    if store.attrs.get(PASS, {}).get("stages") == stages and store.attrs[PASS][READY]:
        return StoreWriter(place, spec)
    try:
        _prepare(place, store, spec, stages)
    except place.errors as error:
        raise OSError(f"the store {place} cannot be added to: {first_line(error)}") from error
    return StoreWriter(place, spec)


def check_extends(store: Store, spec: StoreSpec, part_of: PartOf) -> dict[str, dict[str, Any]]:
    """Check that a spec is that of a store or adds to it, and to what an unfinished pass is adding.

    Args:
        store: the store.
        spec: what it is to hold in the end.
        part_of: see `extend_store`.

    Returns:
        as `stages_of`, with `spec` as the last one.

    Raises:
        ValueError: it does not; the field and both values are named.
    """
    stages, target = stages_of(store), fingerprint(spec.content())
    if target == list(stages)[-1]:
        return stages
    _expect_larger(store, stages, spec)
    for number, (name, stage) in enumerate(stages.items()):
        part = part_of(stage["images"], stage["sites"])
        if _same(name, part):
            continue
        if number == 0:
            refuse_other(store.place, part)
        raise ValueError(
            f"{store.path} has an unfinished pass to {stage['images']} images of other prompts or settings; "
            "run its own command again first"
        )
    return stages | {target: {"images": spec.images, "sites": list(spec.sites)}}


def existing_store(place: Location) -> Store | None:
    """The store at a place, or None where there is none that can be read."""
    try:
        return open_store(str(place))
    except ValueError:
        return None


def stages_of(store: Store) -> dict[str, dict[str, Any]]:
    """Fingerprint -> images and sites: of the store as readers see it and, last, of what an unfinished pass is to make of it."""
    own = {"images": store.images, "sites": list(store.sites)}
    return dict(store.attrs.get(PASS, {}).get("stages", {store.fingerprint: own}))


def images_there(store: Store) -> int:
    """How many images are done, those that an unfinished pass has added included."""
    done: Any = store.group["images/done"]
    return int(np.asarray(done[:], bool).sum())


def _same(digest: str, spec: StoreSpec) -> bool:
    return digest == fingerprint(spec.content())


def _expect_larger(store: Store, stages: dict[str, dict[str, Any]], spec: StoreSpec) -> None:
    """Raise unless a spec has more images or sites than a store, and all that a pass is adding."""
    last = list(stages.values())[-1]
    of = "an unfinished pass to" if PASS in store.attrs else "a store with"
    new = {"images": spec.images, "sites": list(spec.sites)}
    fewer = {
        "images": spec.images < last["images"],
        "sites": not set(last["sites"]) <= set(spec.sites),
    }
    for name in fewer:
        if fewer[name]:
            raise ValueError(
                f"{store.path} holds {of} {name} = {short(last[name])}, but {short(new[name])} was asked for; "
                f"it takes more {name}, not fewer: ask for at least those, or use another --out"
            )
    if new == last:
        refuse_other(store.place, spec)


def _prepare(
    place: Location, store: Store, spec: StoreSpec, stages: dict[str, dict[str, Any]]
) -> None:
    """Make room: larger arrays, and what they say of each image, where no reader looks yet."""
    files = {
        name: data
        for name, data in empty_files(spec).items()
        if name != GROUP and not name.startswith(_MARKS)
    }
    attrs = dict(store.group.attrs)
    for ready in (False, True):
        place.put({GROUP: group_file(attrs | {PASS: {"stages": stages, READY: ready}})})
        if not ready:
            place.put(files)


def read_passes(place: Location) -> list[dict[str, Any]]:
    """The runs that made a store, the first one first; none where the file is missing or damaged."""
    try:
        return list(json.loads(place.sibling(_PASSES).read_text() or "{}").get("passes", []))
    except (ValueError, AttributeError, *place.errors):
        return []


def write_passes(place: Location, passes: list[dict[str, Any]]) -> None:
    """Replace the list of runs."""
    place.sibling(_PASSES).write_text(json.dumps({"passes": passes}, indent=2) + "\n")


def passes_of(store: Store) -> list[dict[str, Any]]:
    """The runs that made a store; none where the file beside it is missing or that of another store."""
    passes = read_passes(store.place)
    own = any(one.get("fingerprint") == store.fingerprint for one in passes)
    return passes if own else []


class Before(NamedTuple):
    """What a store held when something was made from it.

    Attributes:
        fingerprint: of the store then.
        images: how many it had; they are the first ones now.
        sites: names of the sites it had.
    """

    fingerprint: str
    images: int
    sites: tuple[str, ...]


def before(store: Store, fingerprint: str) -> Before | None:
    """What a store held when it had a fingerprint, which may be that of now; None if it never had it."""
    if fingerprint == store.fingerprint:
        return Before(fingerprint, store.images, store.sites)
    for one in passes_of(store):
        if one.get("fingerprint") == fingerprint:
            return Before(fingerprint, one["images"], tuple(one["sites"]))
    return None


def expect_from(store: Store, fingerprint: str, of: str) -> Before:
    """Check that a store is the one that something was made from, or grew from that one.

    Args:
        store: the store.
        fingerprint: of the store that it was made from.
        of: what was made from it, for the message.

    Returns:
        what the store held then.

    Raises:
        ValueError: it is another store, or the file beside it that says what it grew from is missing.
    """
    found = before(store, fingerprint)
    if found is not None:
        return found
    why = "which did not grow from it; name that one"
    if not passes_of(store):
        beside = store.place.sibling(_PASSES)
        why = f"and no {beside} that says what it grew from; name that one, or copy that file along with a grown store"
    raise ValueError(
        f"--store: expected the store that {of} was made from (fingerprint {fingerprint[:12]}), or one that grew "
        f"from it, got {store.path} ({store.fingerprint[:12]}), {why}"
    )


def as_it_was(store: Store, held: Before) -> Store:
    """A view of a store with the images and sites of before alone, and the fingerprint of then.

    The rows of `made_again` and the statistics of the last shard are those of now.
    """
    if held.fingerprint == store.fingerprint:
        return store
    sites = {name: shape for name, shape in store.attrs["sites"].items() if name in held.sites}
    then = {"fingerprint": held.fingerprint, "images": held.images, "sites": sites}
    return Store(store.place, store.group, {**store.attrs, **then})


def made_again(store: Store, held: Before) -> range:
    """Images of before whose rows were made again with those that were added: a last batch that was not full."""
    if held.images == store.images:
        return range(0)
    batch = store.attrs.get("config", {}).get("batch", 1)
    partial = held.images % store.attrs["images_per_shard"] % batch
    return range(held.images - partial, held.images)
