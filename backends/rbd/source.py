"""The source side: sending, estimating, digesting. All of it on images that are open for reading only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from backends.chunks import batches, without_zeros
from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog
from backends.rbd.changes import Diff, compared, find_changes, selected
from backends.rbd.cluster import Session
from backends.rbd.context import Context
from backends.rbd.presence import require_still_there
from backends.rbd.reading import Reader
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.endpoint import DigestBatch, DigestRequest, SendRequest
from replicator.errors import NoSuchSnapshot, NoSuchVolume, StaleResume, Unsupported, UsageError
from replicator.model import StreamKind, VersionKind, VersionRef
from replicator.prefetch import ahead
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE, BlockChunk, ChunkStream, Extent, Stream

MAX_BLOCK_SIZE = 16 << 20
MIN_BLOCK_SIZE = 512
_READ = 1 << 20
"""Bytes read at a time for digests."""
_BATCH = 16
"""Reads that make one batch of digests."""


class _Source:
    """A snapshot that is read, and what it is compared with.

    :ivar opened: what it opens is closed with this
    """

    def __init__(
        self,
        context: Context,
        session: Session,
        volume: str,
        base: VersionRef | None,
        to: VersionRef,
        opened: ExitStack,
    ) -> None:
        if base is not None and base.kind is not VersionKind.SNAPSHOT:
            raise Unsupported(f"{context.label(volume)} has no bookmarks", hint="")
        self._context = context
        self._session = session
        self._volume = volume
        self.opened = opened
        self.image, self.catalog = _opened(context, session, volume, to, opened)
        self.to = self.catalog.require(to)
        self.base = self.catalog.require(base) if base is not None else None
        self.size = self.to.raw.size
        self.label = f"{context.label(volume)}@{self.to.version.name}"
        self.image.set_snap_by_id(self.to.raw.id)

    def diff(self) -> Diff | None:
        """The difference as librbd tells it; None where it cannot: the base is newer (rebuilt), so both are read."""
        if self.base is not None and self.base.raw.id > self.to.raw.id:
            return None
        base = self.base.raw if self.base is not None else None
        return find_changes(self._session, self.image, self.catalog.raw, base, self.to.raw)

    def require_still_there(self) -> None:
        """What was read may be believed. :raises NoSuchSnapshot: it was removed meanwhile"""
        read = [found.raw for found in (self.base, self.to) if found is not None]
        place = self._context.naming.place(self._volume)
        require_still_there(self._session, place, self.catalog.image, read, self._context.label(self._volume))

    def extents(self, request: SendRequest, start: int, cancel: Cancellation) -> Iterator[Extent]:
        """What the stream carries."""
        if request.ranges is not None:
            return selected(request.ranges, self.size, start)
        diff = self.diff()
        if diff is not None:
            return diff.extents(start)
        return self._compared(start, cancel)

    def _compared(self, start: int, cancel: Cancellation) -> Iterator[Extent]:
        if self.base is None:
            raise NoSuchSnapshot(f"{self.label} is compared with nothing", hint="")
        # Handles of their own: this one reads what is found, at the same time.
        readers = []
        for snapshot in (self.to, self.base):
            image, _ = self.opened.enter_context(self._context.opened(self._session, self._volume))
            image.set_snap_by_id(snapshot.raw.id)
            readers.append(Reader(image, snapshot.raw.size, self.label, cancel))
        return compared(readers[0], readers[1], start, cancel)


def _opened(
    context: Context, session: Session, volume: str, version: VersionRef, opened: ExitStack
) -> tuple[Image, Catalog]:
    try:
        return opened.enter_context(context.opened(session, volume))
    except NoSuchVolume as error:
        raise NoSuchSnapshot(f"{error}, so it has no snapshot {version.name}", hint=error.hint) from None


def estimate(context: Context, volume: str, base: VersionRef | None, to: VersionRef) -> int | None:
    """See :meth:`backends.base.Backend.estimate`."""
    with context.session(f"estimating {volume}@{to.name}") as session, ExitStack() as opened:
        diff = _Source(context, session, volume, base, to, opened).diff()
        return None if diff is None else diff.estimate()


def open_stream(context: Context, request: SendRequest, cancel: Cancellation) -> Stream:
    """See :meth:`replicator.endpoint.Endpoint.send`."""
    start = _start(context, request)
    name = f"{request.volume.name}@{request.to.name}"
    with ExitStack() as opening:
        session = opening.enter_context(context.session(f"sending {name}"))
        source = _Source(context, session, request.volume.name, request.base, request.to, opening)
        if start > source.size:
            raise _stale(context, request, f"it is at byte {start}, beyond the snapshot's end")
        if request.ranges is not None:
            size: int | None = sum(part.length for part in request.ranges)
        else:
            diff = source.diff()
            size = None if diff is None else diff.estimate(start)
        opened = source.opened = opening.pop_all()

    def make() -> Iterator[BlockChunk]:
        with session.errors(f"sending {name}"):
            reader = Reader(source.image, source.size, source.label, cancel)
            found = batches(source.extents(request, start, cancel))
            key = bytes.fromhex(request.key)
            for batch, parts in reader.read(found):
                cancel.check()
                yield make_chunk(batch, parts, context.checksums, key)
            source.require_still_there()

    def chunks() -> Iterator[BlockChunk]:
        with ahead(make, cancel) as items:
            yield from items

    return ChunkStream(StreamKind.BLOCKS, chunks(), estimate=size, on_close=opened.close)


def make_chunk(batch: Sequence[Extent], parts: list[bytes], checksums: Checksums, key: bytes) -> BlockChunk:
    """A chunk of a stream: these extents with the bytes of the written ones; blocks of zeros become zero extents."""
    if not parts:
        return BlockChunk(tuple(batch), b"", b"")
    digests = bytearray(sum(-(-len(part) // BLOCK_SIZE) for part in parts) * DIGEST_SIZE)
    zeros = bytearray(len(digests) // DIGEST_SIZE)
    blocks = 0
    for part in parts:
        blocks += checksums.digest_blocks_into(
            part, key, memoryview(digests)[blocks * DIGEST_SIZE :], memoryview(zeros)[blocks:], block_size=BLOCK_SIZE
        )
    if not any(zeros):
        return BlockChunk(tuple(batch), parts[0] if len(parts) == 1 else b"".join(parts), bytes(digests))
    data = bytearray().join(parts)
    return without_zeros(list(batch), memoryview(data), digests, zeros, lambda: None)


def _start(context: Context, request: SendRequest) -> int:
    resume = request.resume
    if resume is None:
        return 0
    base = request.base.guid if request.base is not None else None
    if resume.kind is not StreamKind.BLOCKS:
        raise _stale(context, request, f"it is of a {resume.kind} stream")
    if resume.to_guid != request.to.guid or resume.base_guid != base:
        raise _stale(context, request, "it is of another snapshot, or has another base")
    return resume.offset


def _stale(context: Context, request: SendRequest, why: str) -> StaleResume:
    return StaleResume(
        f"the half-received {request.to.name} of {context.label(request.volume.name)} cannot be continued: {why}",
        hint="the next run discards it and sends the snapshot from the start",
    )


# -- digests


def digest_blocks(context: Context, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
    """See :meth:`replicator.endpoint.Endpoint.digests`. Everything is read: no object map is believed."""
    size = request.block_size
    if not MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE or request.offset % size or request.offset < 0:
        raise UsageError(f"digests of {size}-byte blocks from byte {request.offset} cannot be made", hint="")
    cancel.check()
    with ExitStack() as opening:
        name = f"{request.volume.name}@{request.version.name}"
        session = opening.enter_context(context.session(f"digesting {name}"))
        source = _Source(context, session, request.volume.name, None, request.version, opening)
        opened = opening.pop_all()
    return _digests(context, session, request, source, opened, cancel)


def _digests(
    context: Context,
    session: Session,
    request: DigestRequest,
    source: _Source,
    opened: ExitStack,
    cancel: Cancellation,
) -> Iterator[DigestBatch]:
    with opened, session.errors(f"digesting {source.label}"):
        size, key = request.block_size, bytes.fromhex(request.key)
        end = source.size if request.length is None else min(source.size, request.offset + request.length)
        unit = max(1, _READ // size) * size
        reads = ([Extent(offset, min(unit, end - offset))] for offset in range(request.offset, end, unit))
        reader = Reader(source.image, source.size, source.label, cancel)
        first, found = request.offset, bytearray()
        for (extent,), (data,) in reader.read(reads):
            cancel.check()
            found += context.checksums.digest_blocks(data, key, block_size=size)
            if extent.end == end or extent.end - first >= _BATCH * unit:
                if extent.end == end:
                    source.require_still_there()
                yield DigestBatch(first, size, bytes(found))
                first, found = extent.end, bytearray()
