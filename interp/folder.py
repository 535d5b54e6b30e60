"""Result folders that appear whole or not at all, and never in the place of something else."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from harvest.atomic import whole_folder


@contextmanager
def replaced(target: Path, *, marker: str, names: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `target` when the block ends well.

    Args:
        target: the folder to make; an earlier result of the same kind there is replaced.
        marker: the file by which an earlier result is recognised.
        names: everything that such a result may hold.

    Yields:
        An empty folder beside `target`. If the block raises, it is removed and `target` is left as it was.

    Raises:
        FileExistsError: `target` is a file, or a folder that holds anything else.
    """
    check_free(target, marker=marker, names=names)
    with whole_folder(target) as folder:
        yield folder


def check_free(target: Path, *, marker: str, names: Collection[str]) -> None:
    """Raise FileExistsError unless `target` is free, empty, or an earlier result (see `replaced`)."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(f"expected a folder to write, found a file at {target}")
    if not target.is_dir():
        return
    found = {entry.name for entry in target.iterdir()}
    if not found:
        return
    if marker not in found:
        raise FileExistsError(
            f"expected a free place to write, found a folder with other things at {target}; "
            "give another folder"
        )
    foreign = found - set(names)
    if foreign:
        raise FileExistsError(
            f"expected only an earlier result in {target}, found also "
            f"{', '.join(sorted(foreign))}; move them away or give another folder"
        )
