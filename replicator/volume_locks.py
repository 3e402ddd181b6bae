"""Who works on which volume of this node, in this process; and how often roles have changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from replicator.cancellation import Cancellation
from replicator.errors import ReplicatorError, VolumeBusy
from replicator.model import VolumeId

INTERRUPTION = 45.0
"""Seconds that a promotion waits for a receive that it ends."""


@dataclass(frozen=True, slots=True)
class _Work:
    """What is under way on a volume; ``cancel`` where it can be ended."""

    what: str
    cancel: Cancellation | None


class VolumeLocks:
    """At most one writing operation of a volume at a time, in this process."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._busy: dict[VolumeId, _Work] = {}

    @contextmanager
    def writing(self, volume: VolumeId, what: str, cancel: Cancellation | None = None) -> Iterator[None]:
        """Have the volume to oneself.

        :param cancel: ends the work, where something else is more urgent
        :raises VolumeBusy: at once, where another operation has it
        """
        with self._changed:
            other = self._busy.get(volume)
            if other is not None:
                raise VolumeBusy(
                    f"volume {volume} is in use: {other.what} is under way, so {what} cannot begin",
                    hint="wait until it is done; `replicator status` shows what runs",
                )
            self._busy[volume] = _Work(what, cancel)
        try:
            yield
        finally:
            with self._changed:
                del self._busy[volume]
                self._changed.notify_all()

    def interrupt(self, volume: VolumeId, error: ReplicatorError, seconds: float = INTERRUPTION) -> None:
        """End what is under way on a volume and can be ended, and wait until it has: its peer may be dead, and nobody
        may have noticed yet."""
        deadline = time.monotonic() + seconds
        with self._changed:
            work = self._busy.get(volume)
        if work is None or work.cancel is None:
            return
        work.cancel.cancel(error)
        with self._changed:
            self._changed.wait_for(lambda: self._busy.get(volume) is not work, max(0.0, deadline - time.monotonic()))


class RoleChanges:
    """Counts how often the role or epoch of any copy was changed, or one was made. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0

    @property
    def count(self) -> int:
        """So far, in this process."""
        with self._lock:
            return self._count

    def add(self) -> None:
        """One more."""
        with self._lock:
            self._count += 1
