"""Writing an activation store: shard by shard, each complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

from harvest.store.bfloat16 import finite, to_bits
from harvest.store.gather import gather
from harvest.store.layout import GROUP, attributes_of, empty_files, group_file
from harvest.store.location import Location, first_line
from harvest.store.read import open_store
from harvest.store.schema import (
    FORMAT,
    PASS,
    StoreSpec,
    fingerprint,
    first_difference,
    stamp,
)
from harvest.store.statistics import summarize
from harvest.units import size

_SETTINGS = threading.Lock()
_SHORT = 120
"""Characters of a value that are shown in an error."""


class Part(NamedTuple):
    """What a shard has.

    Attributes:
        images: so many of its images, from its first on.
        sites: at these sites.
    """

    images: int
    sites: tuple[str, ...]


def create_store(path: str | Path, spec: StoreSpec) -> StoreWriter:
    """Create a store, or continue an identical one.

    On a disk the empty store is made in a folder beside `path` and then moved there; elsewhere its attributes are
    written last. So a kill leaves no store or a whole one.

    Args:
        path: folder or URL of the store.
        spec: what it holds.

    Returns:
        a writer; `pending()` lists what is still missing.

    Raises:
        ValueError: `path` holds a different store (naming the field and both values) or
            something else.
    """
    place = Location(path)
    try:
        if place.path is None:
            _create_remote(place, spec)
        else:
            _create_local(place.path, spec)
    except place.errors as error:
        if place.path is not None:
            shutil.rmtree(_draft(place.path), ignore_errors=True)
        raise OSError(f"the store {place} cannot be made: {first_line(error)}") from error
    return StoreWriter(place, spec)


def _create_local(path: Path, spec: StoreSpec) -> None:
    if path.is_dir() and any(path.iterdir()):
        return refuse_other(path, spec)
    if path.exists() and not path.is_dir():
        raise ValueError(f"expected --out to be a folder for the store, got the file {path}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(f"{error.filename} is, or lies in, a file and not a folder") from error
    draft = _draft(path)  # always the same name, so that the next run removes what a kill left
    shutil.rmtree(draft, ignore_errors=True)
    Location(draft).put(empty_files(spec))
    os.replace(draft, path)


def _draft(path: Path) -> Path:
    return path.parent / f".{path.name}.new"


def _create_remote(place: Location, spec: StoreSpec) -> None:
    if place.exists():
        try:
            attrs = zarr.open_group(place.zarr(read_only=True), mode="r").attrs
        except FileNotFoundError as error:
            raise ValueError(f"expected --out to be an empty place, got {place}") from error
        if "draft" not in attrs:  # a draft is what a kill left while the store was made
            return refuse_other(place, spec)
    place.put({GROUP: group_file({"format": FORMAT, "draft": True})})
    place.remove(key for key in place.files() if key != GROUP)
    files = empty_files(spec)
    attributes = files.pop(GROUP)
    place.put(files)
    place.put({GROUP: attributes})


class StoreWriter:
    """Writes shards. A shard's done flag is written last, so it is either finished or pending."""

    def __init__(self, place: Location, spec: StoreSpec) -> None:
        """Open the store that `create_store` or `extend_store` made or found."""
        self.place = place
        self.spec = spec
        self._group = zarr.open_group(place.zarr(), mode="r+")
        attrs = self._group.attrs
        whole = {"images": spec.images, "sites": list(spec.sites)}
        passing: Any = attrs.get(PASS, {})
        stages = passing.get("stages", {str(attrs["fingerprint"]): whole})
        self.fingerprint = str(list(stages)[-1])
        self._stages = {
            stamp(name): (int(stage["images"]), tuple(stage["sites"]))
            for name, stage in stages.items()
        }

    def pending(self) -> list[int]:
        """Numbers of the shards that lack images or sites.

        Raises:
            ValueError: the marks that say so cannot be read.
        """
        try:
            parts = self._parts(range(self.spec.shards))
        except (ValueError, RuntimeError, *self.place.errors) as error:
            raise ValueError(
                f"images/done and shards/stamp of {self.place} cannot be read ({first_line(error)}); if one is "
                f"damaged, see `jaxdict inspect {self.place} --verify`"
            ) from error
        whole = Part(0, tuple(self.spec.sites))
        return [
            shard
            for shard, part in enumerate(parts)
            if part != whole._replace(images=_length(self.images_of(shard)))
        ]

    def there(self, shard: int) -> Part:
        """What a shard has: everything where it is finished, and less where a pass is to add to it."""
        return self._parts([shard])[0]

    def _parts(self, shards: Sequence[int]) -> list[Part]:
        first, last = self.images_of(shards[0]).start, self.images_of(shards[-1]).stop
        done = np.asarray(self._array("images/done")[first:last])
        stamps = np.asarray(self._array("shards/stamp")[shards[0] : shards[-1] + 1])
        parts = []
        for shard, mark in zip(shards, stamps.tolist(), strict=True):
            where = self.images_of(shard)
            images, sites = self._stages.get(mark, (0, ()))
            count = min(max(images - where.start, 0), _length(where))
            if not count or not done[where.start - first :][:count].all():
                count, sites = 0, ()
            parts.append(Part(count, sites))
        return parts

    def stored(self, name: str, where: slice) -> np.ndarray:
        """Read images of `sites/<site>` (bits) or `images/picture`, as the writer sees them."""
        images = np.arange(where.start, where.stop)
        return gather(self._array(name), images, name=name, place=self.place)

    def images_of(self, shard: int) -> slice:
        """The images of a shard."""
        start = shard * self.spec.images_per_shard
        return slice(start, min(start + self.spec.images_per_shard, self.spec.images))

    def write(
        self,
        shard: int,
        activations: Mapping[str, np.ndarray],
        pictures: np.ndarray | None = None,
    ) -> None:
        """Write one shard, its statistics, then its done flag. Writing it again changes nothing.

        Args:
            shard: its number.
            activations: site -> [images of the shard, step, token, d], of all sites, or of those alone that a
                shard with all its images lacks; floats are rounded to bfloat16 (nearest, ties to even), uint16
                are bfloat16 bits.
            pictures: uint8 [images of the shard, H, W, 3], or None if the store keeps none or has them already.

        Raises:
            ValueError: a site is missing or too many, a shape is wrong, or a value is not finite
                (naming site, step and prompt). Nothing is marked done then.
            OSError: it cannot be written, for instance because the disk is full. Shards written
                before stay as they are.
        """
        spec, where = self.spec, self.images_of(shard)
        count = _length(where)
        with self._telling(where):
            part = self.there(shard)
        added = part.images == count and set(activations) == set(spec.sites) - set(part.sites)
        if not added and set(activations) != set(spec.sites):
            raise ValueError(f"expected sites {sorted(spec.sites)}, got {sorted(activations)}")
        if (pictures is None) != (added or spec.picture is None):
            raise ValueError(f"expected pictures of {spec.picture}, got {type(pictures).__name__}")
        if pictures is not None and spec.picture is not None:
            _expect_shape("pictures", pictures, (count, *spec.picture, 3))
        sums: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        bits: dict[str, np.ndarray] = {}
        for site, values in activations.items():
            _expect_shape(site, values, (count, spec.steps, *spec.sites[site]))
            bits[site] = to_bits(values)
            sums[site] = summarize(bits[site])
        if not all(np.isfinite(sum_).all() for sum_, _ in sums.values()):
            self._refuse(bits, where.start)
        with self._telling(where):
            if 0 < part.images < count:  # its statistics are not those of its images for a while
                self._array("shards/stamp")[shard] = np.uint64(0)
            for site, values in bits.items():
                self._array(f"sites/{site}")[where] = values
                self._array(f"statistics/{site}")[shard], self._array(f"norms/{site}")[shard] = (
                    sums[site]
                )
            if pictures is not None:
                self._array("images/picture")[where] = pictures
            self._array("shards/stamp")[shard] = np.uint64(stamp(self.fingerprint))
            self._array("images/done")[where] = np.uint8(1)

    def finish(self) -> None:
        """End a pass that added to the store, unless a shard is still pending."""
        if PASS in self._group.attrs and not self.pending():
            own = np.uint64(stamp(self.fingerprint))
            stamps = np.asarray(self._array("shards/stamp")[:])
            for shard in np.flatnonzero(stamps != own).tolist():
                self._array("shards/stamp")[shard] = own
            # Last: until then a reader sees the store as it was before the pass.
            self.place.put({GROUP: group_file(attributes_of(self.spec.content()))})

    def sweep(self) -> None:
        """Remove what a kill left half written, unless a shard is still pending."""
        if self.place.path is not None and not self.pending():
            for ending in ("partial", "tmp"):
                for leftover in self.place.path.rglob(f"*.{ending}"):
                    leftover.unlink(missing_ok=True)

    @contextmanager
    def _telling(self, where: slice) -> Iterator[None]:
        """Say, where the place fails, which images were to be written and what to do."""
        try:
            yield
        except self.place.errors as error:
            free = self.place.free()
            left = "" if free is None else f", {size(free)} are left on the disk"
            raise OSError(
                f"images {where.start} to {where.stop - 1} could not be written to {self.place}: "
                f"{first_line(error)}{left}; make room, or see that the place can be reached and "
                "written, and run the same command again: what was finished is kept"
            ) from error

    def _array(self, name: str) -> Any:
        # Zeros are written too, so that a missing file always means a loss.
        # zarr's settings are those of all threads.
        with _SETTINGS, zarr.config.set({"array.write_empty_chunks": True}):
            return self._group[name]

    def _refuse(self, bits: Mapping[str, np.ndarray], start: int) -> None:
        """Raise a ValueError that says where the first value is that is not finite."""
        places = []
        for order, (site, values) in enumerate(bits.items()):
            broken = ~finite(values).all((2, 3))
            places += [(int(i), int(step), order, site) for i, step in np.argwhere(broken)]
        number, step, _, site = min(places)
        raise ValueError(
            f"expected finite activations, got NaN or infinity at site {site}, step {self.spec.numbers[step]}, image "
            f"{start + number}, prompt {self.spec.prompts[start + number]!r}; use --dtype bfloat16 "
            "or float32, or leave that prompt out"
        )


def _length(where: slice) -> int:
    return where.stop - where.start


def _expect_shape(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"expected {name} of shape {shape}, got {array.shape}")


def refuse_other(path: Path | Location, spec: StoreSpec) -> None:
    """Raise unless the store at `path` is the one that `spec` describes."""
    place = Location(path) if isinstance(path, Path) else path
    if place.path is not None and not place.holds(GROUP):
        raise ValueError(
            f"expected --out to be a new folder, an empty one or a store, but {path} holds other files"
        )
    store = open_store(str(path))
    content = spec.content()
    if store.fingerprint != fingerprint(content):
        old = store.content()
        if old["prompts"] != content["prompts"]:  # what follows from them says less
            derived = dict.fromkeys(("prompts_sha256", "words"))
            old, content = old | derived, content | derived
        found = first_difference(old, content)
        sites = list(store.sites), list(spec.sites)
        if sites[0] != sites[1] and max(map(len, map(json.dumps, sites))) <= _SHORT:
            found = ("sites", *sites)
        name, old, new = found or ("fingerprint", store.fingerprint, fingerprint(spec.content()))
        raise ValueError(
            f"{path} holds a store with {name} = {short(old)}, but {short(new)} was asked for; "
            "use the same settings to go on with it, or another --out"
        )
    if PASS in store.attrs:
        raise ValueError(f"{path} is being added to; run the harvest that does it again")


def short(value: Any) -> str:
    """A value as it is shown in an error."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHORT else text[: _SHORT - 3] + "..."
