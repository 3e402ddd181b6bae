"""A diff as a block stream, and a block stream as a diff."""

from __future__ import annotations

import io

import pytest

from replicator.diff_format import DiffHeader, DiffReader, Piece, encode
from replicator.diff_streams import OBJECT_SIZE, chunks_of, pieces_of
from replicator.errors import Unsupported
from replicator.model import StreamKind
from replicator.streams import CHUNK_SIZE, MAX_EXTENTS, ChunkStream, Extent, NativeChunk
from tests.support.blocks import KEY, Change, apply, changed, make_chunk, make_stream, pattern
from transport import checksum

SIZE = 8 << 20
BASE = pattern(SIZE, 3)
LONG = changed(pattern(3 * CHUNK_SIZE + 4097), [(70_000, 200_000), (2 * CHUNK_SIZE, 65536)])


def stream_of(pieces: list[Piece]) -> ChunkStream:
    return ChunkStream(StreamKind.BLOCKS, chunks_of(pieces, bytes.fromhex(KEY), checksum))


def pieces_at(offset: int, data: bytes) -> list[Piece]:
    record = Extent(offset, len(data))
    return [Piece(record, data[at : at + CHUNK_SIZE]) for at in range(0, len(data), CHUNK_SIZE)]


def test_records_of_any_length_are_chunks() -> None:
    pieces = [
        *pieces_at(9, b"nine"),
        Piece(Extent(4096, 8192, zero=True)),
        *pieces_at(20_000, LONG),
        *pieces_at(20_000 + len(LONG), bytes(65536) + b"x"),
        Piece(Extent(SIZE - 1, 1, zero=True)),
    ]
    changes: list[Change] = [
        (9, b"nine"),
        (4096, 8192),
        (20_000, LONG),
        (20_000 + len(LONG), bytes(65536) + b"x"),
        (SIZE - 1, 1),
    ]
    done = apply(stream_of(pieces), BASE, SIZE)
    assert done.data == changed(BASE, changes)
    assert done.written < len(LONG) - 200_000 + 2 * 65536, "blocks of zeros are not written"


def test_many_small_records_are_few_chunks() -> None:
    pieces = [Piece(Extent(at, 1), b"x") for at in range(0, 2 * MAX_EXTENTS + 4, 2)]
    assert [len(chunk.extents) for chunk in chunks_of(pieces, bytes.fromhex(KEY), checksum)] == [
        MAX_EXTENTS,
        2,
    ]


def test_a_stream_becomes_a_diff_and_a_stream_again() -> None:
    changes: list[Change] = [(9, b"nine"), (4096, OBJECT_SIZE + 5), (OBJECT_SIZE + 8192, LONG[:CHUNK_SIZE])]
    chunks = [make_chunk(*changes[:2]), make_chunk(changes[2])]
    diff = b"".join(bytes(part) for part in encode(DiffHeader("one", "two", SIZE), pieces_of(make_stream(*chunks))))
    pieces = list(DiffReader(io.BytesIO(diff).read))
    zeros = [piece.record for piece in pieces if piece.record.zero]
    assert zeros == [Extent(4096, OBJECT_SIZE - 4096, zero=True), Extent(OBJECT_SIZE, 4101, zero=True)]
    assert apply(stream_of(pieces), BASE, SIZE).data == changed(BASE, changes)


def test_a_native_stream_is_no_diff() -> None:
    with pytest.raises(Unsupported):
        list(pieces_of(ChunkStream(StreamKind.NATIVE, iter([NativeChunk(b"x")]))))
