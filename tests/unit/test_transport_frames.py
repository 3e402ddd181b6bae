"""The frame decoder: what was encoded comes out again, and nothing else does it any harm."""

from __future__ import annotations

import struct
import tracemalloc

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import ChecksumMismatch, ProtocolError
from transport.checksum import crc32c
from transport.frames import (
    CAPS,
    FLAG_COMPRESSED,
    FLAG_MORE,
    HEADER_SIZE,
    MAX_PAYLOAD,
    BufferPool,
    Frame,
    FrameDecoder,
    FrameType,
    encode,
    encode_header,
)

SMALL = [kind for kind in FrameType if kind is not FrameType.GOODBYE]
payloads = st.binary(max_size=300)


def feed(decoder: FrameDecoder, data: bytes, sizes: list[int] | None = None) -> list[Frame]:
    """Give bytes in pieces of the given sizes (again and again), as a socket does."""
    frames, position, turn = [], 0, 0
    while position < len(data):
        view = decoder.wanted()
        assert len(view) > 0
        size = min(len(view), len(data) - position)
        if sizes:
            size = min(size, sizes[turn % len(sizes)])
            turn += 1
        view[:size] = data[position : position + size]
        position += size
        frame = decoder.advance(size)
        if frame is not None:
            frames.append(frame)
    return frames


def packed(kind: FrameType, payload: bytes, *, plain: int | None = None, sequence: int = 0) -> bytes:
    squeezed = zstandard.ZstdCompressor(level=1).compress(payload)
    header = encode_header(
        kind,
        length=len(squeezed),
        plain=len(payload) if plain is None else plain,
        crc=crc32c(payload),
        sequence=sequence,
        flags=FLAG_COMPRESSED,
    )
    return header + squeezed


@given(
    st.lists(st.tuples(st.sampled_from([FrameType.DATA, FrameType.REQUEST, FrameType.ERROR]), payloads), max_size=8),
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
)
def test_frames_come_out_as_they_went_in(frames: list[tuple[FrameType, bytes]], sizes: list[int]) -> None:
    wire = b"".join(encode(kind, body, stream=i, sequence=i) for i, (kind, body) in enumerate(frames))
    found = feed(FrameDecoder(), wire, sizes)
    assert [(f.type, bytes(f.payload), f.stream, f.sequence) for f in found] == [
        (kind, body, i, i) for i, (kind, body) in enumerate(frames)
    ]
    assert sum(f.wire_size for f in found) == len(wire)


@given(st.binary(max_size=2000))
def test_arbitrary_bytes_only_raise_typed_errors(data: bytes) -> None:
    decoder = FrameDecoder()
    try:
        feed(decoder, data)
    except (ProtocolError, ChecksumMismatch):
        with pytest.raises(ProtocolError):
            feed(decoder, encode(FrameType.PING, b"12345678"))


@given(
    st.lists(payloads, min_size=1, max_size=4),
    st.data(),
)
def test_one_flipped_bit_never_passes(bodies: list[bytes], data: st.DataObject) -> None:
    wire = bytearray(b"".join(encode(FrameType.DATA, body, sequence=i) for i, body in enumerate(bodies)))
    bit = data.draw(st.integers(0, 8 * len(wire) - 1))
    wire[bit // 8] ^= 1 << bit % 8
    found: list[Frame] = []
    decoder = FrameDecoder()
    with pytest.raises((ProtocolError, ChecksumMismatch)):
        for position in range(len(wire)):
            found += feed(decoder, bytes(wire[position : position + 1]))
    assert [bytes(f.payload) for f in found] == bodies[: len(found)]


@given(st.sampled_from(list(FrameType)), st.integers(0, 255), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_any_header_is_refused_or_within_its_cap(kind: FrameType, flags: int, length: int, plain: int) -> None:
    decoder = FrameDecoder()
    header = encode_header(kind, length=length, plain=plain, crc=0, flags=flags)
    tracemalloc.start()
    try:
        feed(decoder, header)
    except (ProtocolError, ChecksumMismatch):
        pass
    else:
        assert length <= CAPS[kind]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MAX_PAYLOAD + 512 * 1024


@pytest.mark.parametrize("kind", list(FrameType))
def test_caps_hold_exactly(kind: FrameType) -> None:
    cap = CAPS[kind]
    assert feed(FrameDecoder(), encode(kind, bytes(cap)))[0].payload == bytes(cap)
    with pytest.raises(ProtocolError, match="at most"):
        feed(FrameDecoder(), encode(kind, bytes(cap + 1)))


def test_what_is_not_accepted_is_refused_before_its_payload() -> None:
    decoder = FrameDecoder(frozenset({FrameType.HELLO}))
    with pytest.raises(ProtocolError, match="DATA frame came where"):
        feed(decoder, encode(FrameType.DATA, b"x" * 100)[:HEADER_SIZE])


@pytest.mark.parametrize("sequence", [1, 2**64 - 1])
def test_sequence_must_be_the_next(sequence: int) -> None:
    with pytest.raises(ProtocolError, match="was due"):
        feed(FrameDecoder(), encode(FrameType.PING, b"12345678", sequence=sequence))


def test_a_repeated_frame_is_refused() -> None:
    decoder = FrameDecoder()
    wire = encode(FrameType.PING, b"12345678")
    feed(decoder, wire)
    with pytest.raises(ProtocolError, match="frame 0 came where frame 1"):
        feed(decoder, wire)


@pytest.mark.parametrize(("kind", "flags"), [(FrameType.PING, FLAG_MORE), (FrameType.REQUEST, FLAG_COMPRESSED)])
def test_flags_belong_to_types(kind: FrameType, flags: int) -> None:
    with pytest.raises(ProtocolError, match="flags"):
        feed(FrameDecoder(), encode(kind, b"12345678", flags=flags))


def test_compressed_payloads_are_unpacked() -> None:
    body = b"abc" * 10000
    (frame,) = feed(FrameDecoder(), packed(FrameType.DATA, body))
    assert frame.payload == body
    assert frame.wire_size < 1000


def test_a_bomb_is_refused_without_being_unpacked() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(512 * 1024 * 1024))
    header = encode_header(FrameType.DATA, length=len(bomb), plain=1024 * 1024, crc=0, flags=FLAG_COMPRESSED)
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="declares"):
        feed(FrameDecoder(), header + bomb)
    assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    tracemalloc.stop()


@pytest.mark.parametrize("told", [29999, 30001])
def test_compressed_size_must_be_the_told_one(told: int) -> None:
    with pytest.raises(ProtocolError):
        feed(FrameDecoder(), packed(FrameType.DATA, b"abc" * 10000, plain=told))


@given(st.binary(min_size=1, max_size=400))
def test_arbitrary_compressed_payloads_only_raise_typed_errors(body: bytes) -> None:
    header = encode_header(FrameType.DATA, length=len(body), plain=4096, crc=0, flags=FLAG_COMPRESSED)
    with pytest.raises((ProtocolError, ChecksumMismatch)):
        feed(FrameDecoder(), header + body)


def test_buffers_are_used_again_only_after_release() -> None:
    pool = BufferPool()
    decoder = FrameDecoder(pool=pool)
    one = feed(decoder, encode(FrameType.DATA, b"1" * 100_000))[0]
    two = feed(decoder, encode(FrameType.DATA, b"2" * 100_000, sequence=1))[0]
    assert bytes(one.payload) == b"1" * 100_000
    one.release()
    one.release()  # a second time gives nothing back
    three = feed(decoder, encode(FrameType.DATA, b"3" * 100_000, sequence=2))[0]
    four = feed(decoder, encode(FrameType.DATA, b"4" * 100_000, sequence=3))[0]
    assert [bytes(f.payload[:1]) for f in (two, three, four)] == [b"2", b"3", b"4"]


def test_header_layout_is_the_documented_one() -> None:
    wire = encode(FrameType.DATA, b"payload", stream=7, sequence=0x0102030405060708)
    assert wire[:2] == b"RF"
    assert wire[2] == 5
    assert wire[3] == 0
    assert struct.unpack_from("<IIIQI", wire, 4) == (7, 7, 7, 0x0102030405060708, crc32c(b"payload"))
    assert struct.unpack_from("<I", wire, 28)[0] == crc32c(wire[:28])
    assert wire[32:] == b"payload"
