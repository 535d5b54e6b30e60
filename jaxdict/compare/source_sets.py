"""The sources of dictionaries as sets that mean the same in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from harvest.store import Store
from jaxdict.compare.similarity import jaccard
from jaxdict.compare.sources import ComparedDictionary
from jaxdict.itda import positions

_REMEDY = "name its store with --store, or export its run again while the store is there"


class _Labels(NamedTuple):
    """What the numbers in a source stand for, in words that do not depend on the store.

    Attributes:
        prompts: image -> its prompt.
        seeds: image -> the seed of its noise.
        steps: captured index -> denoising step.
    """

    prompts: dict[int, str]
    seeds: dict[int, int]
    steps: list[int]


class SourceSets:
    """The sources of each dictionary as a set; equal elements are the same place in all of them.

    Within a store the numbers of image, step and token say where an atom came from. Across stores
    the prompt and seed identify an image, its number in the denoising a step, its position in the
    stream a token; a dictionary's card holds these if its store was there at export, else the store.

    Attributes:
        dictionaries: as given.
        by: the parts of a source that count.
        sets: int64 [s], a sorted set for each dictionary.
    """

    def __init__(
        self,
        dictionaries: Sequence[ComparedDictionary],
        by: Sequence[str],
        stores: Mapping[str, Store],
    ) -> None:
        """Turn sources into sets.

        Args:
            dictionaries: what is compared.
            by: the parts of a source that count: image, prompt, step, token.
            stores: fingerprint -> store, of those that were named.

        Raises:
            ValueError: prompts are asked for and not known.
        """
        self.dictionaries, self.by = dictionaries, tuple(by)
        self._labels = {
            fingerprint: _labels([d for d in dictionaries if d.fingerprint == fingerprint], stores)
            for fingerprint in {one.fingerprint for one in dictionaries}
        }
        for one in dictionaries:
            if "prompt" in self.by and self._labels[one.fingerprint] is None:
                raise ValueError(f"{one.path}: expected to know its prompts; {_REMEDY}")
        ids: dict[Any, int] = {}
        rows = [self._rows(one, ids, stores) for one in dictionaries]
        codes = np.unique(np.concatenate(rows), axis=0, return_inverse=True)[1].reshape(-1)
        ends = np.cumsum([len(part) for part in rows])[:-1]
        self.sets = [np.unique(part) for part in np.split(codes, ends)]

    def jaccard(self) -> np.ndarray:
        """Jaccard similarity of each pair: float64 [dictionary, dictionary], NaN for different streams.

        Streams only matter where tokens do: token 3 of a text is another place than token 3 of a
        picture.

        Raises:
            ValueError: two dictionaries are of different or unknown prompts, or no pair at all can
                be compared.
        """
        count = len(self.dictionaries)
        found = np.full((count, count), np.nan)
        for i in range(count):
            for j in range(i, count):
                a, b = self.dictionaries[i], self.dictionaries[j]
                if "token" not in self.by or a.stream == b.stream:
                    self._check(a, b)
                    found[i, j] = found[j, i] = jaccard(self.sets[i], self.sets[j])
        if count > 1 and not np.isfinite(found[~np.eye(count, dtype=bool)]).any():
            a, b = self.dictionaries[:2]
            raise ValueError(
                f"expected dictionaries of one stream, got {a.path} of {a.site} and {b.path} of "
                f"{b.site}, whose tokens are different places; leave tokens out with --by image step"
            )
        return found

    def _check(self, a: ComparedDictionary, b: ComparedDictionary) -> None:
        """Raise ValueError if the sources of two dictionaries cannot be compared."""
        if a.fingerprint == b.fingerprint:
            return
        one, two = self._labels[a.fingerprint], self._labels[b.fingerprint]
        for dictionary, labels in ((a, one), (b, two)):
            if labels is None:
                raise ValueError(
                    f"{a.path} and {b.path} are of different stores, and the card of {dictionary.path} "
                    f"does not say which prompts, seeds and steps its sources are of; {_REMEDY}"
                )
        if one is None or two is None or not {"image", "prompt"} & set(self.by):
            return
        what = "image (the same prompt and seed)" if "image" in self.by else "prompt"
        shared = partial(_names, with_seed="image" in self.by)
        if not shared(one) & shared(two):
            hint = (
                "" if "image" not in self.by else ", or compare by prompt: --by prompt step token"
            )
            raise ValueError(
                f"expected dictionaries of the same prompts and seeds, but {a.path} and {b.path} "
                f"share no {what}; harvest both stores from the same --prompts and --seed{hint}"
            )

    def _rows(
        self, dictionary: ComparedDictionary, ids: dict[Any, int], stores: Mapping[str, Store]
    ) -> np.ndarray:
        """Sources of a dictionary, int64 [atom, part]; equal rows are the same place."""
        labels, columns = self._labels[dictionary.fingerprint], []
        image, step, token = dictionary.source.T.astype(np.int64)
        names = {
            number: (labels.prompts[number], labels.seeds[number])
            if labels
            else (dictionary.fingerprint, number)
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
                columns.append(np.array(labels.steps)[step] if labels else step)
            else:
                columns.append(_positions(dictionary, token, stores) if labels else token)
        return np.stack(columns, axis=1).astype(np.int64)


def _labels(
    dictionaries: Sequence[ComparedDictionary], stores: Mapping[str, Store]
) -> _Labels | None:
    """Labels of the one store that all of these come from; None if neither store nor cards have them."""
    store = stores.get(dictionaries[0].fingerprint)
    if store is not None:
        for one in dictionaries:
            if (one.source.max(0) >= store.shape(one.site)[:3]).any():
                raise ValueError(
                    f"{one.path}: expected sources within the images, steps and tokens of "
                    f"{store.path}, got others; export its run again"
                )
        prompts = dict(enumerate(store.prompts))
        return _Labels(prompts, dict(enumerate(store.seeds.tolist())), store.step_numbers.tolist())
    known = _Labels({}, {}, [])
    for one in dictionaries:
        said = one.card.get("sources") or {}
        prompts, seeds = said.get("prompts") or {}, said.get("seeds") or {}
        steps = said.get("denoising_step") or []
        used = set(map(str, np.unique(one.source[:, 0]).tolist()))
        if not used <= set(prompts) & set(seeds) or one.source[:, 1].max() >= len(steps):
            return None
        known.prompts.update({int(number): str(prompts[number]) for number in used})
        known.seeds.update({int(number): int(seeds[number]) for number in used})
        known = known._replace(steps=list(steps))
    return known


def _names(labels: _Labels, *, with_seed: bool) -> set[Any]:
    """Prompts, or prompts with their seeds."""
    if not with_seed:
        return set(labels.prompts.values())
    return {(prompt, labels.seeds[number]) for number, prompt in labels.prompts.items()}


def _positions(
    dictionary: ComparedDictionary, token: np.ndarray, stores: Mapping[str, Store]
) -> np.ndarray:
    """Position in its stream of each atom's token, which differs where a store keeps a sample of them."""
    card = dictionary.card
    said = card["sources"].get("position") if "sources" in card else None
    store = stores.get(dictionary.fingerprint)
    if store is not None and store.sampled:
        return positions(store, dictionary.site, dictionary.source)
    return np.asarray(said, np.int64) if said else token
