"""What storages of block streams share: finding and packing extents, and checking every chunk before it is written.

Offsets, lengths and digests come from a peer, so nothing about them is taken for granted; a length of zero is refused
as much as one that is too large.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from replicator.checksums import Checksums
from replicator.endpoint import Range
from replicator.errors import ChecksumMismatch, ProtocolError
from replicator.streams import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    DIGEST_SIZE,
    MAX_EXTENTS,
    BlockChunk,
    Chunk,
    Extent,
    NativeChunk,
)

GRANULARITY = 4096
"""Bytes: two versions are compared in pieces of this size."""

_HINT = "nothing of it was kept as complete; see the sender's log, and check that both nodes run the same version"


class ChunkChecker:
    """Checks the chunks of one stream, in their order.

    :param what: the volume being received, for messages
    :param size: bytes of the version being received
    :param start: every change below this offset is there already (a resumed stream)
    :param key: the stream's key
    """

    def __init__(self, what: str, *, size: int, start: int, key: bytes, checksums: Checksums) -> None:
        self._what = what
        self._size = size
        self._key = key
        self._checksums = checksums
        self._end = start

    def check(self, chunk: Chunk) -> Iterator[tuple[Extent, memoryview]]:
        """The extents of a chunk, each with its bytes (none for a zero one), once all of the chunk is known good.

        :raises ProtocolError: extents that are empty, overlap, run backwards or over the end; wrong number of bytes or
            digests; a native chunk
        :raises ChecksumMismatch: bytes are not those that the digests are of
        """
        if isinstance(chunk, NativeChunk):
            raise self._refuse("a native chunk came in a block stream")
        data = memoryview(chunk.data).cast("B")
        pieces = self._check_extents(chunk, data)
        self._check_digests(pieces, chunk.digests)
        return iter(pieces)

    def _check_extents(self, chunk: BlockChunk, data: memoryview) -> list[tuple[Extent, memoryview]]:
        if not 1 <= len(chunk.extents) <= MAX_EXTENTS:
            raise self._refuse(f"a chunk has {len(chunk.extents)} extents; 1 to {MAX_EXTENTS} are allowed")
        if len(data) > CHUNK_SIZE:
            raise self._refuse(f"a chunk has {len(data)} bytes; at most {CHUNK_SIZE} are allowed")
        pieces, used = [], 0
        for extent in chunk.extents:
            if extent.length < 1 or extent.offset < self._end or extent.end > self._size:
                raise self._refuse(
                    f"an extent of {extent.length} bytes at {extent.offset} came where one between {self._end} "
                    f"and {self._size} was due"
                )
            self._end = extent.end
            length = 0 if extent.zero else extent.length
            if used + length > len(data):
                raise self._refuse("a chunk has fewer bytes than its extents")
            pieces.append((extent, data[used : used + length]))
            used += length
        if used != len(data):
            raise self._refuse("a chunk has more bytes than its extents")
        return pieces

    def _check_digests(self, pieces: list[tuple[Extent, memoryview]], digests: bytes) -> None:
        place = 0
        for extent, data in pieces:
            size = -(-len(data) // BLOCK_SIZE) * DIGEST_SIZE
            if place + size > len(digests):
                raise self._refuse("a chunk has fewer digests than blocks")
            if size and self._checksums.digest_blocks(data, self._key) != digests[place : place + size]:
                raise ChecksumMismatch(
                    f"bytes {extent.offset} to {extent.end} of {self._what} were damaged on their way",
                    hint="they are sent again; if it happens again, check the memory and the network of both nodes",
                )
            place += size
        if place != len(digests):
            raise self._refuse("a chunk has more digests than blocks")

    def _refuse(self, why: str) -> ProtocolError:
        return ProtocolError(f"the stream for {self._what} is not valid: {why}", hint=_HINT)


def changes(base: bytes, to: bytes) -> Iterator[Extent]:
    """What makes ``base``, cut or grown with zeros to the size of ``to``, into ``to``."""
    pieces = _pieces(0, len(to))
    return merged(_extent(to, a, b) for a, b in pieces if to[a:b] != base[a:b].ljust(b - a, b"\0"))


def after(start: int, extents: Iterator[Extent]) -> Iterator[Extent]:
    """The parts of ``extents`` from the byte offset ``start`` on."""
    for extent in extents:
        offset = max(extent.offset, start)
        if extent.end > offset:
            yield Extent(offset, extent.end - offset, extent.zero)


def within(ranges: Iterable[Range], to: bytes) -> Iterator[Extent]:
    """All of these ranges of ``to``, whatever was in them before; what is beyond its end is left out."""
    return merged(_extent(to, a, b) for r in ranges for a, b in _pieces(r.offset, min(r.end, len(to))))


def _pieces(start: int, end: int) -> Iterator[tuple[int, int]]:
    while start < end:
        following = min(end, (start // GRANULARITY + 1) * GRANULARITY)
        yield start, following
        start = following


def _extent(data: bytes, start: int, end: int) -> Extent:
    return Extent(start, end - start, zero=not any(data[start:end]))


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Neighbouring extents of one kind as one."""
    run: Extent | None = None
    for extent in extents:
        if run is not None and run.end == extent.offset and run.zero == extent.zero:
            run = Extent(run.offset, run.length + extent.length, run.zero)
            continue
        if run is not None:
            yield run
        run = extent
    if run is not None:
        yield run


def packed(extents: Iterable[Extent], limit: int) -> Iterator[tuple[Extent, ...]]:
    """Extents gathered into chunks of at most ``limit`` bytes of data and ``MAX_EXTENTS`` extents."""
    chunk: list[Extent] = []
    size = 0
    for change in extents:
        offset = change.offset
        while offset < change.end:
            length = change.end - offset if change.zero else min(change.end - offset, limit - size)
            chunk.append(Extent(offset, length, change.zero))
            offset += length
            size += 0 if change.zero else length
            if size == limit or len(chunk) == MAX_EXTENTS:
                yield tuple(chunk)
                chunk, size = [], 0
    if chunk:
        yield tuple(chunk)
