"""Makes block streams by hand, and applies streams while checking everything that their contract says."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime

from replicator.model import StreamKind, Version
from replicator.streams import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    DIGEST_SIZE,
    MAX_EXTENTS,
    BlockChunk,
    Chunk,
    ChunkStream,
    Extent,
    Stream,
)
from transport import checksum

KEY = "2a" * 32
OTHER_KEY = "17" * 32

Change = tuple[int, bytes | int]
"""Bytes at an offset, or so many zeros."""


def digests_of(data: bytes, key: str = KEY) -> bytes:
    """The digests of a piece of data, from its beginning."""
    return checksum.digest_blocks(data, bytes.fromhex(key))


def make_chunk(*changes: Change, key: str = KEY) -> BlockChunk:
    """A right chunk of these changes."""
    extents = []
    data, digests = b"", b""
    for offset, what in changes:
        if isinstance(what, int):
            extents.append(Extent(offset, what, zero=True))
            continue
        extents.append(Extent(offset, len(what)))
        data += what
        digests += digests_of(what, key)
    return BlockChunk(tuple(extents), data, digests)


def make_stream(
    *chunks: Chunk, then: Exception | None = None, meanwhile: Callable[[], None] | None = None
) -> ChunkStream:
    """A stream of these chunks, then ``then``; ``meanwhile`` is called before each chunk and before the end."""

    def generate() -> Iterator[Chunk]:
        for chunk in chunks:
            if meanwhile is not None:
                meanwhile()
            yield chunk
        if meanwhile is not None:
            meanwhile()
        if then is not None:
            raise then

    return ChunkStream(StreamKind.BLOCKS, generate())


def untouched_stream() -> ChunkStream:
    """A stream that nobody may read."""

    def generate() -> Iterator[Chunk]:
        raise AssertionError("the stream was read")
        yield  # type: ignore[unreachable]

    return ChunkStream(StreamKind.BLOCKS, generate())


def full_chunks(data: bytes, size: int = 128 * 1024) -> list[BlockChunk]:
    """All of ``data``, in chunks of that size."""
    return [make_chunk((offset, data[offset : offset + size])) for offset in range(0, len(data), size)]


def make_version(name: str, size: int, *, created: datetime | None = None) -> Version:
    """A version as a source would announce it."""
    return Version(name, uuid.uuid4().hex, created or datetime(2026, 11, 20, 8, 0, tzinfo=UTC), 77, size=size)


class Applied:
    """The result of applying a stream.

    :ivar data: the volume afterwards
    :ivar extents: all that it carried
    :ivar written: bytes of data that it carried
    """

    def __init__(self, base: bytes, size: int) -> None:
        self.data = bytearray(base[:size].ljust(size, b"\0"))
        self.extents: list[Extent] = []
        self.written = 0

    @property
    def first(self) -> int:
        """Where the stream begins."""
        return self.extents[0].offset if self.extents else len(self.data)


def apply(stream: Stream, base: bytes, size: int, key: str = KEY) -> Applied:
    """Apply a whole block stream to ``base``, cut or grown to ``size``, and check every rule of a stream."""
    assert stream.kind is StreamKind.BLOCKS
    done = Applied(base, size)
    end = 0
    with stream:
        for chunk in stream:
            assert isinstance(chunk, BlockChunk)
            assert 1 <= len(chunk.extents) <= MAX_EXTENTS
            data = bytes(chunk.data)
            assert len(data) <= CHUNK_SIZE
            assert len(data) == sum(e.length for e in chunk.extents if not e.zero)
            place, digests = 0, bytes(chunk.digests)
            for extent in chunk.extents:
                assert extent.length > 0
                assert extent.offset >= end
                assert extent.end <= size
                end = extent.end
                piece = bytes(extent.length) if extent.zero else data[place : place + extent.length]
                done.data[extent.offset : extent.end] = piece
                if not extent.zero:
                    place += extent.length
                    count = -(-extent.length // BLOCK_SIZE) * DIGEST_SIZE
                    assert digests[:count] == digests_of(piece, key)
                    digests = digests[count:]
            assert digests == b""
            done.extents += chunk.extents
            done.written += len(data)
            chunk.release()
            chunk.release()  # twice does no harm
    return done


def pattern(size: int, seed: int = 1) -> bytes:
    """Bytes of which no block is like another, nor zero."""
    words = (seed * 0x9E3779B1 + n * 0x85EBCA6B for n in range(-(-size // 8)))
    return b"".join((word & 0xFFFF_FFFF_FFFF_FFFF | 1).to_bytes(8, "little") for word in words)[:size]


def changed(data: bytes, changes: Iterable[Change]) -> bytes:
    """``data`` with the changes done."""
    result = bytearray(data)
    for offset, what in changes:
        piece = bytes(what) if isinstance(what, int) else what
        result[offset : offset + len(piece)] = piece
    return bytes(result)
