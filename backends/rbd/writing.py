"""Writing into an image's head: many writes under way at a time, and how far all of them are durable.

Small pieces that follow each other within one object are written together, where ``objects.py`` says that they can be.
"""

from __future__ import annotations

import errno
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from backends.rbd.binding import Completion, Image
from backends.rbd.cluster import OSD_SECONDS
from backends.rbd.failures import LOST, why
from backends.rbd.objects import Objects
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
SMALL = 64 << 10
"""Bytes of a piece that may be written together with others, at most: the bytes are what a larger one costs."""
TOGETHER = 64
"""Pieces in one operation, at most."""
_FEWEST = 3
"""Pieces that are worth it: the first of them is an operation of its own in any case."""
_POLL = 0.5
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_TAKEN = frozenset({errno.EROFS, errno.EBUSY})


_Done = Callable[[Completion], None]
_Begin = Callable[[_Done], object]


@dataclass(slots=True, eq=False)
class _Write:
    """One request.

    :ivar reaches: once it and all before it are done, everything below this offset is written; None: says nothing
    :ivar flush: what it reaches is durable then
    :ivar begin: begins it, and keeps the bytes alive until they are written, as the bindings do not
    :ivar rest: begun once this has come back; the request is done when that has
    """

    length: int
    reaches: int | None
    flush: bool = False
    begin: _Begin | None = None
    rest: _Begin | None = None
    completion: Completion | None = None


class Writer:
    """Writes to a head. Offsets given to it ascend. For one thread.

    :ivar durable: everything below this offset was written and flushed
    :param label: as people write it
    :param start: the offset that it begins at
    :param objects: of the image, where they may be written to
    """

    def __init__(
        self, image: Image, label: str, start: int, cancel: Cancellation, objects: Objects | None = None
    ) -> None:
        self.durable = start
        self._image = image
        self._label = label
        self._cancel = cancel
        self._objects = objects
        self._together: list[tuple[int, bytes]] = []
        self._window: deque[_Write] = deque()
        self._answers: queue.SimpleQueue[tuple[_Write, Completion]] = queue.SimpleQueue()
        self._flying = 0
        self._bytes = 0
        self._reached = start
        self._failed = False

    def write(self, offset: int, data: Buffer) -> None:
        """Begin a write. :raises StorageError: an earlier one failed"""
        made = bytes(data)  # what librbd's binding takes
        if self._objects is None or len(made) > SMALL or self._objects.crosses(offset, len(made)):
            self._write_together()
            self._write_one(offset, made)
            return
        pieces = self._together
        if pieces and (len(pieces) == TOGETHER or self._objects.number(pieces[0][0]) != self._objects.number(offset)):
            self._write_together()
        self._together.append((offset, made))

    def _write_one(self, offset: int, data: bytes) -> None:
        self._start(_Write(len(data), offset + len(data)), self._writing(offset, data))

    def _writing(self, offset: int, data: bytes) -> _Begin:
        return lambda done: self._image.aio_write(data, offset, done)

    def _write_together(self) -> None:
        """Begin to write what was kept for it: the first piece by librbd, then all others of its object."""
        pieces, self._together = self._together, []
        objects = self._objects
        if objects is None or len(pieces) < _FEWEST:
            for offset, data in pieces:
                self._write_one(offset, data)
            return
        (first, data), others = pieces[0], pieces[1:]
        last, end = others[-1]
        request = _Write(sum(len(piece) for _, piece in pieces), last + len(end))
        request.rest = lambda done: objects.write(objects.number(first), others, done)
        self._start(request, self._writing(first, data))

    def zero(self, offset: int, length: int) -> None:
        """Begin to make zeros. Never a discard: of parts of objects that leaves data where it is."""
        self._write_together()
        end = offset + length
        while offset < end:
            # Whole pieces of the image: what is zeroed whole is removed, and not written.
            piece = min(end, (offset // ZEROES + 1) * ZEROES)
            self._start(_Write(0, piece), _zeroing(self._image, offset, piece - offset))
            offset = piece

    def flush(self) -> None:
        """Begin to make durable what was begun before."""
        self._write_together()
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
    def draining(self) -> Iterator[Self]:
        """An image may not be closed under its writes: whatever happens in the block, none is under way after it."""
        try:
            yield self
        finally:
            self._drain()

    def _start(self, request: _Write, begin: _Begin) -> None:
        while self._window and (self._flying >= DEPTH or self._bytes + request.length > MAX_BYTES):
            self._collect()
        self._begin(request, begin)
        self._window.append(request)
        self._flying += 1
        self._bytes += request.length
        self._settle()

    def _begin(self, request: _Write, begin: _Begin) -> None:
        put = self._answers.put
        request.begin = begin
        # In librbd's own thread, where an exception would be swallowed: so nothing but this is done there.
        begin(lambda completion: put((request, completion)))

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
        status = completion.get_return_value()
        if status < 0:
            self._failed = True
            raise _failure(self._label, -status)
        rest, request.rest = request.rest, None
        if rest is None:
            request.completion, request.begin = completion, None
            return
        try:
            self._begin(request, rest)
        except BaseException:
            self._failed = True
            raise
        self._flying += 1
        self._bytes += request.length

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


def _zeroing(image: Image, offset: int, length: int) -> _Begin:
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
