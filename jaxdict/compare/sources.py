"""Which dictionaries `jaxdict compare` is given, and their sources as sets that can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from harvest.store import Store
from jaxdict.compare.similarity import jaccard
from jaxdict.dictionary import CARD_FILE, FORMAT, TENSORS_FILE, VERSION, read_facts
from jaxdict.itda import positions
from jaxdict.rows import stream_of
from jaxdict.runs import CONFIG, read_json

_ITDA = "an ITDA dictionary (with sources)"
_WHY = "only the atoms of `jaxdict train itda` are activations of known places"


class Member(NamedTuple):
    """A dictionary that is compared.

    Attributes:
        path: its folder.
        card: its card, or what the card of a run's dictionary would be.
        source: int32 [m, 3], (image, step, token) of each atom, as its store counts them.
    """

    path: Path
    card: dict[str, Any]
    source: np.ndarray

    @property
    def site(self) -> str:
        """Where its rows were read."""
        return str(self.card["site"])

    @property
    def stream(self) -> str:
        """`img` or `txt`."""
        return stream_of(self.site)

    @property
    def fingerprint(self) -> str:
        """Of its store."""
        return str(self.card["store_fingerprint"])

    @property
    def seed(self) -> int | None:
        """Of the order in which it saw the rows."""
        return self.card.get("config", {}).get("seed")


def find_members(paths: Sequence[Path]) -> tuple[list[Member], list[Path]]:
    """Read the dictionaries and runs that paths name, or that lie in a folder that a path names.

    Args:
        paths: folders; one that is named twice counts once.

    Returns:
        The dictionaries, and what lies beside them in the folders and is none.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: something named is no ITDA dictionary, or a folder holds none.
    """
    members: dict[Path, Member] = {}
    left: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"expected {_ITDA} at {path}, but nothing is there")
        kind = _kind(path)
        if kind is not None:
            members.setdefault(path.resolve(), _read(path, kind))
            continue
        if not path.is_dir() or (path / "zarr.json").is_file():
            what = "an activation store (name it with --store)" if path.is_dir() else "a file"
            raise ValueError(f"{path}: expected {_ITDA}, got {what}; {_WHY}")
        inner = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        kinds = {p: _kind(p) for p in inner}
        found = [p for p in inner if kinds[p] == "itda"]
        if not found:
            raise ValueError(
                f"expected {_ITDA}, a run of one, or a folder of such at {path}, found none; {_WHY}"
            )
        left += [p for p in inner if p not in found]
        for p in found:
            members.setdefault(p.resolve(), _read(p, "itda"))
    return list(members.values()), left


def _kind(path: Path) -> str | None:
    """Kind of the dictionary or the run at a path; None if it is neither."""
    if (path / CARD_FILE).is_file():
        return str(read_facts(path / CARD_FILE, format=FORMAT, version=VERSION).get("kind"))
    if (path / CONFIG).is_file():
        said = read_json(path / CONFIG)
        return str(said.get("kind")) if isinstance(said, dict) and "kind" in said else None
    return None


def _read(path: Path, kind: str) -> Member:
    if kind != "itda":
        raise ValueError(f"{path}: expected {_ITDA}, got kind {kind}; {_WHY}")
    if (path / CARD_FILE).is_file():
        card = read_facts(path / CARD_FILE, format=FORMAT, version=VERSION)
        source = _source(path / TENSORS_FILE)
    else:
        from jaxdict.itda import run_to_dictionary

        dictionary = run_to_dictionary(path)
        card, source = dictionary.card, dictionary.source
    if source is None:
        raise ValueError(f"{path}: expected {_ITDA}, got one without; export its run again")
    missing = [name for name in ("site", "store_fingerprint") if not card.get(name)]
    if missing:
        raise ValueError(f"{path}: expected a card with {missing[0]}; export its run again")
    if source.ndim != 2 or source.shape[1:] != (3,) or not len(source) or source.min() < 0:
        raise ValueError(f"{path}: expected sources [m, 3] of at least 0; export its run again")
    return Member(path, card, source)


def _source(file: Path) -> np.ndarray | None:
    """The sources alone, without the atoms."""
    try:
        with safe_open(file, framework="np") as reader:
            return reader.get_tensor("source") if "source" in reader.keys() else None  # noqa: SIM118
    except (SafetensorError, TypeError) as error:
        raise ValueError(f"{file}: expected safetensors, found a damaged file ({error})") from None


class _Images(NamedTuple):
    """What the images of a store are, by number: their prompts and seeds; and its denoising steps."""

    prompts: dict[int, str]
    seeds: dict[int, int]
    steps: list[int]


class Places:
    """The sources of each dictionary as a set of places that mean the same in all of them.

    Within a store a place is known by its numbers. Between stores an image is known by its prompt
    and seed, a step by its number in the denoising and a token by its position in the stream, which
    stand in the card of a dictionary that was exported while its store was there, or in the store.
    """

    def __init__(
        self, members: Sequence[Member], by: Sequence[str], stores: Mapping[str, Store]
    ) -> None:
        """Find the places.

        Args:
            members: dictionaries.
            by: parts of a place that count: image, prompt, step, token.
            stores: fingerprint -> store, where known.

        Raises:
            ValueError: prompts are asked for and not known.
        """
        self.members, self.by = members, tuple(by)
        prints = {member.fingerprint for member in members}
        self._images = {
            fingerprint: _images([m for m in members if m.fingerprint == fingerprint], stores)
            for fingerprint in prints
        }
        for member in members:
            if "prompt" in self.by and self._images[member.fingerprint] is None:
                raise ValueError(f"{member.path}: expected to know its prompts; {_REMEDY}")
        ids: dict[Any, int] = {}
        rows = [self._rows(member, ids, stores) for member in members]
        codes = np.unique(np.concatenate(rows), axis=0, return_inverse=True)[1].reshape(-1)
        ends = np.cumsum([len(part) for part in rows])[:-1]
        self.sets = [np.unique(part) for part in np.split(codes, ends)]

    def jaccard(self) -> np.ndarray:
        """Jaccard similarity of each pair: float64 [member, member], NaN for different streams.

        Streams only matter where tokens do: token 3 of a text is another place than token 3 of a
        picture.

        Raises:
            ValueError: two dictionaries are of different prompts, or nobody knows, or no pair at
                all can be compared.
        """
        count = len(self.members)
        found = np.full((count, count), np.nan)
        for i in range(count):
            for j in range(i, count):
                a, b = self.members[i], self.members[j]
                if "token" not in self.by or a.stream == b.stream:
                    self._check(a, b)
                    found[i, j] = found[j, i] = jaccard(self.sets[i], self.sets[j])
        if count > 1 and not np.isfinite(found[~np.eye(count, dtype=bool)]).any():
            a, b = self.members[:2]
            raise ValueError(
                f"expected dictionaries of one stream, got {a.path} of {a.site} and {b.path} of "
                f"{b.site}, whose tokens are different places; leave tokens out with --by image step"
            )
        return found

    def _check(self, a: Member, b: Member) -> None:
        """Raise ValueError if two dictionaries' places cannot be compared."""
        if a.fingerprint == b.fingerprint:
            return
        one, two = self._images[a.fingerprint], self._images[b.fingerprint]
        for member, images in ((a, one), (b, two)):
            if images is None:
                raise ValueError(
                    f"{a.path} and {b.path} are of different stores, and the card of {member.path} "
                    f"does not say which prompts, seeds and steps its sources are of; {_REMEDY}"
                )
        if one is None or two is None or not {"image", "prompt"} & set(self.by):
            return
        what = "image (the same prompt and seed)" if "image" in self.by else "prompt"
        shared = partial(_named, whole="image" in self.by)
        if not shared(one) & shared(two):
            hint = (
                "" if "image" not in self.by else ", or compare by prompt: --by prompt step token"
            )
            raise ValueError(
                f"expected dictionaries of the same prompts and seeds, but {a.path} and {b.path} "
                f"share no {what}; harvest both stores from the same --prompts and --seed{hint}"
            )

    def _rows(self, member: Member, ids: dict[Any, int], stores: Mapping[str, Store]) -> np.ndarray:
        """Places of a dictionary: int64 [m, parts]; equal rows are equal places."""
        images, columns = self._images[member.fingerprint], []
        image, step, token = member.source.T.astype(np.int64)
        names = {
            number: (images.prompts[number], images.seeds[number])
            if images
            else (member.fingerprint, number)
            for number in np.unique(image).tolist()
        }
        for part in self.by:
            if part in ("image", "prompt"):
                keys = [
                    (part, name if part == "image" else name[0])
                    for name in map(names.__getitem__, image.tolist())
                ]
                columns.append(np.array([ids.setdefault(key, len(ids)) for key in keys]))
            elif part == "step":
                columns.append(np.array(images.steps)[step] if images else step)
            else:
                columns.append(_positions(member, token, stores) if images else token)
        return np.stack(columns, axis=1).astype(np.int64)


_REMEDY = "name its store with --store, or export its run again while the store is there"


def _images(members: Sequence[Member], stores: Mapping[str, Store]) -> _Images | None:
    """What is known of the images of the store that all members come from; None if not enough."""
    store = stores.get(members[0].fingerprint)
    if store is not None:
        for member in members:
            if (member.source.max(0) >= store.shape(member.site)[:3]).any():
                raise ValueError(
                    f"{member.path}: expected sources within the images, steps and tokens of "
                    f"{store.path}, got others; export its run again"
                )
        prompts = dict(enumerate(store.prompts))
        return _Images(prompts, dict(enumerate(store.seeds.tolist())), store.step_numbers.tolist())
    known = _Images({}, {}, [])
    for member in members:
        said = member.card.get("sources") or {}
        prompts, seeds = said.get("prompts") or {}, said.get("seeds") or {}
        steps = said.get("denoising_step") or []
        used = set(map(str, np.unique(member.source[:, 0]).tolist()))
        if not used <= set(prompts) & set(seeds) or member.source[:, 1].max() >= len(steps):
            return None
        known.prompts.update({int(number): str(prompts[number]) for number in used})
        known.seeds.update({int(number): int(seeds[number]) for number in used})
        known = known._replace(steps=list(steps))
    return known


def _named(images: _Images, *, whole: bool) -> set[Any]:
    """Prompts, or prompts with their seeds."""
    if not whole:
        return set(images.prompts.values())
    return {(prompt, images.seeds[number]) for number, prompt in images.prompts.items()}


def _positions(member: Member, token: np.ndarray, stores: Mapping[str, Store]) -> np.ndarray:
    """Where in its stream each atom's token lies, where a store keeps a sample of them."""
    said = member.card["sources"].get("position") if "sources" in member.card else None
    store = stores.get(member.fingerprint)
    if store is not None and store.sampled:
        return positions(store, member.site, member.source)
    return np.asarray(said, np.int64) if said else token
