"""Streams of changes as frames, and back.

A stream is DATA (native) or BLOCKS frames and one END. Both ends run a keyed chain over what is in them, begun with the
request that opened the stream, so frames of another volume, base or direction can never pass for this stream's
(what borg's CVE-2023-36811 taught). The digests in BLOCKS frames go through to the storage, which verifies every block
against them; the chain covers the digests, and so the data. Of a DATA frame the chain covers length and CRC32C: TLS
keeps out whoever would forge bytes, so what is left to find is accidental damage, loss and disorder, and the streams
that storages make have checksums of their own. (Hashing the content as well took a sixth of all processor time.)
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from replicator.endpoint import DigestBatch
from replicator.errors import ChecksumMismatch, ProtocolError
from replicator.model import StreamKind
from replicator.streams import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    DIGEST_SIZE,
    MAX_EXTENTS,
    MAX_VOLUME_SIZE,
    BlockChunk,
    Buffer,
    Chunk,
    Extent,
    NativeChunk,
    Stream,
)
from transport.checksum import crc32c, keyed_digest
from transport.compression import AdaptiveCompressor
from transport.connection import Connection
from transport.frames import SUSPICIOUS, Frame, FrameType

_HEAD = struct.Struct("<IIII")
"""Extents, bytes of digests, bytes of data, 0."""
_END = struct.Struct("<QQ32s")
_CHECK = struct.Struct("<QI")
"""Length and CRC32C of a DATA frame's plain bytes."""
_DIGESTS = struct.Struct("<QII")
"""Offset of the first block, block size, number of digests."""
_ZERO_FLAG = 1 << 63
MAX_DIGESTS = (CHUNK_SIZE - _DIGESTS.size) // DIGEST_SIZE
"""Digests in one frame, at most."""


@dataclass(frozen=True, slots=True)
class StreamBinding:
    """What a stream's chain begins with.

    :ivar key: 32 bytes, made by the node that drives
    :ivar direction: ``push`` (the client sends) or ``pull`` (the server sends)
    :ivar request: the JSON of the request, byte for byte as it was sent
    """

    key: bytes
    direction: str
    kind: str
    request: bytes

    def start(self) -> bytes:
        """The chain before the first frame."""
        head = f"replicator/1 {self.direction} {self.kind} ".encode()
        return keyed_digest(self.key, head + self.request)


class _Chain:
    """Counts and digests a stream; the same on both sides."""

    def __init__(self, binding: StreamBinding) -> None:
        self._key = binding.key
        self._digest = binding.start()
        self.bytes = 0
        self.frames = 0

    def add(self, kind: FrameType, size: int, covered: Buffer) -> None:
        """A frame of ``size`` plain bytes; ``covered`` is what stands for its content."""
        self._digest = keyed_digest(self._key, self._digest, bytes((kind,)), keyed_digest(self._key, covered))
        self.bytes += size
        self.frames += 1

    def end(self) -> bytes:
        """The END payload."""
        return _END.pack(self.bytes, self.frames, self._digest)


def _check_of(data: Buffer) -> bytes:
    """What stands for the content of a DATA frame in the chain."""
    return _CHECK.pack(len(data), crc32c(data))


# -- BLOCKS payloads


def encode_blocks(chunk: BlockChunk) -> tuple[bytes, Buffer]:
    """Table (head, extents, digests) and data of a chunk."""
    fields: list[int] = []
    for extent in chunk.extents:
        fields.append(extent.offset)
        fields.append(extent.length | _ZERO_FLAG if extent.zero else extent.length)
    head = _HEAD.pack(len(chunk.extents), len(chunk.digests), len(chunk.data), 0)
    return b"".join((head, struct.pack(f"<{len(fields)}Q", *fields), chunk.digests)), chunk.data


def decode_blocks(payload: Buffer, release: Callable[[], None], start: int) -> tuple[BlockChunk, Buffer]:
    """A chunk over a BLOCKS payload, without a copy of its data, and the table.

    :param start: no extent may begin before it (the end of the one before)
    :raises ProtocolError: anything out of range or order
    """
    view = memoryview(payload)
    if len(view) < _HEAD.size:
        raise _bad("is too short")
    count, digest_bytes, data_bytes, zero = _HEAD.unpack_from(view)
    table = _HEAD.size + 16 * count
    if not 1 <= count <= MAX_EXTENTS or data_bytes > CHUNK_SIZE or zero:
        raise _bad(f"has {count} extents and {data_bytes} bytes of data")
    if len(view) != table + digest_bytes + data_bytes:
        raise _bad("has another length than its parts")
    fields = struct.unpack_from(f"<{2 * count}Q", view, _HEAD.size)
    extents = []
    written = pieces = 0
    for index in range(0, 2 * count, 2):
        offset, length = fields[index], fields[index + 1]
        is_zero = length >= _ZERO_FLAG
        length &= _ZERO_FLAG - 1
        if offset < start or not 1 <= length <= MAX_VOLUME_SIZE or offset + length > MAX_VOLUME_SIZE:
            raise _bad(f"has an extent at {offset} of {length} bytes, out of order or range")
        start = offset + length
        if not is_zero:
            written += length
            pieces += -(-length // BLOCK_SIZE)
        extents.append(Extent(offset, length, is_zero))
    if written != data_bytes or pieces * DIGEST_SIZE != digest_bytes:
        raise _bad(f"has {data_bytes} bytes and {digest_bytes} of digests for {written} bytes of extents")
    cut = table + digest_bytes
    return BlockChunk(tuple(extents), view[cut:], bytes(view[table:cut]), release), view[:cut]


def _bad(what: str) -> ProtocolError:
    return ProtocolError(f"a BLOCKS frame {what}", hint=SUSPICIOUS)


# -- DIGESTS payloads


def encode_digests(batch: DigestBatch) -> Iterator[bytes]:
    """DIGESTS payloads of a batch, split where it is too large for one frame."""
    step = MAX_DIGESTS * DIGEST_SIZE
    for position in range(0, len(batch.digests), step):
        part = batch.digests[position : position + step]
        offset = batch.offset + position // DIGEST_SIZE * batch.block_size
        yield _DIGESTS.pack(offset, batch.block_size, len(part) // DIGEST_SIZE) + part


def decode_digests(payload: Buffer, block_size: int, offset: int) -> DigestBatch:
    """:raises ProtocolError: another block size, a gap, or another length than told"""
    view = memoryview(payload)
    if len(view) < _DIGESTS.size:
        raise ProtocolError("a DIGESTS frame is too short", hint=SUSPICIOUS)
    start, size, count = _DIGESTS.unpack_from(view)
    if size != block_size or start != offset or not 1 <= count <= MAX_DIGESTS:
        raise ProtocolError(f"{count} digests of {size}-byte blocks at {start} came for {offset}", hint=SUSPICIOUS)
    if len(view) != _DIGESTS.size + count * DIGEST_SIZE:
        raise ProtocolError("a DIGESTS frame has another length than it tells", hint=SUSPICIOUS)
    return DigestBatch(start, size, bytes(view[_DIGESTS.size :]))


# -- whole streams


class StreamSender:
    """Sends one stream over a connection."""

    def __init__(
        self, connection: Connection, stream_id: int, binding: StreamBinding, compressor: AdaptiveCompressor | None
    ) -> None:
        self._connection = connection
        self._stream = stream_id
        self._chain = _Chain(binding)
        self._compressor = compressor if "zstd" in connection.features else None

    def send_all(self, stream: Stream) -> None:
        """Every chunk, then END. ``stream.wire_bytes`` counts.

        :raises ReplicatorError: of the stream, of the connection, or the one that the peer sent meanwhile
        """
        for chunk in stream:
            self._connection.check()
            if isinstance(chunk, BlockChunk):
                table, data = encode_blocks(chunk)
                self._chain.add(FrameType.BLOCKS, len(table) + len(data), table)
                stream.wire_bytes += self._send(FrameType.BLOCKS, (table, data))
            else:
                self._chain.add(FrameType.DATA, len(chunk.data), _check_of(chunk.data))
                stream.wire_bytes += self._send(FrameType.DATA, (chunk.data,))
            chunk.release()
        self.end()

    def send_digests(self, batches: Iterator[DigestBatch]) -> None:
        """Every batch, then END."""
        for batch in batches:
            self._connection.check()
            for payload in encode_digests(batch):
                self._chain.add(FrameType.DIGESTS, len(payload), payload)
                self._connection.send(FrameType.DIGESTS, (payload,), stream=self._stream)
        self.end()

    def end(self) -> None:
        """Say that this was all."""
        self._connection.send(FrameType.END, (self._chain.end(),), stream=self._stream)

    def _send(self, kind: FrameType, parts: Sequence[Buffer]) -> int:
        compressor = self._compressor
        size = sum(len(part) for part in parts)
        packed = None
        if compressor is not None and compressor.wants(size):
            payload = parts[0] if len(parts) == 1 else b"".join(parts)
            packed = compressor.pack(payload)
        begun = time.perf_counter()
        if packed is not None:
            crc = 0
            for part in parts:
                crc = crc32c(part, crc)
            sent = self._connection.send_packed(kind, packed, (size, crc), stream=self._stream)
        else:
            sent = self._connection.send(kind, parts, stream=self._stream)
        if compressor is not None:
            compressor.sent(sent, time.perf_counter() - begun)
        return sent


class StreamReceiver:
    """Receives one stream from a connection.

    :ivar wire_bytes: bytes of its frames so far
    :ivar ended: END came and was right
    """

    def __init__(self, connection: Connection, stream_id: int, binding: StreamBinding) -> None:
        self._connection = connection
        self._stream = stream_id
        self._chain = _Chain(binding)
        self.ended = False

    def _frames(self, kind: FrameType) -> Iterator[Frame]:
        connection = self._connection
        while True:
            frame = connection.receive(connection.deadlines.answer)
            if frame.stream != self._stream or frame.type not in (kind, FrameType.END):
                raise connection.unexpected(frame)
            if frame.type is FrameType.END:
                self._check_end(frame)
                return
            yield frame

    def chunks(self, kind: StreamKind, on_wire: Callable[[int], None]) -> Iterator[Chunk]:
        """The chunks; the iterator ends only after a right END.

        :raises ProtocolError, ChecksumMismatch: or what ended the connection, or what the peer sent
        """
        end = 0
        for frame in self._frames(FrameType.BLOCKS if kind is StreamKind.BLOCKS else FrameType.DATA):
            on_wire(frame.wire_size)
            if kind is StreamKind.BLOCKS:
                chunk, table = decode_blocks(frame.payload, frame.release, end)
                self._chain.add(frame.type, len(frame.payload), table)
                end = chunk.end
                yield chunk
            else:
                self._chain.add(frame.type, len(frame.payload), _check_of(frame.payload))
                yield NativeChunk(frame.payload, frame.release)

    def digests(self, block_size: int, offset: int) -> Iterator[DigestBatch]:
        """Digest batches, without gaps from ``offset`` on."""
        for frame in self._frames(FrameType.DIGESTS):
            self._chain.add(frame.type, len(frame.payload), frame.payload)
            batch = decode_digests(frame.payload, block_size, offset)
            frame.release()
            offset += len(batch) * block_size
            yield batch

    def _check_end(self, frame: Frame) -> None:
        told = bytes(frame.payload)
        if len(told) != _END.size:
            raise self._connection.refuse("an END frame of wrong length came")
        size, frames, _ = _END.unpack(told)
        if (size, frames) != (self._chain.bytes, self._chain.frames):
            raise self._connection.refuse(
                f"the stream ended after {self._chain.bytes} bytes in {self._chain.frames} frames, "
                f"but {size} in {frames} were sent"
            )
        if told != self._chain.end():
            raise ChecksumMismatch(
                "the digest of the whole stream differs: it is not the stream that was asked for, or was damaged",
                hint="nothing of it counts; the run is tried again",
            )
        self.ended = True
