"""Reading an activation store: a Zarr v3 group that any zarr tool can open.

    sites/<site>            [image, step, token, d]      bfloat16 as its bits in uint16, sharded, crc32c
    statistics/<site>       [shard, step, statistic, d]  sum, sum of squares, min, max of each shard
    norms/<site>            [shard, step, bin]           histogram of the rows' norms
    images/prompt labels seed split done word picture    one entry an image
    images/picked_img picked_txt [image, token]          positions of the tokens, where only a sample is kept
    steps/sigma timestep number                          one entry a captured step
    tokens/img              (y, x) of each position of the image stream
    shards/stamp            first 64 bits of the fingerprint, for each shard that is done

The group's attributes say what it is (format, version, fingerprint) and where it comes from (model,
scheduler, guidance, resolution, config). It lies in a folder or behind a URL such as s3://bucket/prefix.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from harvest.store.bfloat16 import from_bits
from harvest.store.gather import gather, place_numbers, unreadable
from harvest.store.location import Location, first_line
from harvest.store.padding import text_lengths
from harvest.store.schema import FORMAT, PASS, VERSION, stamp, stream_of
from harvest.store.statistics import NORM_EDGES, Norms, Statistics

_SPLITS = {"train": 0, "validation": 1}
_OWN = ("format", "version", "fingerprint", PASS)


def open_store(path: str | Path) -> Store:
    """Open an activation store for reading.

    Args:
        path: its folder, or its URL (`s3://`, `gs://`, ...; needs obstore).

    Returns:
        the store. Open it again to see images that were finished since.

    Raises:
        ValueError: it is not a store, is of a newer version, or is mixed from several.
    """
    place = Location(path)
    again = "make one with `jaxdict harvest --out ...`"
    if not place.exists():
        raise ValueError(f"expected an activation store at {place}, but nothing is there; {again}")
    try:
        group = zarr.open_group(place.zarr(read_only=True), mode="r")
    except (KeyError, ValueError, TypeError, *place.errors) as error:
        raise ValueError(
            f"expected an activation store at {place}, but none can be opened "
            f"({first_line(error)}); {again}"
        ) from error
    attrs = dict(group.attrs)
    if attrs.get("format") != FORMAT:
        raise ValueError(
            f"expected a Zarr group of format {FORMAT!r} at {place}, got {attrs.get('format')!r}; "
            + again
        )
    if "draft" in attrs:
        raise ValueError(f"{place} is a store whose making was cut off; run its harvest again")
    version = attrs.get("version")
    if not isinstance(version, int) or version != VERSION:
        older = isinstance(version, int) and version < VERSION
        raise ValueError(
            f"{place} is an activation store of version {version}, but this jaxdict reads version "
            f"{VERSION}; " + ("harvest it again" if older else "upgrade jaxdict")
        )
    store = Store(place, group, attrs)
    try:
        store.check()
    except ValueError:
        if dict(zarr.open_group(place.zarr(read_only=True), mode="r").attrs) == attrs:
            raise
        return open_store(path)  # a harvest has just added to it
    return store


class Store:
    """An activation store, read only; see `open_store`.

    Attributes:
        path: its folder (or its URL, as text).
        group: the zarr group.
        attrs: its attributes: model, scheduler, guidance, resolution, config and its own.
        fingerprint: SHA-256 in hex of what defines its contents.
        sites: names of its sites, in the order of the model.
        images: number of images.
        steps: number of captured denoising steps.
        sampled: whether only a sample of each image's tokens is kept.
        grid: (h, w) of the image tokens; token t lies at y = t // w, x = t % w.
    """

    def __init__(self, place: Location, group: zarr.Group, attrs: dict[str, Any]) -> None:
        """Take what `open_store` found."""
        self.place = place
        self.path = str(place) if place.path is None else place.path
        self.attrs = attrs
        self.group = group
        self._arrays: dict[str, Any] = {}
        self.sampled = bool(attrs["positions"])
        self.fingerprint: str = attrs["fingerprint"]
        self.sites: tuple[str, ...] = tuple(attrs["sites"])
        self.images: int = attrs["images"]
        self.steps: int = attrs["steps"]
        self.grid: tuple[int, int] = tuple(attrs["grid"])

    def shape(self, site: str) -> tuple[int, int, int, int]:
        """Shape of a site, (images, steps, tokens, d)."""
        tokens, d = self.attrs["sites"][self._known(site)]
        return self.images, self.steps, tokens, d

    def read(self, site: str, images: Any = slice(None), steps: Any = None) -> np.ndarray:
        """Read activations.

        Args:
            site: one of `sites`.
            images: a slice, an integer array or a boolean mask of images.
            steps: None for all, or as `images`, of steps.

        Returns:
            float32 [image, step, token, d], exactly the stored bfloat16 values.

        Raises:
            ValueError: the site is not in the store, an image is out of range or not harvested
                yet, or the data on the disk is damaged.
        """
        return from_bits(self.read_bits(site, images, steps))

    def read_bits(
        self, site: str, images: Any = slice(None), steps: Any = None, *, tokens: int | None = None
    ) -> np.ndarray:
        """Read activations as bfloat16 bits, uint16; of the first `tokens` alone; otherwise as `read`."""
        wanted = place_numbers(images, self.images, "image")
        chosen = None if steps is None else place_numbers(steps, self.steps, "step")
        self._known(site)
        self._finished(wanted)
        name = f"sites/{site}"
        return gather(self._array(name), wanted, chosen, tokens=tokens, name=name, place=self.place)

    def pictures(self, images: Any = slice(None)) -> np.ndarray:
        """Read the final pictures, uint8 [n, H, W, 3]; `images` as in `read`."""
        if self.attrs["picture"] is None:
            raise ValueError(f"{self.path} keeps no pictures; harvest with --pictures")
        wanted = place_numbers(images, self.images, "image")
        self._finished(wanted)
        name = "images/picture"
        return gather(self._array(name), wanted, name=name, place=self.place)

    def indices(self, split: str = "all") -> np.ndarray:
        """Images that are done: of `train`, of `validation` or of `all`; int64, ascending."""
        if split not in ("all", *_SPLITS):
            raise ValueError(f"expected train, validation or all, got {split!r}")
        mask = self.done if split == "all" else self.done & (self.split == _SPLITS[split])
        return np.flatnonzero(mask).astype(np.int64)

    def positions(self, site: str, images: Any = slice(None)) -> np.ndarray:
        """Where in its stream each kept token lies, int64 [n, token]; 0, 1, 2, ... where all are kept."""
        _, _, tokens, _ = self.shape(site)
        wanted = place_numbers(images, self.images, "image")
        stream = stream_of(site)
        if stream not in self.attrs["positions"]:
            return np.broadcast_to(np.arange(tokens, dtype=np.int64), (len(wanted), tokens))
        return self._column(f"picked_{stream}")[wanted].astype(np.int64)

    def unpadded(self, site: str) -> np.ndarray | None:
        """How many of each image's kept tokens are no padding, int64 [images]: its first ones.

        None for a site without padding, or if the store cannot tell.
        """
        lengths = self.text_lengths if stream_of(site) == "txt" else None
        if lengths is None or not self.sampled:
            return lengths
        return (self.positions(site) < lengths[:, None]).sum(1)

    def statistics(self, site: str, step: int | None = None) -> Statistics:
        """Statistics of a site over all rows that are done (both splits).

        Args:
            site: one of `sites`.
            step: place on the axis of captured steps, or None for all.

        Raises:
            ValueError: the site is not in the store or nothing is done yet.
        """
        steps = self.shape(site)[1]
        done = self._finished_shards()
        chosen = slice(None) if step is None else place_numbers([step], steps, "step")
        parts = self._all(f"statistics/{site}")[done][:, chosen]
        # Counted by the norms, as a harvest may since have added images to the last shard.
        count = int(self._all(f"norms/{site}")[done][:, chosen].sum())
        total, square = parts[:, :, 0].sum((0, 1)), parts[:, :, 1].sum((0, 1))
        low, high = parts[:, :, 2].min((0, 1)), parts[:, :, 3].max((0, 1))
        return Statistics(count, total / count, square / count, low, high)

    def norms(self, site: str) -> Norms:
        """Histogram of the norms of a site's rows, by captured step; raises as `statistics` does."""
        self._known(site)
        done = self._finished_shards()
        return Norms(NORM_EDGES, self._all(f"norms/{site}")[done].sum(0))

    def _finished_shards(self) -> np.ndarray:
        done = self._stamps != 0
        if not done.any():
            raise ValueError(f"{self.path} holds no finished image yet; run its harvest again")
        return done

    @cached_property
    def done(self) -> np.ndarray:
        """Which images are harvested, bool [images]."""
        return self._column("done").astype(bool)

    @cached_property
    def split(self) -> np.ndarray:
        """0 train, 1 validation, uint8 [images]; a prompt is never in both."""
        return self._column("split")

    @cached_property
    def seeds(self) -> np.ndarray:
        """Seed of each image, int64 [images]."""
        return self._column("seed")

    @cached_property
    def prompts(self) -> list[str]:
        """Prompt of each image."""
        return self._column("prompt").tolist()

    @cached_property
    def labels(self) -> list[dict[str, list[str]]]:
        """Ground-truth tags of each image, attribute -> values; `{}` where unknown."""
        return [json.loads(text) for text in self._column("labels").tolist()]

    @cached_property
    def words(self) -> list[list[str]]:
        """Text tokens of each image as strings; empty lists where the store keeps none."""
        if self.attrs["words"] is None:
            return [[] for _ in range(self.images)]
        return self._column("word").tolist()

    @cached_property
    def text_lengths(self) -> np.ndarray | None:
        """Tokens of each image's text without padding, int64 [images]; None where the store keeps no text tokens."""
        known = self.attrs["words"] is not None
        return text_lengths(self._array("images/word"), self.images) if known else None

    @cached_property
    def step_numbers(self) -> np.ndarray:
        """Which denoising step each captured one is, int64 [steps]."""
        return self._all("steps/number").astype(np.int64)

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Noise level of each captured step, float64 [steps]."""
        return self._all("steps/sigma")

    @cached_property
    def timesteps(self) -> np.ndarray:
        """The scheduler's timestep of each captured step, float64 [steps]."""
        return self._all("steps/timestep")

    def content(self) -> dict[str, Any]:
        """What defines the store, as `StoreSpec.content` returns it."""
        plain = {key: value for key, value in self.attrs.items() if key not in _OWN}
        plain["words"] = None if plain["words"] is None else self.words
        return {
            **plain,
            "seeds": self.seeds.tolist(),
            "split": self.split.tolist(),
            "sigmas": self.sigmas.tolist(),
            "timesteps": self.timesteps.tolist(),
            "prompts": self.prompts,
            "labels": self.labels,
        }

    def check(self) -> None:
        """Raise ValueError if arrays are missing, or parts come from another store."""
        shapes = {f"sites/{site}": self.shape(site) for site in self.sites}
        shapes |= {
            f"statistics/{site}": (len(self._stamps), self.steps, 4, self.shape(site)[3])
            for site in self.sites
        }
        shapes |= {f"images/{name}": (self.images,) for name in ("prompt", "seed", "split", "done")}
        for name, shape in shapes.items():
            found = self._array(name).shape if name in self.group else None
            wanted = tuple(shape)
            longer = found is not None and found[0] > wanted[0] and found[1:] == wanted[1:]
            if found != wanted and not (longer and PASS in self.attrs):
                raise ValueError(
                    f"{self.path} is mixed or damaged: expected {name} of shape {wanted}, "
                    f"got {found}; harvest it again into a new folder"
                )
        marks = [
            stamp(name) for name in (self.fingerprint, *self.attrs.get(PASS, {}).get("stages", ()))
        ]
        own = np.array([0, *marks], np.uint64)
        other = np.flatnonzero(~np.isin(self._stamps, own))
        if len(other):
            raise ValueError(
                f"{self.path} is mixed: its shard {other[0]} was written for another store; "
                "harvest it again into a new folder"
            )

    @cached_property
    def _stamps(self) -> np.ndarray:
        return self._all("shards/stamp")

    def _array(self, name: str) -> Any:
        if name not in self._arrays:
            self._arrays[name] = self.group[name]
        return self._arrays[name]

    def _all(self, name: str) -> np.ndarray:
        """A small array; what an unfinished pass has made it longer by is left out."""
        group = name.partition("/")[0]
        shards = -(-self.images // self.attrs["images_per_shard"])
        length = {"steps": self.steps, "images": self.images}.get(group, shards)
        try:
            return np.asarray(self._array(name)[:length])
        except (ValueError, RuntimeError, KeyError, *self.place.errors) as error:
            raise unreadable(name, self.place, error) from error

    def _column(self, name: str) -> np.ndarray:
        return self._all(f"images/{name}")

    def _known(self, site: str) -> str:
        if site not in self.attrs["sites"]:
            raise ValueError(
                f"{self.path} holds no site {site!r}; it holds {', '.join(self.sites)}"
            )
        return site

    def _finished(self, wanted: np.ndarray) -> None:
        missing = wanted[~self.done[wanted]]
        if len(missing):
            raise ValueError(
                f"image {missing[0]} of {self.path} is not harvested yet "
                f"({int(self.done.sum())} of {self.images} are); run its harvest again, or read only store.indices('all')"
            )
