"""Cancels work that stands still.

Deadlines bound each single wait of a transfer; this bounds the time in which nothing comes of them. A peer that
answers heartbeats but never delivers, a storage that never returns: both end here, are counted and tried again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from replicator.cancellation import Cancellation
from replicator.errors import DeadlineExceeded


class Watchdog:
    """Cancels ``cancel`` when nothing calls :meth:`touch` for as long as the current phase allows."""

    def __init__(self, cancel: Cancellation, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._cancel = cancel
        self._clock = clock
        self._wake = threading.Condition()
        self._limit = 0.0
        self._phase = ""
        self._since = clock()
        self._done = False

    def phase(self, name: str, limit: float) -> None:
        """Something begins that may take ``limit`` seconds between two touches."""
        with self._wake:
            self._phase, self._limit, self._since = name, limit, self._clock()
            self._wake.notify()

    def touch(self) -> None:
        """It moves."""
        self._since = self._clock()

    @contextmanager
    def watching(self, name: str, limit: float) -> Iterator[None]:
        """Watch while the block runs, beginning with phase ``name``."""
        self.phase(name, limit)
        thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._wake:
                self._done = True
                self._wake.notify()
            thread.join()

    def _watch(self) -> None:
        with self._wake:
            while not self._done:
                left = self._since + self._limit - self._clock()
                if left > 0:
                    self._wake.wait(left)
                    continue
                phase, limit = self._phase, self._limit
                self._done = True
                self._wake.release()
                try:
                    self._cancel.cancel(
                        DeadlineExceeded(
                            f"nothing moved for {limit:.0f} s while {phase}",
                            hint="check the storages and the network; the next run continues from what is durable",
                        )
                    )
                finally:
                    self._wake.acquire()
