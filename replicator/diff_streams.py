"""A block stream as the pieces of a diff, and the other way round. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from backends.chunks import without_zeros
from replicator.checksums import Checksums
from replicator.diff_format import Piece
from replicator.errors import Unsupported
from replicator.streams import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    DIGEST_SIZE,
    MAX_EXTENTS,
    BlockChunk,
    Extent,
    Stream,
)

OBJECT_SIZE = 4 << 20
"""Bytes of a record of zeros at most: an object of RBD, as ``rbd import-diff`` makes one request of a record."""


def pieces_of(stream: Stream) -> Iterator[Piece]:
    """Each written extent of the stream as a record, and each zero one as some. :raises Unsupported: a native stream"""
    for chunk in stream:
        if not isinstance(chunk, BlockChunk):
            raise Unsupported("a native stream is no diff", hint="")
        try:
            yield from _pieces(chunk)
        finally:
            chunk.release()


def _pieces(chunk: BlockChunk) -> Iterator[Piece]:
    data = memoryview(chunk.data).cast("B")
    for extent in chunk.extents:
        if not extent.zero:
            # A copy: the chunk's buffer may be needed again before the piece is written.
            yield Piece(extent, bytes(data[: extent.length]))
            data = data[extent.length :]
            continue
        offset = extent.offset
        while offset < extent.end:
            following = min(extent.end, (offset // OBJECT_SIZE + 1) * OBJECT_SIZE)
            yield Piece(Extent(offset, following - offset, zero=True))
            offset = following


def chunks_of(pieces: Iterable[Piece], key: bytes, checksums: Checksums) -> Iterator[BlockChunk]:
    """Pieces as the chunks of a block stream; blocks of zeros become zero extents."""
    extents: list[Extent] = []
    data = bytearray()
    begin = 0
    for piece in pieces:
        if len(extents) == MAX_EXTENTS or len(data) + len(piece.data) > CHUNK_SIZE:
            yield _chunk(extents, data, key, checksums)
            extents, data = [], bytearray()
        if piece.record.zero:
            extents.append(piece.record)
            continue
        begin = max(begin, piece.record.offset)
        extents.append(Extent(begin, len(piece.data)))
        begin += len(piece.data)
        data += piece.data
    if extents:
        yield _chunk(extents, data, key, checksums)


def _chunk(extents: list[Extent], data: bytearray, key: bytes, checksums: Checksums) -> BlockChunk:
    view = memoryview(data)
    blocks = sum(-(-extent.length // BLOCK_SIZE) for extent in extents if not extent.zero)
    digests, zeros = bytearray(blocks * DIGEST_SIZE), bytearray(blocks)
    place = block = 0
    for extent in extents:
        if not extent.zero:
            part = view[place : place + extent.length]
            to = memoryview(digests)[block * DIGEST_SIZE :]
            block += checksums.digest_blocks_into(part, key, to, memoryview(zeros)[block:], block_size=BLOCK_SIZE)
            place += extent.length
    if not any(zeros):
        return BlockChunk(tuple(extents), view, bytes(digests))
    return without_zeros(extents, view, digests, zeros, lambda: None)
