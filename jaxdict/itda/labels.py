"""Where each atom came from: its label in words, and the picture behind it.

A card's `sources` says how to read the tensor `source` [m, 3], and what its numbers mean:

    columns          ["image", "step", "token"], as the store counts them
    prompts, seeds   image -> its prompt and seed, once for each image
    denoising_step   captured step -> its number in the sampler
    position         atom -> its token's place in the stream, if the store keeps a sample of the tokens
    word             atom -> its text token, if the stream is text and the store keeps words
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from harvest.store import expect_from, stream_of

if TYPE_CHECKING:
    from harvest.store import Store
    from jaxdict.dictionary import Dictionary

COLUMNS = ("image", "step", "token")


class Label(NamedTuple):
    """Where an atom came from.

    Attributes:
        image: number of the image in its store.
        step: place on the axis of captured steps.
        token: place on the axis of kept tokens.
        denoising_step: number of that step in the sampler; None if unknown.
        position: where in its stream the token lies.
        prompt: of the image; None if unknown.
        seed: of the image; None if unknown.
        word: the text token; None for the image stream, or if unknown.
    """

    image: int
    step: int
    token: int
    denoising_step: int | None
    position: int
    prompt: str | None
    seed: int | None
    word: str | None


def sources(store: Store, site: str, source: np.ndarray) -> dict[str, Any]:
    """A card's `sources`, which says where atoms came from (see the top of this file).

    Args:
        store: whose rows the atoms are.
        site: of the rows.
        source: int [m, 3], (image, step, token) of each atom.
    """
    images = np.unique(source[:, 0])
    told: dict[str, Any] = {
        "columns": list(COLUMNS),
        "prompts": {str(image): store.prompts[image] for image in images},
        "seeds": {str(image): int(store.seeds[image]) for image in images},
        "denoising_step": store.step_numbers.tolist(),
    }
    if not len(source):
        return told
    position = positions(store, site, source)
    if store.sampled:
        told["position"] = position.tolist()
    if stream_of(site) == "txt" and store.attrs["words"] is not None:
        words = store.words
        pairs = zip(source[:, 0].tolist(), position.tolist(), strict=True)
        told["word"] = [words[image][at] if at < len(words[image]) else "" for image, at in pairs]
    return told


def positions(store: Store, site: str, source: np.ndarray) -> np.ndarray:
    """Where in its stream each atom's token lies: int [m].

    Args:
        store: whose rows the atoms are.
        site: of the rows.
        source: int [m, 3], (image, step, token) of each atom.
    """
    images, place = np.unique(source[:, 0], return_inverse=True)
    return store.positions(site, images)[place.reshape(-1), source[:, 2]]


def select_sources(told: dict[str, Any], source: np.ndarray, keep: np.ndarray) -> dict[str, Any]:
    """The part of a card's `sources` that describes some of the atoms.

    Args:
        told: `sources` of all atoms.
        source: int [m, 3] of all atoms.
        keep: int [kept], the atoms.
    """
    images = {str(image) for image in source[keep, 0].tolist()}
    part = dict(told)
    for name in ("prompts", "seeds"):
        if name in told:
            part[name] = {image: value for image, value in told[name].items() if image in images}
    for name in ("position", "word"):
        if name in told:
            part[name] = [told[name][atom] for atom in keep.tolist()]
    return part


def label(dictionary: Dictionary, atom: int) -> Label:
    """Where an atom came from.

    Args:
        dictionary: of kind itda.
        atom: from 0 to m - 1.

    Raises:
        ValueError: the dictionary has no sources, or no such atom.
    """
    source = _source(dictionary, [atom])
    told = dictionary.card.get("sources") or {}
    image, step, token = (int(number) for number in source[0])
    steps, place = told.get("denoising_step"), told.get("position")
    seed = told.get("seeds", {}).get(str(image))
    return Label(
        image,
        step,
        token,
        None if steps is None else int(steps[step]),
        token if place is None else int(place[atom]),
        told.get("prompts", {}).get(str(image)),
        None if seed is None else int(seed),
        told["word"][atom] if "word" in told else None,
    )


def pictures(dictionary: Dictionary, store: Store, atoms: Sequence[int]) -> np.ndarray:
    """The pictures that some atoms came from.

    Args:
        dictionary: of kind itda.
        store: the one that the dictionary was made from; it may have grown since.
        atoms: from 0 to m - 1; may repeat.

    Returns:
        uint8 [len(atoms), H, W, 3].

    Raises:
        ValueError: the dictionary has no sources or no such atom; another store; one without pictures.
    """
    images = _source(dictionary, atoms)[:, 0]
    expect_from(store, str(dictionary.card.get("store_fingerprint")), "the dictionary")
    each, place = np.unique(images, return_inverse=True)
    return store.pictures(each)[place]


def _source(dictionary: Dictionary, atoms: Sequence[int]) -> np.ndarray:
    """(image, step, token) of some atoms."""
    if dictionary.source is None:
        raise ValueError(
            f"expected a dictionary whose atoms are rows of a store (itda), got kind "
            f"{dictionary.kind!r} without sources; build one with `jaxdict train itda`"
        )
    wrong = [atom for atom in atoms if not 0 <= atom < dictionary.m]
    if wrong:
        raise ValueError(f"expected atoms from 0 to {dictionary.m - 1}, got {wrong[0]}")
    return dictionary.source[np.asarray(atoms, np.int64)]
