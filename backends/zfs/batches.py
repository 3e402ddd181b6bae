"""A batch: the send streams of successive snapshots of one dataset, one after the other in one native stream.

zfs has such a thing itself, the package (zfs send -I, -p, -R). But zfs receive takes each stream of a package into
whatever place that stream names, and creates datasets or looks all over the pool for it; what arrives is a peer's
word. So a package is never received. Here the streams are kept apart, and each has a zfs receive of its own, which is
told the one snapshot to make and ends with the stream's last record, whatever follows.

Layout: pieces, each of them a length (4 bytes, little-endian, 1 to :data:`MAX_PIECE`) and so many bytes of a send
stream. A length of 0 ends the send stream; the next one follows, or the end of the native stream.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

from replicator.errors import ProtocolError
from replicator.streams import CHUNK_SIZE, NativeChunk

_LENGTH = struct.Struct("<I")
ROOM = _LENGTH.size
"""Bytes at the beginning of a chunk that :func:`pieces` fills."""
MAX_PIECE = CHUNK_SIZE - ROOM
"""Bytes of a piece."""


def pieces(chunks: Iterable[NativeChunk]) -> Iterator[NativeChunk]:
    """One send stream as it is in a batch, without a copy.

    :param chunks: of the stream, each after ROOM bytes that are free
    """
    for chunk in chunks:
        _LENGTH.pack_into(chunk.data, 0, len(chunk.data) - ROOM)
        yield chunk
    yield NativeChunk(_LENGTH.pack(0))


class Batch:
    """A batch that arrives. Nothing of it is gathered, in whatever portions it comes."""

    def __init__(self, chunks: Iterator[NativeChunk]) -> None:
        self._chunks = chunks
        self._rest: NativeChunk | None = None
        self._within = False

    def stream(self) -> Iterator[NativeChunk]:
        """The next send stream. It ends only once its end has come, so whoever holds back the last chunk until then has
        nothing of one that was cut. :raises ProtocolError: no such thing comes"""
        if self._within:
            raise _bad("a stream that goes on after its last record")
        self._within = True
        while length := self._length():
            if length > MAX_PIECE:
                raise _bad(f"a piece of {length} bytes; {MAX_PIECE} are allowed")
            while length:
                chunk = self._take(length)
                length -= len(chunk.data)
                yield chunk
        self._within = False

    def ending(self, last: Iterable[NativeChunk]) -> Iterator[NativeChunk]:
        """The last send stream, which ends with the native stream. :raises ProtocolError: there is more in that"""
        yield from last
        if self._rest is not None or next(self._chunks, None) is not None:
            raise _bad("more after the stream of the snapshot that was asked for")

    def _length(self) -> int:
        head = b""
        while len(head) < ROOM:
            part = self._take(ROOM - len(head))
            head += bytes(part.data)
            part.release()
        return int(_LENGTH.unpack(head)[0])

    def _take(self, most: int) -> NativeChunk:
        """What comes next, at most so much. The last part of a chunk is its buffer; what is before that is copied."""
        chunk = self._rest if self._rest is not None else next(self._chunks, None)
        if chunk is None:
            raise _bad("an end before that of its last stream")
        self._rest = None
        view = memoryview(chunk.data).cast("B")
        if len(view) <= most:
            return NativeChunk(view, chunk.release)
        self._rest = NativeChunk(view[most:], chunk.release)
        return NativeChunk(bytes(view[:most]))


def _bad(what: str) -> ProtocolError:
    return ProtocolError(f"a batch of ZFS send streams has {what}", hint="both nodes must run the same version")
