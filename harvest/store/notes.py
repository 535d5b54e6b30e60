"""Lines that tell a user which images and rows of a store are read."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harvest.store.extend import Before
    from harvest.store.read import Store

_SPLITS = {"train": "train", "validation": "validation (held out)", "all": "train and validation"}


def print_split(split: str, images: int) -> None:
    """Print which split is read, and how to read another.

    Args:
        split: train, validation or all.
        images: how many of it are read.
    """
    others = " or ".join(f"--split {name}" for name in _SPLITS if name != split)
    print(f"split: {_SPLITS[split]}, {images:,} images of it; read others with {others}")


def print_growth(store: Store, held: Before, of: str) -> None:
    """Print that a store has grown since something was made from it, if it has.

    Args:
        store: the store.
        held: what it held then.
        of: what was made from it.
    """
    added = [site for site in store.sites if site not in held.sites]
    parts = [f"{store.images - held.images:,} of its {store.images:,} images are newer"]
    parts = parts if store.images > held.images else []
    if added:
        parts.append(f"{', '.join(added)} added")
    if parts:
        print(f"{store.path} has grown since {of} was made: {'; '.join(parts)}")


def padding_line(where: str, store: Store, *, rows: int, left_out: int) -> str:
    """One line that says what became of the padding of text sites.

    Args:
        where: the sites.
        store: that they are in.
        rows: that are taken.
        left_out: rows that are not, as they are padding.
    """
    if left_out:
        share = left_out / (rows + left_out)
        return (
            f"padding: {left_out:,} of {rows + left_out:,} rows of {where} ({share:.0%}) left out, "
            "since they are padding of the text; --padding keep takes them"
        )
    if store.text_lengths is None:
        return f"padding: kept at {where}, since {store.path} does not say which text tokens are padding"
    return f"padding: kept at {where}"
