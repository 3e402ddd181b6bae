"""Reading an image: many reads under way at a time, their results in order."""

from __future__ import annotations

import errno
import queue
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from backends.rbd.binding import Completion, Image
from backends.rbd.cluster import OSD_SECONDS
from backends.rbd.failures import DENIED, why
from replicator.cancellation import Cancellation
from replicator.errors import DamagedData, StorageError, StorageUnavailable
from replicator.streams import Extent

DEPTH = 16
"""Reads under way at a time, at most."""
MAX_BYTES = 32 << 20
"""Bytes that are being read or wait for their turn, at most."""
DEADLINE = 2.0 * OSD_SECONDS
"""Seconds without any read coming back: librados should have ended each long before."""
NO_CACHE = 0x40
"""LIBRADOS_OP_FLAG_FADVISE_NOCACHE (rados/librados.h): what is read once does not take the place of what guests read
again and again in the memory of the OSDs."""
_POLL = 0.5
_TEMPORARY = frozenset({errno.EINTR, errno.EAGAIN, errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ECANCELED})

_Answer = tuple["_Batch", int, Completion, "bytes | None"]


@dataclass(slots=True, eq=False)
class _Batch:
    """Some extents that are read together."""

    extents: Sequence[Extent]
    parts: list[bytes] = field(default_factory=list)
    missing: int = 0


class Reader:
    """Reads ranges of an image as it is at one snapshot (or of a head that nobody writes to). For one thread.

    :param label: as people write it
    """

    def __init__(
        self,
        image: Image,
        size: int,
        label: str,
        cancel: Cancellation,
        *,
        depth: int = DEPTH,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self.size = size
        self._image = image
        self._label = label
        self._cancel = cancel
        self._depth = depth
        self._max_bytes = max_bytes

    def read(self, batches: Iterable[Sequence[Extent]]) -> Iterator[tuple[Sequence[Extent], list[bytes]]]:
        """Each batch with the bytes of its written extents (none for zero ones), in order.

        :raises DamagedData: the OSDs cannot read them
        """
        answers: queue.SimpleQueue[_Answer] = queue.SimpleQueue()
        wanted = self._wanted(batches)
        following = next(wanted, None)
        waiting: deque[_Batch] = deque()
        flying = held = 0
        try:
            while following is not None or waiting:
                while following is not None and flying < self._depth:
                    batch, index = following
                    if index is None and held >= self._max_bytes:
                        break
                    if index is None:
                        waiting.append(batch)
                        held += sum(e.length for e in batch.extents if not e.zero)
                    else:
                        self._start(batch, index, answers)
                        flying += 1
                    following = next(wanted, None)
                while waiting and not waiting[0].missing:
                    self._cancel.check()
                    done = waiting.popleft()
                    held -= sum(e.length for e in done.extents if not e.zero)
                    yield done.extents, [part for part, e in zip(done.parts, done.extents, strict=True) if not e.zero]
                if flying and waiting:
                    answer = self._next(answers)
                    flying -= 1  # also where it is an error: what is not under way is not waited for
                    self._take(answer)
        finally:
            # An image may not be closed under its reads.
            self._drain(answers, flying)

    @staticmethod
    def _wanted(batches: Iterable[Sequence[Extent]]) -> Iterator[tuple[_Batch, int | None]]:
        """What to start, one after the other: a batch itself (None), then each of its reads."""
        for extents in batches:
            written = [index for index, extent in enumerate(extents) if not extent.zero]
            batch = _Batch(extents, [b""] * len(extents), len(written))
            yield batch, None
            for index in written:
                yield batch, index

    def _start(self, batch: _Batch, index: int, answers: queue.SimpleQueue[_Answer]) -> None:
        put = answers.put
        extent = batch.extents[index]
        # In librbd's own thread, where an exception would be swallowed: so nothing but this is done there.
        self._image.aio_read(
            extent.offset, extent.length, lambda completion, data: put((batch, index, completion, data)), NO_CACHE
        )

    def _next(self, answers: queue.SimpleQueue[_Answer]) -> _Answer:
        end = time.monotonic() + DEADLINE
        while True:
            self._cancel.check()
            try:
                return answers.get(timeout=_POLL)
            except queue.Empty:
                if time.monotonic() >= end:
                    raise StorageUnavailable(
                        f"{self._label}: no read has come back for {DEADLINE:g} s", hint="see `ceph -s`"
                    ) from None

    def _take(self, answer: _Answer) -> None:
        batch, index, completion, data = answer
        extent = batch.extents[index]
        status = completion.get_return_value()
        if status < 0 or data is None or len(data) != extent.length:
            reason = why(-status) if status < 0 else f"{0 if data is None else len(data)} of {extent.length} bytes"
            if status < 0 and -status in _TEMPORARY:
                raise StorageUnavailable(
                    f"{self._label}: reading failed: {reason}", hint="see `ceph -s`; it is tried again"
                )
            if -status in DENIED:
                raise StorageError(
                    f"{self._label} cannot be read: {reason}",
                    hint="`replicator check` says which capabilities it lacks; see Ceph RBD in the README",
                )
            raise DamagedData(
                f"{self._label} cannot be read at byte {extent.offset}: {reason}",
                hint="see `ceph health detail`; a replica elsewhere can replace it",
            )
        batch.parts[index] = data
        batch.missing -= 1

    @staticmethod
    def _drain(answers: queue.SimpleQueue[_Answer], flying: int) -> None:
        end = time.monotonic() + DEADLINE
        for _ in range(flying):
            try:
                answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                return
