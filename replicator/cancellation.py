"""Stopping long work from another thread, at once and once.

A :class:`Cancellation` is handed down a call; whoever blocks on something registers how to unblock it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from replicator.errors import Cancelled, ReplicatorError


class Cancellation:
    """A request to stop, given at most once.

    Thread-safe. ``cancel`` runs the registered callbacks in the calling thread, so they must not block.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callbacks: list[Callable[[], None]] = []
        self._event = threading.Event()
        self._error: ReplicatorError | None = None

    def cancel(self, error: ReplicatorError | None = None) -> None:
        """Stop the work; ``error`` is what it ends with (default: :class:`~replicator.errors.Cancelled`)."""
        with self._lock:
            if self._event.is_set():
                return
            self._error = error or Cancelled("stopped on request", hint="the next run continues where this one ended")
            self._event.set()
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    @property
    def cancelled(self) -> bool:
        """Whether ``cancel`` was called."""
        return self._event.is_set()

    @property
    def error(self) -> ReplicatorError | None:
        """What the work ends with, once cancelled."""
        return self._error

    def check(self) -> None:
        """Raise the error given to ``cancel``, if it was called."""
        if self._error is not None:
            raise self._error

    def wait(self, seconds: float) -> bool:
        """Wait until cancelled, at most ``seconds``; whether it was."""
        return self._event.wait(seconds)

    @contextmanager
    def unblock(self, callback: Callable[[], None]) -> Iterator[None]:
        """Have ``callback`` called on cancellation while the block runs; at once if cancelled already."""
        with self._lock:
            run_now = self._event.is_set()
            if not run_now:
                self._callbacks.append(callback)
        if run_now:
            callback()
        try:
            yield
        finally:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

    @contextmanager
    def child(self) -> Iterator[Cancellation]:
        """A request of its own for a part of the work: cancelled with this one, but not the other way round."""
        part = Cancellation()
        with self.unblock(lambda: part.cancel(self._error)):
            yield part
