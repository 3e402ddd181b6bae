"""Streams of changes between a source and a target.

A *block* stream is a list of changes in ascending order of offset, each a write or a zero, with a keyed digest for
every block written. A *native* stream is opaque bytes. Both are iterators: reaching the end means that the stream is
complete and verified; anything else is an exception. A consumer asks for the next chunk when it can take it, so the
slowest part sets the pace and memory stays bounded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Protocol, Self, runtime_checkable

from replicator.model import StreamKind

BLOCK_SIZE = 64 * 1024
"""Bytes covered by one digest: small enough that 4 KiB changes do not drag much along, large enough for the hash's
full speed (64 BLAKE3 chunks)."""
DIGEST_SIZE = 16
"""Bytes kept of a block's keyed BLAKE3: 128 bits."""
KEY_SIZE = 32
CHUNK_SIZE = 1024 * 1024
"""Bytes of data in one chunk, at most."""
MAX_EXTENTS = 4096
"""Extents in one chunk, at most."""
MAX_VOLUME_SIZE = 1 << 56
"""Bytes; no offset or size from a peer may be beyond (64 PiB; XFS and ZFS files end at 8 EiB and 16 EiB)."""

Buffer = bytes | bytearray | memoryview


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a volume: written (its bytes are in the chunk's data) or zero (a hole; no bytes)."""

    offset: int
    length: int
    zero: bool = False

    @property
    def end(self) -> int:
        """First byte after the range."""
        return self.offset + self.length


@dataclass(frozen=True, slots=True)
class BlockChunk:
    """Some changes of a block stream.

    :ivar extents: ascending and disjoint, 1 to ``MAX_EXTENTS``. Written ones have together ``len(data)`` bytes, at
        most ``CHUNK_SIZE``; zero ones may be of any length.
    :ivar data: the bytes of the written extents, one after the other
    :ivar digests: ``DIGEST_SIZE`` bytes for every piece of ``BLOCK_SIZE`` bytes (the last one shorter) of every
        written extent, pieces counted from the extent's start; keyed with the stream's key
    :ivar release: call it when ``data`` is no longer needed, so its buffer can be used again; optional
    """

    extents: tuple[Extent, ...]
    data: Buffer
    digests: bytes
    release: Callable[[], None] = _nothing

    @property
    def length(self) -> int:
        """Bytes of the volume that this chunk changes."""
        return sum(extent.length for extent in self.extents)

    @property
    def end(self) -> int:
        """Every change below this offset is in this chunk or an earlier one."""
        return self.extents[-1].end if self.extents else 0


@dataclass(frozen=True, slots=True)
class NativeChunk:
    """Some bytes of a native stream, at most ``CHUNK_SIZE``."""

    data: Buffer
    release: Callable[[], None] = _nothing

    @property
    def length(self) -> int:
        """Bytes of data."""
        return len(self.data)


Chunk = BlockChunk | NativeChunk


@runtime_checkable
class Stream(Protocol):
    """An open stream. Iterate it once, in one thread; close it whatever happened (it is a context manager).

    :ivar kind: which kind of chunks it has
    :ivar estimate: bytes of changes it is going to have, None when unknown
    :ivar wire_bytes: bytes that it has taken on the network so far, headers and compression included. Whoever moves
        its chunks over a connection adds to this: the producer when they come from one, the consumer when they go.
    """

    kind: StreamKind
    estimate: int | None
    wire_bytes: int

    def __iter__(self) -> Iterator[Chunk]: ...

    def close(self) -> None:
        """Release what the stream holds; idempotent; allowed in the middle."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class ChunkStream:
    """A :class:`Stream` over an iterator of chunks, with something to do at the end."""

    def __init__(
        self,
        kind: StreamKind,
        chunks: Iterator[Chunk],
        *,
        estimate: int | None = None,
        on_close: Callable[[], None] = _nothing,
    ) -> None:
        self.kind = kind
        self.estimate = estimate
        self.wire_bytes = 0
        self._chunks = chunks
        self._on_close = on_close
        self._closed = False

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def close(self) -> None:
        """Close the iterator (a generator's ``finally`` runs), then call ``on_close``; once."""
        if self._closed:
            return
        self._closed = True
        close = getattr(self._chunks, "close", None)
        try:
            if close is not None:
                close()
        finally:
            self._on_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class BegunStream(ChunkStream):
    """A stream whose beginning has come: whoever has one knows that the source can send it.

    Closing it closes the stream that it is made of. Bytes on the network are counted from the beginning on.

    :raises ReplicatorError: what the stream raised before ``least`` bytes of it had come; they are kept in memory
    """

    def __init__(self, stream: Stream, least: int = CHUNK_SIZE) -> None:
        self._stream = stream
        self._rest = iter(stream)
        self._first: deque[Chunk] = deque()
        size = 0
        while size < least and (chunk := next(self._rest, None)) is not None:
            self._first.append(_kept(chunk))
            size += len(chunk.data)
            chunk.release()
        super().__init__(stream.kind, self._all(), estimate=stream.estimate, on_close=stream.close)
        self.wire_bytes = stream.wire_bytes

    def _all(self) -> Iterator[Chunk]:
        while self._first:
            yield self._first.popleft()
        for chunk in self._rest:
            self.wire_bytes = self._stream.wire_bytes
            yield chunk


def _kept(chunk: Chunk) -> Chunk:
    """With data of its own: the buffer of the other is needed for what comes."""
    return replace(chunk, data=bytes(chunk.data), release=_nothing)
