"""Payloads of streams: what goes in comes out, and what is out of range is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.endpoint import DigestBatch
from replicator.errors import ProtocolError
from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, DIGEST_SIZE, MAX_EXTENTS, MAX_VOLUME_SIZE, BlockChunk, Extent
from transport.frames import CAPS, FrameType
from transport.wirestream import MAX_DIGESTS, decode_blocks, decode_digests, encode_blocks, encode_digests


@st.composite
def chunks(draw: st.DrawFn) -> BlockChunk:
    offset, extents, written, digests = draw(st.integers(0, 2**40)), [], 0, 0
    for gap, length, zero in draw(
        st.lists(st.tuples(st.integers(0, 2**30), st.integers(1, 100_000), st.booleans()), min_size=1, max_size=9)
    ):
        extents.append(Extent(offset + gap, length, zero))
        offset += gap + length
        if not zero:
            written += length
            digests += -(-length // BLOCK_SIZE)
    filler = bytes(range(251))
    data = (filler * (written // 251 + 1))[:written]
    return BlockChunk(tuple(extents), data, bytes(digests * DIGEST_SIZE))


def payload(chunk: BlockChunk) -> bytes:
    table, data = encode_blocks(chunk)
    return table + bytes(data)


def nothing() -> None:
    pass


@given(chunks())
def test_chunks_come_out_as_they_went_in(chunk: BlockChunk) -> None:
    found, table = decode_blocks(payload(chunk), nothing, 0)
    assert (found.extents, bytes(found.data), found.digests) == (chunk.extents, chunk.data, chunk.digests)
    assert bytes(table) == encode_blocks(chunk)[0]
    with pytest.raises(ProtocolError):
        decode_blocks(payload(chunk), nothing, chunk.extents[0].offset + 1)


@given(chunks(), st.data())
def test_changed_chunks_are_refused_or_within_bounds(chunk: BlockChunk, data: st.DataObject) -> None:
    body = bytearray(payload(chunk))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(body)))
    for piece in (bytes(body), bytes(body[:cut])):
        try:
            found, _ = decode_blocks(piece, nothing, 0)
        except ProtocolError:
            continue
        end = 0
        for extent in found.extents:
            assert end <= extent.offset < extent.end <= MAX_VOLUME_SIZE
            end = extent.end
        assert sum(e.length for e in found.extents if not e.zero) == len(found.data) <= CHUNK_SIZE


@given(st.binary(max_size=600))
def test_arbitrary_bytes_are_no_chunk(body: bytes) -> None:
    try:
        found, _ = decode_blocks(body, nothing, 0)
    except ProtocolError:
        return
    assert found.extents


@pytest.mark.parametrize(
    "extents",
    [
        (Extent(0, 0),),
        (Extent(5, 5), Extent(9, 5)),
        (Extent(10, 5), Extent(0, 5)),
        (Extent(MAX_VOLUME_SIZE, 1, True),),
        (Extent(MAX_VOLUME_SIZE - 1, 2, True),),
        (),
    ],
    ids=["empty", "overlap", "order", "beyond", "across", "none"],
)
def test_extents_out_of_range(extents: tuple[Extent, ...]) -> None:
    written = sum(e.length for e in extents if not e.zero)
    pieces = sum(-(-e.length // BLOCK_SIZE) for e in extents if not e.zero)
    with pytest.raises(ProtocolError):
        decode_blocks(payload(BlockChunk(extents, bytes(written), bytes(16 * pieces))), nothing, 0)


def test_the_limits_themselves_are_allowed() -> None:
    zeros = tuple(Extent(i * 2, 1, True) for i in range(MAX_EXTENTS))
    decode_blocks(payload(BlockChunk(zeros, b"", b"")), nothing, 0)
    with pytest.raises(ProtocolError):
        decode_blocks(payload(BlockChunk((*zeros, Extent(9000, 1, True)), b"", b"")), nothing, 0)
    last = (Extent(MAX_VOLUME_SIZE - CHUNK_SIZE, CHUNK_SIZE),)
    decode_blocks(payload(BlockChunk(last, bytes(CHUNK_SIZE), bytes(16 * 16))), nothing, 0)


def test_the_largest_chunk_there_can_be_fits_its_frame() -> None:
    step = CHUNK_SIZE // MAX_EXTENTS
    extents = tuple(Extent(i * step * 2, step) for i in range(MAX_EXTENTS))
    body = payload(BlockChunk(extents, bytes(CHUNK_SIZE), bytes(16 * MAX_EXTENTS)))
    assert len(body) <= CAPS[FrameType.BLOCKS]


@given(st.integers(0, 200), st.integers(0, 1000))
def test_digests_come_out_as_they_went_in(count: int, first: int) -> None:
    batch = DigestBatch(first * 4096, 4096, bytes(i % 251 for i in range(count * 16)))
    found = b""
    offset = batch.offset
    for body in encode_digests(batch):
        part = decode_digests(body, 4096, offset)
        found += part.digests
        offset += len(part) * 4096
    assert found == batch.digests


def test_large_batches_are_split() -> None:
    bodies = list(encode_digests(DigestBatch(0, 512, bytes(16 * (MAX_DIGESTS + 1)))))
    assert len(bodies) == 2
    assert max(map(len, bodies)) <= CAPS[FrameType.DIGESTS]
    assert decode_digests(bodies[1], 512, MAX_DIGESTS * 512).digests == bytes(16)


@given(st.binary(max_size=100), st.integers(0, 2**56))
def test_arbitrary_bytes_are_no_digests(body: bytes, offset: int) -> None:
    with pytest.raises(ProtocolError):
        decode_digests(body, 65536, offset)
