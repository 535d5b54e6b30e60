"""One process at a time writes to a place: a lock beside it says who.

On a disk the system holds the lock and lets go of it when its process ends in any way. At a URL it is an object that is
renewed while the process lives.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harvest.store.location import Location, first_line

_RENEWED = 30.0
"""Seconds after which the lock of a URL is written again."""
_STALE = 300.0
"""Seconds without that after which its process counts as dead."""


@contextmanager
def alone(place: Location, doing: str) -> Iterator[None]:
    """Be the only process at work on a place, for as long as the block runs.

    Args:
        place: a folder, a file or a URL; it need not exist.
        doing: what is done to it, such as "harvested".

    Raises:
        ValueError: another process is at work on it: which, on which host and since when.
        OSError: nothing can be written beside it.
    """
    who = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().strftime("%Y-%m-%d %H:%M:%S"),
    }
    held = _file(place.path, doing, who) if place.path else _object(place, doing, who)
    with held:
        yield


@contextmanager
def _file(path: Path, doing: str, who: dict[str, Any]) -> Iterator[None]:
    path = Path(os.path.abspath(path))
    file = path.with_name(f".{path.name}.lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        lock.acquire(timeout=0)
    except (FileExistsError, NotADirectoryError) as error:
        raise OSError(
            f"{path} cannot be made: {error.filename} is, or lies in, a file and not a folder"
        ) from error
    except Timeout:
        raise _busy(str(path), doing, _read(file)) from None
    except OSError as error:
        raise OSError(f"{path} cannot be written: {first_line(error)}") from error
    try:
        file.write_text(json.dumps(who))
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # whoever has opened it meanwhile sees that it has no name any more
        lock.release()


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return {}


def _busy(place: str, doing: str, who: dict[str, Any]) -> ValueError:
    name = f"process {who['pid']} on {who['host']} since {who['since']}" if who else "another"
    return ValueError(
        f"{place} is being {doing} by {name}; wait until that has ended, or name another --out"
    )


@contextmanager
def _object(place: Location, doing: str, who: dict[str, Any]) -> Iterator[None]:
    lock = _ObjectLock(place.sibling(".lock"), who)
    try:
        other = lock.take()
    except place.errors as error:
        raise OSError(f"{place} cannot be written: {first_line(error)}") from error
    if other is not None:
        raise _busy(str(place), doing, other)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(_RENEWED):
            with suppress(Exception):  # a renewal that fails is tried again
                lock.put("overwrite")

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):
            lock.remove()


class _ObjectLock:
    """An object that is there while a process is at work."""

    def __init__(self, place: Location, who: dict[str, Any]) -> None:
        folder, _, self.name = str(place.url).rpartition("/")
        self.objects, self.who = Location(folder).objects, who

    def take(self) -> dict[str, Any] | None:
        """Make the object; if another process has it, who that is."""
        from obstore.exceptions import AlreadyExistsError, NotFoundError, PreconditionError

        for _ in range(3):
            try:
                found = self.objects.get(self.name)
                other = json.loads(bytes(found.bytes()))
            except (FileNotFoundError, NotFoundError):
                mode: Any = "create"
            except ValueError:
                other, mode = {}, "overwrite"
            else:
                if not self._stale(other, found.meta["last_modified"]):
                    return other
                mode = {"e_tag": found.meta["e_tag"]}
            try:
                self.put(mode)
            except (AlreadyExistsError, PreconditionError):
                continue  # another process was faster
            return None
        return {}

    def put(self, mode: Any) -> None:
        """Write the object; a service without conditions writes it in any case."""
        data = json.dumps(self.who).encode()
        try:
            self.objects.put(self.name, data, mode=mode)
        except NotImplementedError:
            self.objects.put(self.name, data)

    def remove(self) -> None:
        """Remove the object."""
        self.objects.delete(self.name)

    def _stale(self, other: dict[str, Any], written: datetime) -> bool:
        if other.get("host") == self.who["host"] and not _alive(other["pid"]):
            return True
        return (datetime.now(UTC) - written).total_seconds() > _STALE


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
