"""What a result may take the place of: an earlier result of its kind, and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path


def check_overwrite(target: Path, *, marker: str, names: Collection[str]) -> None:
    """Check that `target` is free, empty, or holds an earlier result and nothing else.

    Args:
        target: the folder to write.
        marker: the file by which an earlier result is recognised.
        names: everything that such a result may hold.

    Raises:
        FileExistsError: it is a file, or a folder with other things.
    """
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
