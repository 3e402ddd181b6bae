"""From one thread to another: a short queue with a fixed number of places.

Two of the interpreter's built-in queues, one of items and one of free places: its general bounded queue does its
locking in Python, several locks for every item on both sides, which shows where a thousand items pass in a second.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Handoff(Generic[T]):
    """Items on their way from the thread that produces to the one that consumes.

    :param places: items that may wait in it
    """

    def __init__(self, places: int) -> None:
        self._items: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(places):
            self._places.put(None)

    def put(self, item: T, timeout: float) -> bool:
        """Put an item in; False if there was no place for it within ``timeout`` seconds."""
        try:
            self._places.get(timeout=timeout)
        except queue.Empty:
            return False
        self._items.put(item)
        return True

    def end(self) -> None:
        """Nothing more comes: after what is in it, :meth:`get` gives None."""
        self._items.put(None)

    def get(self, timeout: float) -> T | None:
        """The next item, waiting at most ``timeout`` seconds; None at the end, which it tells once.

        :raises queue.Empty: nothing came in time
        """
        item = self._items.get(timeout=timeout)
        if item is not None:
            self._places.put(None)
        return item

    def drain(self, discard: Callable[[T], None]) -> None:
        """Take out and discard all items in it; an end that was told stays told."""
        ended = False
        with suppress(queue.Empty):
            while True:
                item = self._items.get_nowait()
                if item is None:
                    ended = True
                else:
                    discard(item)
                    self._places.put(None)
        if ended:
            self._items.put(None)
