"""Chunks out of extents: within the caps, complete, in order, with right digests, zeros found."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from backends.chunks import batches
from backends.image.reading import Image, snapshot_shrunk
from backends.image.sending import BufferPool, ChunkReader
from replicator.model import StreamKind
from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, MAX_EXTENTS, ChunkStream, Extent
from tests.support.blocks import KEY, apply, pattern
from transport import checksum

UNIT = 512


@st.composite
def extent_lists(draw: st.DrawFn) -> list[Extent]:
    """Ascending, disjoint extents of up to some MiB."""
    position, found = 0, []
    for _ in range(draw(st.integers(0, 12))):
        position += draw(st.integers(0, 40)) * UNIT
        length = draw(st.one_of(st.integers(1, 20), st.integers(1, 6000))) * UNIT
        found.append(Extent(position, length, draw(st.booleans())))
        position += length
    return found


@given(extent_lists())
def test_batches_keep_to_the_caps_and_lose_nothing(extents: list[Extent]) -> None:
    covered: list[tuple[int, int, bool]] = []
    for batch in batches(extents):
        assert 1 <= len(batch) <= MAX_EXTENTS
        assert sum(extent.length for extent in batch if not extent.zero) <= CHUNK_SIZE
        for extent in batch:
            assert extent.length > 0
            if covered and covered[-1][1] == extent.offset and covered[-1][2] == extent.zero:
                covered[-1] = (covered[-1][0], extent.end, extent.zero)
            else:
                covered.append((extent.offset, extent.end, extent.zero))
    joined: list[tuple[int, int, bool]] = []
    for extent in extents:
        if joined and joined[-1][1] == extent.offset and joined[-1][2] == extent.zero:
            joined[-1] = (joined[-1][0], extent.end, extent.zero)
        else:
            joined.append((extent.offset, extent.end, extent.zero))
    assert covered == joined


def test_many_small_extents_are_packed_together() -> None:
    small = [Extent(number * 8192, 4096) for number in range(2000)]
    assert [len(batch) for batch in batches(small)] == [256] * 7 + [208]
    zeros = [Extent(number * 8192, 4096, zero=True) for number in range(MAX_EXTENTS + 1)]
    assert [len(batch) for batch in batches(zeros)] == [MAX_EXTENTS, 1]


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=6),
    st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 600)), max_size=8),
)
def test_a_stream_of_some_extents_carries_just_them(
    zeroed: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    data = bytearray(pattern(40 * BLOCK_SIZE + 1234))
    for block, count in zeroed:
        start = block * BLOCK_SIZE
        data[start : start + count * BLOCK_SIZE] = bytes(len(data[start : start + count * BLOCK_SIZE]))
    extents, position = [], 0
    for skip, length in wanted:
        start = position + skip * UNIT
        end = min(start + length * UNIT, len(data))
        if start < end:
            extents.append(Extent(start, end - start))
            position = end
    fd = os.memfd_create("image")
    try:
        os.write(fd, data)
        image = Image(fd, len(data), "image", snapshot_shrunk)
        reader = ChunkReader(image, checksum, bytes.fromhex(KEY))
        base = bytes([0xAA]) * len(data)
        applied = apply(ChunkStream(StreamKind.BLOCKS, iter(reader.chunks(extents))), base, len(data))
    finally:
        os.close(fd)
    right = bytearray(base)
    for extent in extents:
        right[extent.offset : extent.end] = data[extent.offset : extent.end]
    assert applied.data == right
    assert applied.written <= sum(extent.length for extent in extents)
    for extent in applied.extents:
        if not extent.zero and extent.length >= BLOCK_SIZE:
            assert any(data[extent.offset : extent.end])


def test_blocks_of_zeros_are_not_sent() -> None:
    fd = os.memfd_create("image")
    try:
        os.write(fd, pattern(BLOCK_SIZE) + bytes(3 * BLOCK_SIZE) + pattern(BLOCK_SIZE, 2))
        image = Image(fd, 5 * BLOCK_SIZE, "image", snapshot_shrunk)
        (chunk,) = ChunkReader(image, checksum, bytes.fromhex(KEY)).chunks([Extent(0, 5 * BLOCK_SIZE)])
    finally:
        os.close(fd)
    assert chunk.extents == (
        Extent(0, BLOCK_SIZE),
        Extent(BLOCK_SIZE, 3 * BLOCK_SIZE, zero=True),
        Extent(4 * BLOCK_SIZE, BLOCK_SIZE),
    )
    assert bytes(chunk.data) == pattern(BLOCK_SIZE) + pattern(BLOCK_SIZE, 2)


def test_a_buffer_given_back_twice_is_lent_once() -> None:
    pool = BufferPool()
    first, give_back = pool.take()
    give_back()
    give_back()
    second, _ = pool.take()
    third, _ = pool.take()
    assert second is first
    assert third is not first
