"""Runs an iterator ahead in a thread of its own, so that two slow producers work at the same time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from replicator.cancellation import Cancellation
from replicator.handoff import Handoff

T = TypeVar("T")

_POLL = 0.5
"""Seconds between two looks at whether the work was cancelled."""


class _End:
    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _Ahead(Generic[T]):
    def __init__(self, make: Callable[[], Iterator[T]], depth: int, cancel: Cancellation) -> None:
        self._make = make
        self._cancel = cancel
        self._items: Handoff[T | _End] = Handoff(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def _put(self, item: T | _End) -> bool:
        while not self._stopped.is_set():
            if self._items.put(item, _POLL):
                return True
        return False

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            items = self._make()
            try:
                for item in items:
                    if not self._put(item):
                        break
            finally:
                close = getattr(items, "close", None)
                if close is not None:
                    close()
        except BaseException as raised:  # noqa: BLE001 - handed to the consumer, whatever it is
            error = raised
        self._put(_End(error))

    def __iter__(self) -> Iterator[T]:
        while True:
            self._cancel.check()
            try:
                item = self._items.get(_POLL)
            except queue.Empty:
                continue
            if item is None or isinstance(item, _End):
                if item is not None and item.error is not None:
                    raise item.error
                return
            yield item

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


@contextmanager
def ahead(make: Callable[[], Iterator[T]], cancel: Cancellation, *, depth: int = 4) -> Iterator[Iterator[T]]:
    """The items of ``make()``, produced in a thread at most ``depth`` ahead; its errors are raised to the consumer."""
    running = _Ahead(make, depth, cancel)
    try:
        yield iter(running)
    finally:
        running.stop()
