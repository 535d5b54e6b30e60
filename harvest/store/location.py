"""Where a store lies, and who is at work there.

A place is a local folder, or a URL of an object store such as s3://bucket/prefix. One process at a time writes to it: a lock
beside it says who. On a disk the system holds the lock and lets go of it when its process ends in any way; at a URL it is an
object that is renewed while the process lives.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from harvest import atomic

_URL = re.compile(r"([a-z][a-z0-9+.-]+):/{1,2}(?=[^/])", re.IGNORECASE)
_AT_ONCE = 16
"""Requests at a time."""
_RENEWED = 30.0
"""Seconds after which the lock of a URL is written again."""
_STALE = 300.0
"""Seconds without that after which its process counts as dead."""


class Location:
    """A place for a store, local or remote; `str` of it gives its name back.

    Args:
        place: a folder, or a URL that obstore knows (`s3://`, `gs://`, `az://`, `memory://`). Its
            credentials and endpoint come from the environment, as usual for that service
            (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...).
    """

    def __init__(self, place: str | Path) -> None:
        """Tell a URL from a folder; a URL that went through a `Path` lost a slash and gets it back."""
        text = os.path.expanduser(os.fspath(place))
        match = _URL.match(text)
        if match and len(match.group(1)) > 1:
            self.url: str | None = f"{match.group(1).lower()}://{text[match.end() :].rstrip('/')}"
            self.path = None
        else:
            self.url, self.path = None, Path(text)

    def __str__(self) -> str:
        """The folder or URL."""
        return self.url or str(self.path)

    def zarr(self, *, read_only: bool = False) -> Any:
        """The place in the form that zarr accepts.

        Raises:
            ValueError: obstore, which URLs need, is not installed or does not know this one.
        """
        if self.path is not None:
            return self.path
        from zarr.storage import ObjectStore

        return ObjectStore(self.objects, read_only=read_only)

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What reads and writes raise where the place is full, unreachable or forbidden."""
        if self.path is not None:
            return (OSError,)
        from obstore.exceptions import BaseError

        return OSError, BaseError

    def exists(self) -> bool:
        """Whether there is anything."""
        if self.path is not None:
            return self.path.exists()
        objects = self.objects
        try:
            return any(len(batch) for batch in objects.list(chunk_size=1))
        except self.errors as error:
            raise OSError(f"{self} cannot be listed: {first_line(error)}") from error

    def holds(self, key: str) -> bool:
        """Whether a file of this name, such as `sites/double.2.img/c/0/0/0/0`, lies there."""
        if self.path is not None:
            return (self.path / key).is_file()
        from obstore.exceptions import NotFoundError

        try:
            self.objects.head(key)
        except (FileNotFoundError, NotFoundError):
            return False
        return True

    def files(self, folder: str = "") -> Iterator[str]:
        """Names of all files in a folder and below it, relative to that folder."""
        if self.path is not None:
            top = self.path / folder
            yield from (
                file.relative_to(top).as_posix() for file in top.rglob("*") if file.is_file()
            )
            return
        start = f"{folder}/" if folder else ""
        for batch in self.objects.list(prefix=start or None):
            yield from (entry["path"].removeprefix(start) for entry in batch)

    def put(self, files: Mapping[str, bytes]) -> None:
        """Write files by name, each whole or not at all; once this returns or raises, no write is still under way."""
        if self.path is not None:
            for key, data in files.items():
                file = self.path / key
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic.whole_file(file) as draft:
                    draft.write_bytes(data)
            return
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for _ in pool.map(self.objects.put, files, files.values()):
                pass

    def remove(self, keys: Iterable[str]) -> None:
        """Remove files by name."""
        if self.path is not None:
            for key in keys:
                (self.path / key).unlink()
            return
        self.objects.delete(list(keys))

    def free(self) -> int | None:
        """Bytes left on the disk, or None for a URL."""
        if self.path is None:
            return None
        place = self.path.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def sibling(self, ending: str) -> Location:
        """The place whose name has `ending` appended."""
        return Location(f"{self}{ending}")

    def write_text(self, text: str) -> None:
        """Replace a text file at once: there is the old one or the new one, never half of it."""
        if self.path is None:
            folder, _, name = str(self.url).rpartition("/")
            try:
                Location(folder).objects.put(name, text.encode())
            except self.errors as error:
                raise OSError(f"{self} cannot be written: {first_line(error)}") from error
            return
        try:
            atomic.write_text(self.path, text)
        except OSError as error:
            raise OSError(f"{self} cannot be written: {first_line(error)}") from error

    def read_text(self) -> str | None:
        """What a text file holds, or None where there is none."""
        if self.path is not None:
            return self.path.read_text(encoding="utf-8") if self.path.is_file() else None
        from obstore.exceptions import NotFoundError

        folder, _, name = str(self.url).rpartition("/")
        try:
            return bytes(Location(folder).objects.get(name).bytes()).decode()
        except (FileNotFoundError, NotFoundError):
            return None

    @cached_property
    def objects(self) -> Any:
        """What obstore opens for a URL."""
        try:
            from obstore.store import from_url
        except ImportError as error:
            raise ValueError(
                f"{self} needs the package obstore, which is not installed; "
                "run: pip install 'jaxdict[cloud]'"
            ) from error
        try:
            return from_url(str(self.url))
        except Exception as error:
            raise ValueError(
                f"expected a folder or a URL such as s3://bucket/prefix, got {self}: "
                f"{first_line(error)}"
            ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


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
