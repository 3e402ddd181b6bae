"""The source side: sending, estimating, digesting. All of it on images that are open for reading only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from backends.blocks import GRANULARITY, merged
from backends.chunks import batches
from backends.rbd.binding import Image
from backends.rbd.catalog import Catalog, RawSnapshot, Snapshot, told_from
from backends.rbd.changes import CloneDiff, Diff, compared, find_changes, find_own, selected
from backends.rbd.cluster import Session
from backends.rbd.context import Context
from backends.rbd.parents import OpenParent, opened_parent
from backends.rbd.presence import require_still_there
from backends.rbd.reading import Reader
from backends.requests import check_digests, check_offset, opened_stream, resume_offset
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.endpoint import DigestBatch, DigestRequest, Range, SendRequest
from replicator.errors import NoSuchSnapshot, NoSuchVolume, Unsupported
from replicator.model import VersionKind, VersionRef
from replicator.streams import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    DIGEST_SIZE,
    MAX_EXTENTS,
    BlockChunk,
    Buffer,
    Extent,
    Stream,
)

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
        self.origin = self._origin(base) if base is not None else None
        self.base = self.catalog.require(base) if base is not None and self.origin is None else None
        self.size = self.to.raw.size
        self.label = f"{context.label(volume)}@{self.to.version.name}"
        self.image.set_snap_by_id(self.to.raw.id)

    def _origin(self, base: VersionRef) -> OpenParent | None:
        """What the image is a clone of, if ``base`` is the snapshot that it began as."""
        if self.catalog.find(base) is not None:
            return None
        place = self._context.naming.place(self._volume)
        found = self.opened.enter_context(opened_parent(self._context, self._session, place, self.image))
        return found if found is not None and found.snapshot.version.guid == base.guid else None

    def diff(self) -> Diff | CloneDiff | None:
        """The difference as librbd tells it; None where it cannot, so both are read: the base is newer (rebuilt), or
        shows what is in no object."""
        raw = self.catalog.raw
        if self.origin is not None:
            return find_own(self._session, self.image, raw, self.origin.snapshot.raw, self.to.raw)
        if self.base is not None and self.base.raw.id > self.to.raw.id:
            return None
        found = find_changes(self._session, self.image, raw, self.base.raw if self.base else None, self.to.raw)
        return None if found.hidden else found

    def require_still_there(self) -> None:
        """What was read may be believed. :raises NoSuchSnapshot: it was removed meanwhile"""
        base = told_from(self.catalog.raw, self.base.raw) if self.base is not None else ()
        self._require(self._volume, self.catalog.image, (*base, self.to.raw))
        if self.origin is not None:  # one that was removed while it has clones lives on in the trash, and counts
            self._require(self.origin.volume, self.origin.catalog.image, (self.origin.snapshot.raw,))

    def _require(self, volume: str, image: str, read: Sequence[RawSnapshot]) -> None:
        place, label = self._context.naming.place(volume), self._context.label(volume)
        require_still_there(self._session, place, image, read, label)

    def extents(self, request: SendRequest, start: int, cancel: Cancellation) -> Iterator[Extent]:
        """What the stream carries."""
        if request.ranges is not None:
            return selected(request.ranges, self.size, start)
        diff = self.diff()
        if isinstance(diff, Diff):
            return diff.extents(start)
        everything = [Range(start, self.size - start)]
        newer, older = self._readers(cancel)
        return merged(compared(newer, older, diff.ranges(start) if diff is not None else everything, cancel))

    def _readers(self, cancel: Cancellation) -> tuple[Reader, Reader]:
        """Handles of their own for what is compared: another one reads what is found, at the same time."""
        if self.origin is not None:
            older, volume = self.origin.snapshot, self.origin.volume
        elif self.base is not None:
            older, volume = self.base, self._volume
        else:
            raise NoSuchSnapshot(f"{self.label} is compared with nothing", hint="")
        return self._reader(self._volume, self.to, cancel), self._reader(volume, older, cancel)

    def _reader(self, volume: str, snapshot: Snapshot, cancel: Cancellation) -> Reader:
        image, _ = self.opened.enter_context(self._context.opened(self._session, volume))
        image.set_snap_by_id(snapshot.raw.id)
        return Reader(image, snapshot.raw.size, self.label, cancel)


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
    start = resume_offset(request)
    name = f"{request.volume.name}@{request.to.name}"
    with ExitStack() as opening:
        session = opening.enter_context(context.session(f"sending {name}"))
        source = _Source(context, session, request.volume.name, request.base, request.to, opening)
        check_offset(request, start, source.size)
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

    return opened_stream(make, cancel, estimate=size, on_close=opened.close)


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


# -- digests


def digest_blocks(context: Context, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
    """See :meth:`replicator.endpoint.Endpoint.digests`. Everything is read: no object map is believed."""
    check_digests(request)
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
