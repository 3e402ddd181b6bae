"""Bytes into the head of an image: those of a stream, and those of a snapshot that the head is put back to."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from backends.blocks import ChunkChecker
from backends.chunks import batches, runs
from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog, RawSnapshot, told_from
from backends.rbd.changes import find_changes
from backends.rbd.cluster import Session
from backends.rbd.context import Context
from backends.rbd.naming import Place
from backends.rbd.presence import require_still_there
from backends.rbd.reading import Reader
from backends.rbd.writing import Writer
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveRequest
from replicator.streams import Chunk, Extent, Stream

if TYPE_CHECKING:
    from backends.rbd.target import Target

CHECKPOINT_BYTES = 64 << 20
CHECKPOINT_SECONDS = 2.0


def apply_stream(
    context: Context,
    target: Target,
    request: ReceiveRequest,
    stream: Stream,
    *,
    start: int,
    empty: bool,
    reached: Callable[[int], None],
) -> None:
    """Write a whole stream; it is durable when this returns.

    :param empty: the image is one hole, so zeros need not be made
    :param reached: is told the offset below which every change is durable, now and then, and once more when this fails
    :raises ProtocolError, ChecksumMismatch: nothing of that chunk was written
    """
    label = str(request.volume)
    checker = ChunkChecker(
        f"{label}@{request.to.name}",
        size=request.to.size or 0,
        start=start,
        key=bytes.fromhex(request.key),
        checksums=context.checksums,
    )
    work = target.work
    with target.objects() as objects, Writer(target.image, label, start, work, objects).draining() as writer:
        try:
            points = _Checkpoints(writer, start, reached)
            for chunk in stream:
                work.check()
                checker.check(chunk)
                points.add(_write(writer, chunk, empty=empty))
            work.check()
            writer.finish()
            work.check()
        except BaseException:
            writer.salvage()
            if writer.durable > start:
                _try(reached, writer.durable)
            raise


def _try(reached: Callable[[int], None], offset: int) -> None:
    with contextlib.suppress(Exception):  # the error that is being raised already is the one to report
        reached(offset)


def _write(writer: Writer, chunk: Chunk, *, empty: bool) -> int:
    """Begin to write a checked chunk; how much of the volume it changes."""
    try:
        data = memoryview(chunk.data).cast("B")
        for offset, length, place in runs(chunk.extents):  # type: ignore[union-attr]
            if place is not None:
                writer.write(offset, data[place : place + length])
            elif not empty:
                writer.zero(offset, length)
        return chunk.length
    finally:
        chunk.release()


class _Checkpoints:
    """Flushes now and then, and tells how far it is."""

    def __init__(self, writer: Writer, start: int, reached: Callable[[int], None]) -> None:
        self._writer = writer
        self._told = start
        self._reached = reached
        self._unsaved = 0
        self._last = time.monotonic()

    def add(self, length: int) -> None:
        """So much more was begun to be written."""
        self._unsaved += length
        now = time.monotonic()
        if self._unsaved >= CHECKPOINT_BYTES or now - self._last >= CHECKPOINT_SECONDS:
            self._unsaved, self._last = 0, now
            self._writer.flush()
        if self._writer.durable > self._told:
            self._told = self._writer.durable
            self._reached(self._told)


def copy_back(
    session: Session, place: Place, image: Image, catalog: Catalog, base: RawSnapshot, work: Cancellation
) -> None:
    """Make the head what a snapshot is, of whose size it already is; durable when this returns.

    What was written since is read from the snapshot and written again: so what did not change is neither read nor
    written, and an interrupted one is simply done again.

    :raises NoSuchSnapshot: it was removed meanwhile, so what the head is now nobody knows
    """
    with session.image(place) as looking, session.image(place) as old:
        diff = find_changes(session, looking, catalog.raw, base, None)
        old.set_snap_by_id(base.id)
        reader = Reader(old, base.size, catalog.label, work)
        writer = Writer(image, catalog.label, 0, work)
        written = (Extent(extent.offset, extent.length) for extent in diff.extents())
        with writer.draining():
            for extents, parts in reader.read(batches(written)):
                work.check()
                for extent, data in zip(extents, parts, strict=True):
                    _write_back(writer, extent, data)
            writer.finish()
    require_still_there(session, place, catalog.image, told_from(catalog.raw, base), catalog.label)


def _write_back(writer: Writer, extent: Extent, data: bytes) -> None:
    """Zeros as zeros, so that the head does not take more room than the snapshot."""
    if data.count(0) == len(data):
        writer.zero(extent.offset, extent.length)
        return
    writer.write(extent.offset, data)
