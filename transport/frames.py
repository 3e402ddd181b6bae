"""The frames of the wire: one fixed header each, and a decoder that does no I/O.

The layout and every cap are written down in ``transport/PROTOCOL.md``; this file is their only implementation. All
integers are little-endian. Nothing from a peer is believed before its range is checked, and no length can make the
decoder hold more than one payload of the cap of its type, compressed and plain.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from replicator.errors import ChecksumMismatch, ProtocolError
from replicator.streams import CHUNK_SIZE, DIGEST_SIZE, MAX_EXTENTS, Buffer
from transport.checksum import crc32c
from transport.compression import decompress

VERSION = 1
"""Version of the protocol, told in HELLO."""
MAGIC = 0x4652  # "RF"
HEADER = struct.Struct("<HBBIIIQI")
"""magic, type, flags, wire length, plain length, stream, sequence, CRC32C of the plain payload."""
HEADER_CRC = struct.Struct("<I")
HEADER_SIZE = HEADER.size + HEADER_CRC.size
"""32 bytes: the fields, then the CRC32C of their bytes."""

FLAG_MORE = 0x01
"""The message goes on in the next frame of this type and stream (REQUEST and RESPONSE only)."""
FLAG_COMPRESSED = 0x02
"""The payload is one zstd frame (DATA and BLOCKS only)."""

CONTROL_PIECE = 256 * 1024
"""A REQUEST or RESPONSE longer than this is split over several frames."""
SMALL = 16 * 1024
TABLE_CAP = 16 + MAX_EXTENTS * 16 + (MAX_EXTENTS + CHUNK_SIZE // (64 * 1024)) * DIGEST_SIZE
"""What stands before the data of a BLOCKS payload, at most: head, extents, digests."""
MAX_PAYLOAD = CHUNK_SIZE + TABLE_CAP


class FrameType(IntEnum):
    """What a frame is."""

    HELLO = 1
    REQUEST = 2
    RESPONSE = 3
    ERROR = 4
    DATA = 5
    BLOCKS = 6
    DIGESTS = 7
    END = 8
    COMMITTED = 9
    PING = 10
    PONG = 11
    GOODBYE = 12
    JOIN_OFFER = 13
    JOIN = 14
    JOINED = 15


CAPS: dict[FrameType, int] = {
    FrameType.HELLO: 4096,
    FrameType.REQUEST: CONTROL_PIECE,
    FrameType.RESPONSE: CONTROL_PIECE,
    FrameType.ERROR: SMALL,
    FrameType.DATA: CHUNK_SIZE,
    FrameType.BLOCKS: MAX_PAYLOAD,
    FrameType.DIGESTS: CHUNK_SIZE,
    FrameType.END: 48,
    FrameType.COMMITTED: SMALL,
    FrameType.PING: 8,
    FrameType.PONG: 24,
    FrameType.GOODBYE: 0,
    FrameType.JOIN_OFFER: SMALL,
    FrameType.JOIN: SMALL,
    FrameType.JOINED: 2 * SMALL,
}
"""Largest payload of each type, plain, in bytes."""

_FLAGS: dict[FrameType, int] = {
    FrameType.REQUEST: FLAG_MORE,
    FrameType.RESPONSE: FLAG_MORE,
    FrameType.DATA: FLAG_COMPRESSED,
    FrameType.BLOCKS: FLAG_COMPRESSED,
}
SUSPICIOUS = "a version of another protocol, or damage in the network or memory; see the peer's log"


@dataclass(slots=True)
class Frame:
    """One decoded frame.

    :ivar payload: plain bytes; ``release`` gives their buffer back, after which they must not be read
    :ivar wire_size: bytes it took on the wire, header included (TLS not)
    """

    type: FrameType
    flags: int
    stream: int
    sequence: int
    payload: Buffer
    wire_size: int
    release: Callable[[], None]


def _nothing() -> None:
    pass


def encode_header(
    kind: FrameType, *, length: int, plain: int, crc: int, stream: int = 0, sequence: int = 0, flags: int = 0
) -> bytes:
    """The 32 bytes before a payload of ``length`` bytes on the wire and ``plain`` bytes unpacked."""
    fields = HEADER.pack(MAGIC, kind, flags, length, plain, stream, sequence, crc)
    return fields + HEADER_CRC.pack(crc32c(fields))


def encode(kind: FrameType, payload: Buffer = b"", *, stream: int = 0, sequence: int = 0, flags: int = 0) -> bytes:
    """A whole frame with an uncompressed payload, as one bytes object; for small ones and for tests."""
    size = len(payload)
    header = encode_header(
        kind, length=size, plain=size, crc=crc32c(payload), stream=stream, sequence=sequence, flags=flags
    )
    return header + bytes(payload)


class BufferPool:
    """Keeps a few payload buffers for use again; thread-safe, since list operations are atomic."""

    def __init__(self, keep: int = 6) -> None:
        self._free: list[bytearray] = []
        self._keep = keep

    def take(self) -> bytearray:
        """A buffer of ``MAX_PAYLOAD`` bytes with any content."""
        try:
            return self._free.pop()
        except IndexError:
            return bytearray(MAX_PAYLOAD)

    def give(self, buffer: bytearray) -> None:
        """Take a buffer back."""
        if len(self._free) < self._keep:
            self._free.append(buffer)

    def clear(self) -> None:
        """Let go of the buffers that are not in use: an idle connection holds none."""
        self._free.clear()


class _Loan:
    """A buffer lent to a frame; giving it back twice is once."""

    __slots__ = ("_buffer", "_pool")

    def __init__(self, pool: BufferPool, buffer: bytearray) -> None:
        self._pool = pool
        self._buffer: bytearray | None = buffer

    def __call__(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._pool.give(buffer)


_POOLED_FROM = 64 * 1024


class FrameDecoder:
    """Turns bytes into frames: fill :meth:`wanted`, then say how much with :meth:`advance`.

    After an error the decoder refuses to go on, as a connection that saw an error is not used again.

    :param accept: frame types that may come; the check stands before any payload is taken
    """

    def __init__(self, accept: frozenset[FrameType] = frozenset(FrameType), pool: BufferPool | None = None) -> None:
        self.accept = accept
        self._pool = pool or BufferPool()
        self._header = bytearray(HEADER_SIZE)
        self._view = memoryview(self._header)
        self._filled = 0
        self._sequence = 0
        self._failed = False
        self._parsed: tuple[FrameType, int, int, int, int, int] | None = None
        self._release: Callable[[], None] = _nothing

    @property
    def between_frames(self) -> bool:
        """Whether no part of a frame has been taken yet."""
        return self._parsed is None and self._filled == 0

    def wanted(self) -> memoryview:
        """Where the next bytes belong; never empty."""
        return self._view[self._filled :]

    def advance(self, count: int) -> Frame | None:
        """``count`` bytes of :meth:`wanted` were filled; the frame that they complete, if any.

        :raises ProtocolError: a header or payload that the protocol does not allow
        :raises ChecksumMismatch: damage on the way
        """
        if self._failed:
            raise ProtocolError("the connection had an error before and is not read again", hint="")
        self._filled += count
        if self._filled < len(self._view):
            return None
        try:
            if self._parsed is None:
                self._start_payload()
                return self._finish() if not self._view else None
            return self._finish()
        except BaseException:
            self._failed = True
            self._view = memoryview(self._header)
            self._filled = 0
            raise

    def _start_payload(self) -> None:
        kind, flags, length, plain, stream, sequence, crc = parse_header(self._header)
        if kind not in self.accept:
            raise ProtocolError(f"a {kind.name} frame came where the protocol allows none", hint=SUSPICIOUS)
        if sequence != self._sequence:
            raise ProtocolError(f"frame {sequence} came where frame {self._sequence} was due", hint=SUSPICIOUS)
        self._parsed = (kind, flags, length, plain, stream, crc)
        self._filled = 0
        if length >= _POOLED_FROM:
            buffer = self._pool.take()
            self._view = memoryview(buffer)[:length]
            self._release = _Loan(self._pool, buffer)
        else:
            self._view = memoryview(bytearray(length))
            self._release = _nothing

    def _finish(self) -> Frame:
        assert self._parsed is not None  # noqa: S101 - for the type checker: set with the payload's view
        kind, flags, length, plain, stream, crc = self._parsed
        payload: Buffer = self._view
        release = self._release
        if flags & FLAG_COMPRESSED:
            payload = decompress(self._view, plain)
            release()
            release = _nothing
        if crc32c(payload) != crc:
            raise ChecksumMismatch(
                f"a {kind.name} frame was damaged on the way (CRC32C of {plain} bytes differs)",
                hint="the run is tried again; if it happens often, check memory and network cards of both nodes",
            )
        frame = Frame(kind, flags, stream, self._sequence, payload, HEADER_SIZE + length, release)
        self._sequence += 1
        self._parsed = None
        self._view = memoryview(self._header)
        self._filled = 0
        self._release = _nothing
        return frame


def parse_header(header: Buffer) -> tuple[FrameType, int, int, int, int, int, int]:
    """Type, flags, wire length, plain length, stream, sequence, CRC of the payload.

    :raises ProtocolError: anything out of its range
    :raises ChecksumMismatch: the header's own CRC differs
    """
    fields = bytes(header[: HEADER.size])
    magic, raw_kind, flags, length, plain, stream, sequence, crc = HEADER.unpack(fields)
    if magic != MAGIC:
        raise ProtocolError("the peer sent something that is no frame", hint=SUSPICIOUS)
    if crc32c(fields) != HEADER_CRC.unpack(header[HEADER.size :])[0]:
        raise ChecksumMismatch("the header of a frame was damaged on the way", hint="the run is tried again")
    try:
        kind = FrameType(raw_kind)
    except ValueError:
        raise ProtocolError(f"a frame of the unknown type {raw_kind} came", hint=SUSPICIOUS) from None
    if flags & ~_FLAGS.get(kind, 0):
        raise ProtocolError(f"a {kind.name} frame has the flags {flags:#04x}", hint=SUSPICIOUS)
    cap = CAPS[kind]
    compressed = bool(flags & FLAG_COMPRESSED)
    if plain > cap or length > cap or (length != plain and not compressed) or (compressed and length >= plain):
        raise ProtocolError(
            f"a {kind.name} frame of {length} bytes ({plain} plain) came; at most {cap} are allowed", hint=SUSPICIOUS
        )
    return kind, flags, length, plain, stream, sequence, crc
