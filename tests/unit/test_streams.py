"""Streams and the memory storage's way of cutting them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.blocks import GRANULARITY, after, changes, packed, within
from replicator.endpoint import Range
from replicator.model import StreamKind
from replicator.streams import (
    CHUNK_SIZE,
    MAX_EXTENTS,
    BegunStream,
    BlockChunk,
    Chunk,
    ChunkStream,
    Extent,
    NativeChunk,
    Stream,
)
from tests.support.blocks import apply, full_chunks, make_chunk, make_stream, pattern


def test_extents_and_chunks_know_their_lengths() -> None:
    assert Extent(5, 10).end == 15
    chunk = make_chunk((0, b"abc"), (100, 1000), (5000, b"d"))
    assert (chunk.length, chunk.end, bytes(chunk.data)) == (1004, 5001, b"abcd")
    assert BlockChunk((), b"", b"").end == 0
    assert NativeChunk(b"abc").length == 3
    chunk.release()
    NativeChunk(b"").release()


def test_a_stream_is_closed_once_whatever_happens() -> None:
    events: list[str] = []

    def chunks() -> Iterator[Chunk]:
        try:
            yield NativeChunk(b"1")
            yield NativeChunk(b"2")
        finally:
            events.append("generator ended")

    stream = ChunkStream(StreamKind.NATIVE, chunks(), estimate=2, on_close=lambda: events.append("closed"))
    assert isinstance(stream, Stream)
    with pytest.raises(KeyError), stream as opened:
        assert opened is stream
        next(iter(opened))
        raise KeyError
    stream.close()
    assert events == ["generator ended", "closed"]
    assert (stream.estimate, stream.wire_bytes) == (2, 0)


def test_what_is_to_be_closed_is_closed_even_if_the_stream_fails_to() -> None:
    events: list[str] = []

    def chunks() -> Iterator[Chunk]:
        try:
            yield NativeChunk(b"1")
        finally:
            raise OSError("close failed")

    stream = ChunkStream(StreamKind.NATIVE, chunks(), on_close=lambda: events.append("closed"))
    next(iter(stream))
    with pytest.raises(OSError, match="close failed"):
        stream.close()
    assert events == ["closed"]


def test_applying_full_chunks() -> None:
    data = pattern(3 * CHUNK_SIZE // 2)
    assert bytes(apply(make_stream(*full_chunks(data)), b"", len(data)).data) == data


pages = st.lists(st.sampled_from([b"\0", b"a", b"b"]), max_size=12).map(lambda p: b"".join(x * GRANULARITY for x in p))
images = st.builds(lambda whole, tail: whole + tail, pages, st.binary(max_size=20))


def applied(base: bytes, to: bytes, extents: list[Extent]) -> bytes:
    data = bytearray(base[: len(to)].ljust(len(to), b"\0"))
    end = 0
    for extent in extents:
        assert end <= extent.offset < extent.end <= len(to)
        end = extent.end
        data[extent.offset : extent.end] = bytes(extent.length) if extent.zero else to[extent.offset : extent.end]
    return bytes(data)


@given(images, images)
def test_changes_bring_one_image_to_the_other(base: bytes, to: bytes) -> None:
    found = list(changes(base, to))
    assert applied(base, to, found) == to
    assert not list(changes(to, to))


@given(images, images, st.integers(0, 13 * GRANULARITY))
def test_the_rest_of_the_changes_completes_a_half_received_image(base: bytes, to: bytes, offset: int) -> None:
    offset = min(offset, len(to))
    half = to[:offset] + base[offset : len(to)].ljust(len(to) - offset, b"\0")
    found = list(after(offset, changes(base, to)))
    assert all(extent.offset >= offset for extent in found)
    assert applied(half, to, found) == to


@given(images, st.lists(st.integers(1, 5 * GRANULARITY), max_size=8))
def test_ranges_are_covered_up_to_the_end(to: bytes, lengths: list[int]) -> None:
    ranges, offset = [], 0
    for length in lengths:
        ranges.append(Range(offset, length))
        offset += length + 100
    found = list(within(ranges, to))
    garbage = b"\xee" * len(to)
    expected = bytearray(garbage)
    for item in ranges:
        expected[item.offset : item.end] = to[item.offset : item.end]
    assert applied(garbage, to, found) == bytes(expected)
    assert sum(e.length for e in found) == sum(max(0, min(r.end, len(to)) - r.offset) for r in ranges)


@given(images, st.integers(1, 3 * GRANULARITY))
def test_chunks_keep_to_their_size(to: bytes, limit: int) -> None:
    extents = list(changes(b"", to))
    chunks = list(packed(extents, limit))
    assert applied(b"", to, [extent for chunk in chunks for extent in chunk]) == to
    for chunk in chunks:
        assert 1 <= len(chunk) <= MAX_EXTENTS
        assert sum(extent.length for extent in chunk if not extent.zero) <= limit


def test_chunks_keep_to_their_number_of_extents() -> None:
    extents = [Extent(n * 10, 5, zero=n % 2 == 0) for n in range(3 * MAX_EXTENTS + 1)]
    chunks = list(packed(extents, CHUNK_SIZE))
    assert [len(chunk) for chunk in chunks] == [MAX_EXTENTS] * 3 + [1]


# -- a stream whose beginning has come


class Counted(ChunkStream):
    """A stream of chunks that use their buffers again, and count what crossed the network."""

    def __init__(self, sizes: list[int], error: Exception | None = None) -> None:
        self.given, self.released, self.closed = 0, 0, 0
        self._sizes, self._error = sizes, error
        super().__init__(StreamKind.NATIVE, self._made(), estimate=7, on_close=self._close)

    def _made(self) -> Iterator[Chunk]:
        buffer = bytearray(CHUNK_SIZE)
        for number, size in enumerate(self._sizes):
            buffer[:size] = bytes([number]) * size
            self.given += 1
            self.wire_bytes += size
            yield NativeChunk(memoryview(buffer)[:size], self._release)
        if self._error is not None:
            raise self._error

    def _release(self) -> None:
        self.released += 1

    def _close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("sizes", [[], [1], [CHUNK_SIZE], [CHUNK_SIZE // 2] * 5, [100] * 3, [1, CHUNK_SIZE, 1, 2]])
def test_a_stream_that_has_begun_is_the_whole_stream(sizes: list[int]) -> None:
    inner = Counted(sizes)
    with BegunStream(inner) as stream:
        begun = inner.given
        assert inner.released == begun, "their buffers are needed for what comes"
        assert (sum(sizes[:begun]) >= CHUNK_SIZE) or begun == len(sizes)
        assert sum(sizes[: begun - 1]) < CHUNK_SIZE
        assert (stream.kind, stream.estimate, stream.wire_bytes) == (StreamKind.NATIVE, 7, sum(sizes[:begun]))
        for number, (chunk, size) in enumerate(zip(stream, sizes, strict=True)):
            assert bytes(chunk.data) == bytes([number]) * size
            assert stream.wire_bytes == inner.wire_bytes
            chunk.release()
    assert (inner.closed, inner.released) == (1, len(sizes))


def test_what_a_stream_raises_in_its_beginning_is_raised_at_once_and_later_when_it_comes() -> None:
    with pytest.raises(OSError, match="disk"):
        BegunStream(Counted([5, 5], OSError("disk")))
    inner = Counted([CHUNK_SIZE, 5], OSError("disk"))
    with BegunStream(inner) as stream, pytest.raises(OSError, match="disk"):
        list(stream)
    assert inner.closed == 1


def test_a_stream_that_has_begun_is_closed_with_the_other() -> None:
    inner = Counted([CHUNK_SIZE] * 3)
    stream = BegunStream(inner)
    stream.close()
    stream.close()
    assert (inner.given, inner.closed) == (1, 1)
