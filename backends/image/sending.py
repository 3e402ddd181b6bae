"""Makes a block stream's chunks out of extents of an image."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from backends.chunks import batches, without_zeros
from backends.image.reading import Image
from replicator.checksums import Checksums
from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, DIGEST_SIZE, BlockChunk, Extent

_KEPT_BUFFERS = 12


class BufferPool:
    """Buffers of one chunk each, used again once their chunk was released. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: deque[bytearray] = deque(maxlen=_KEPT_BUFFERS)

    def take(self) -> tuple[bytearray, Callable[[], None]]:
        """A buffer of ``CHUNK_SIZE`` bytes with any contents, and how to give it back; giving it back twice is once."""
        with self._lock:
            buffer = self._free.pop() if self._free else None
        if buffer is None:
            buffer = bytearray(CHUNK_SIZE)
        lent = [buffer]

        def give_back() -> None:
            with self._lock:
                if lent:
                    self._free.append(lent.pop())

        return buffer, give_back


class ChunkReader:
    """Reads extents and digests them; blocks of zeros become zero extents."""

    def __init__(self, image: Image, checksums: Checksums, key: bytes) -> None:
        self._image = image
        self._checksums = checksums
        self._key = key
        self._buffers = BufferPool()

    def chunks(self, extents: Iterable[Extent]) -> Iterator[BlockChunk]:
        """The chunks of a stream with these changes. :raises DamagedData: the disk cannot read them"""
        for batch in batches(extents):
            yield self._chunk(batch)

    def _chunk(self, batch: list[Extent]) -> BlockChunk:
        written = [extent for extent in batch if not extent.zero]
        if not written:
            return BlockChunk(tuple(batch), b"", b"")
        if len(written) > 1:
            for extent in written:  # let the disk find them all at once, not one after the other
                os.posix_fadvise(self._image.fd, extent.offset, extent.length, os.POSIX_FADV_WILLNEED)
        buffer, give_back = self._buffers.take()
        try:
            return self._fill(batch, memoryview(buffer), give_back)
        except BaseException:
            give_back()
            raise

    def _fill(self, batch: list[Extent], buffer: memoryview, give_back: Callable[[], None]) -> BlockChunk:
        digests = bytearray(sum(-(-e.length // BLOCK_SIZE) for e in batch if not e.zero) * DIGEST_SIZE)
        zeros = bytearray(len(digests) // DIGEST_SIZE)
        end = blocks = 0
        for extent in batch:
            if extent.zero:
                continue
            part = buffer[end : end + extent.length]
            self._image.read_into(part, extent.offset)
            blocks += self._checksums.digest_blocks_into(
                part,
                self._key,
                memoryview(digests)[blocks * DIGEST_SIZE :],
                memoryview(zeros)[blocks:],
                block_size=BLOCK_SIZE,
            )
            end += extent.length
        if not any(zeros):
            return BlockChunk(tuple(batch), buffer[:end], bytes(digests), release=give_back)
        return without_zeros(batch, buffer, digests, zeros, give_back)
