"""Writing into an image's head: many writes under way at a time, and how far all of them are durable."""

from __future__ import annotations

import errno
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from backends.rbd.binding import Completion, Image
from backends.rbd.cluster import OSD_SECONDS
from backends.rbd.failures import LOST, why
from replicator.cancellation import Cancellation
from replicator.errors import NoSpace, ReplicatorError, StorageError, StorageUnavailable, VolumeBusy
from replicator.streams import Buffer

DEPTH = 16
"""Writes under way at a time, at most."""
MAX_BYTES = 32 << 20
"""Bytes in them, at most."""
DEADLINE = 2.0 * OSD_SECONDS
"""Seconds without any write coming back: librados should have ended each long before."""
ZEROES = 64 << 20
"""Bytes of zeros in one request: each object in it is an operation."""
_POLL = 0.5
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TAKEN = frozenset({errno.EROFS, errno.EBUSY})


@dataclass(slots=True, eq=False)
class _Write:
    """One request.

    :ivar reaches: once it and all before it are done, everything below this offset is written; None: says nothing
    :ivar flush: what it reaches is durable then
    """

    length: int
    reaches: int | None
    flush: bool = False
    completion: Completion | None = None


class Writer:
    """Writes to a head. Offsets given to it ascend. For one thread.

    :ivar durable: everything below this offset was written and flushed
    :param label: as people write it
    :param start: the offset that it begins at
    """

    def __init__(self, image: Image, label: str, start: int, cancel: Cancellation) -> None:
        self.durable = start
        self._image = image
        self._label = label
        self._cancel = cancel
        self._window: deque[_Write] = deque()
        self._answers: queue.SimpleQueue[tuple[_Write, Completion]] = queue.SimpleQueue()
        self._flying = 0
        self._bytes = 0
        self._reached = start
        self._failed = False

    def write(self, offset: int, data: Buffer) -> None:
        """Begin a write. :raises StorageError: an earlier one failed"""
        made = bytes(data)  # what librbd's binding takes
        self._start(_Write(len(made), offset + len(made)), lambda done: self._image.aio_write(made, offset, done))

    def zero(self, offset: int, length: int) -> None:
        """Begin to make zeros. Never a discard: of parts of objects that leaves data where it is."""
        end = offset + length
        while offset < end:
            # Whole pieces of the image: what is zeroed whole is removed, and not written.
            piece = min(end, (offset // ZEROES + 1) * ZEROES)
            self._start(_Write(0, piece), _zeroing(self._image, offset, piece - offset))
            offset = piece

    def flush(self) -> None:
        """Begin to make durable what was begun before."""
        self._start(_Write(0, None, flush=True), self._image.aio_flush)

    def finish(self) -> None:
        """Wait until all is written and durable. :raises StorageError: some of it is not"""
        self.flush()
        while self._window:
            self._collect()

    def salvage(self) -> None:
        """After an error elsewhere: make durable what was written in order, and say so in ``durable``. Best effort."""
        if self._failed:
            self._drain()
            return
        self._cancel = Cancellation()  # the end was asked for, and these are its last steps
        try:
            self.finish()
        except (StorageError, OSError):
            self._drain()

    @contextmanager
    def draining(self) -> Iterator[None]:
        """An image may not be closed under its writes: whatever happens in the block, none is under way after it."""
        try:
            yield
        finally:
            self._drain()

    def _start(self, request: _Write, begin: Callable[[Callable[[Completion], None]], Completion]) -> None:
        while self._window and (self._flying >= DEPTH or self._bytes + request.length > MAX_BYTES):
            self._collect()
        put = self._answers.put
        # In librbd's own thread, where an exception would be swallowed: so nothing but this is done there.
        begin(lambda completion: put((request, completion)))
        self._window.append(request)
        self._flying += 1
        self._bytes += request.length
        self._settle()

    def _collect(self) -> None:
        """Wait for one to come back. :raises StorageError: it failed"""
        end = time.monotonic() + DEADLINE
        while True:
            self._cancel.check()
            try:
                answer = self._answers.get(timeout=_POLL)
                break
            except queue.Empty:
                if time.monotonic() >= end:
                    self._failed = True
                    raise StorageUnavailable(
                        f"{self._label}: no write has come back for {DEADLINE:g} s", hint="see `ceph -s`"
                    ) from None
        self._take(*answer)
        self._settle()

    def _take(self, request: _Write, completion: Completion) -> None:
        self._flying -= 1
        self._bytes -= request.length
        request.completion = completion
        status = completion.get_return_value()
        if status < 0:
            self._failed = True
            raise _failure(self._label, -status)

    def _settle(self) -> None:
        while self._window and self._window[0].completion is not None:
            done = self._window.popleft()
            if done.flush:
                self.durable = self._reached
            elif done.reaches is not None:
                self._reached = done.reaches

    def _drain(self) -> None:
        end = time.monotonic() + DEADLINE
        while self._flying:
            try:
                self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
            self._flying -= 1


def _zeroing(image: Image, offset: int, length: int) -> Callable[[Callable[[Completion], None]], Completion]:
    return lambda done: image.aio_write_zeroes(offset, length, done)


def _failure(label: str, code: int) -> ReplicatorError:
    reason = why(code)
    if code in _FULL:
        return NoSpace(
            f"{label}: writing failed: the cluster is full, or the pool's quota is reached ({reason})",
            hint="see `ceph df`; what was received so far is kept",
        )
    if code in LOST:
        return StorageUnavailable(f"{label}: writing failed: {reason}", hint="see `ceph -s`; it is tried again")
    if code in _TAKEN:
        return VolumeBusy(
            f"{label}: writing failed: another client took the image's lock ({reason})", hint="`rbd status` shows who"
        )
    return StorageError(f"{label}: writing failed: {reason}", hint="see `ceph -s` and `rbd info` of the image")
