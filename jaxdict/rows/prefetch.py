"""Items made ahead in a thread, and blocks that are read behind a progress bar."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from tqdm import tqdm

from jaxdict.rows.source import Block, Source

T = TypeVar("T")


def watched(source: Source, name: str) -> Iterator[Block]:
    """Blocks of a source, with a progress bar called `name`."""
    with tqdm(total=source.rows, unit="row", unit_scale=True, desc=name) as bar:
        for block in source.blocks():
            yield block
            bar.update(len(block.bits))


@contextmanager
def ahead(items: Iterator[T], depth: int = 4) -> Iterator[Iterator[T]]:
    """Run an iterator in a background thread, `depth` items ahead; its errors are raised here.

    Args:
        items: an iterator, endless or not; it is closed at the end if it is a generator.
        depth: finished items that may wait.

    Returns:
        A context manager that gives an iterator over the same items.
    """
    done = object()
    waiting: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    break
            put((done, None))
        except BaseException as error:
            put((done, error))
        finally:
            if hasattr(items, "close"):
                items.close()  # pyright: ignore[reportAttributeAccessIssue]

    def take() -> Iterator[T]:
        while True:
            item, error = waiting.get()
            if error is not None:
                raise error
            if item is done:
                return
            yield item

    thread = threading.Thread(target=work, name="rows", daemon=True)
    thread.start()
    try:
        yield take()
    finally:
        stop.set()
        thread.join()
