"""The source side: sending, estimating, digesting. All of it on images that are open for reading only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from backends.blocks import GRANULARITY
from backends.chunks import batches
from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog
from backends.rbd.changes import Diff, compared, find_changes, selected
from backends.rbd.cluster import Session
from backends.rbd.context import Context
from backends.rbd.reading import Reader
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.endpoint import DigestBatch, DigestRequest, SendRequest
from replicator.errors import NoSuchSnapshot, NoSuchVolume, StaleResume, Unsupported, UsageError
from replicator.model import StreamKind, VersionKind, VersionRef
from replicator.prefetch import ahead
from replicator.streams import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    DIGEST_SIZE,
    MAX_EXTENTS,
    BlockChunk,
    Buffer,
    ChunkStream,
    Extent,
    Stream,
)

MAX_BLOCK_SIZE = 16 << 20
MIN_BLOCK_SIZE = 512
_READ = 1 << 20
"""Bytes read at a time for digests."""
_BATCH = 16
"""Reads that make one batch of digests."""
_ZEROS = b"\1" * (BLOCK_SIZE // GRANULARITY)
"""A run of zeros that is worth an extent, in a map of pieces: shorter ones are sent as data."""
_MAX_DIVIDED = MAX_EXTENTS - 2 * (CHUNK_SIZE // BLOCK_SIZE)
"""Extents of a chunk that may still be divided."""


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

    def chunks() -> Iterator[BlockChunk]:
        with ahead(make, cancel) as items:
            yield from items

    return ChunkStream(StreamKind.BLOCKS, chunks(), estimate=size, on_close=opened.close)


def make_chunk(batch: Sequence[Extent], parts: list[bytes], checksums: Checksums, key: bytes) -> BlockChunk:
    """A chunk of a stream: these extents with the bytes of the written ones; long runs of zeros become zero extents."""
    extents: list[Extent] = []
    pieces: list[Buffer] = []
    written = iter(parts)
    for extent in batch:
        if extent.zero:
            _append(extents, extent)
            continue
        part = next(written)
        whole = memoryview(part)
        for piece in _divided(extent, part, checksums, few=len(batch) <= _MAX_DIVIDED):
            _append(extents, piece)
            if not piece.zero:
                start = piece.offset - extent.offset
                pieces.append(part if piece == extent else whole[start : start + piece.length])
    digests = bytearray(sum(-(-len(piece) // BLOCK_SIZE) for piece in pieces) * DIGEST_SIZE)
    blocks, view = 0, memoryview(digests)
    for data in pieces:
        blocks += checksums.digest_blocks_into(data, key, view[blocks * DIGEST_SIZE :], None, block_size=BLOCK_SIZE)
    return BlockChunk(tuple(extents), pieces[0] if len(pieces) == 1 else b"".join(pieces), bytes(digests))


def _divided(extent: Extent, data: bytes, checksums: Checksums, *, few: bool) -> list[Extent]:
    """A written extent as what is data and what are zeros in it. Of an object that is new, or was made longer, a diff
    tells all that lies before its last byte. Zeros are worth an operation at the target where they are many.

    :param few: the chunk has room for more extents
    """
    zeros = bytearray(-(-len(data) // GRANULARITY))
    checksums.zero_map(data, zeros, block_size=GRANULARITY)
    begin = zeros.find(_ZEROS) if few else -1
    if begin < 0:
        return [Extent(extent.offset, extent.length, zero=zeros.count(1) == len(zeros))]
    found: list[Extent] = []
    done = 0
    while begin >= 0:
        following = zeros.find(0, begin)
        end = len(data) if following < 0 else following * GRANULARITY
        if begin * GRANULARITY > done:
            found.append(Extent(extent.offset + done, begin * GRANULARITY - done))
        found.append(Extent(extent.offset + begin * GRANULARITY, end - begin * GRANULARITY, zero=True))
        done = end
        begin = zeros.find(_ZEROS, following) if following >= 0 else -1
    if done < len(data):
        found.append(Extent(extent.offset + done, len(data) - done))
    return found


def _append(extents: list[Extent], extent: Extent) -> None:
    """Zeros that go on are one extent. Written ones are not joined: digests are counted from where each begins."""
    last = extents[-1] if extents else None
    if last is not None and last.zero and extent.zero and last.end == extent.offset:
        extents[-1] = Extent(last.offset, last.length + extent.length, zero=True)
    else:
        extents.append(extent)


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
                yield DigestBatch(first, size, bytes(found))
                first, found = extent.end, bytearray()
