"""Makes a block stream's chunks out of extents of an image."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from backends.image.reading import Image
from replicator.checksums import Checksums
from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, DIGEST_SIZE, MAX_EXTENTS, BlockChunk, Extent

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


def batches(extents: Iterable[Extent]) -> Iterator[list[Extent]]:
    """Extents cut and gathered so that each list fits one chunk.

    Cuts are whole digest blocks from an extent's start where possible, so short pieces are few.
    """
    batch: list[Extent] = []
    room = CHUNK_SIZE
    for extent in extents:
        offset, left = extent.offset, extent.length
        while left:
            if len(batch) == MAX_EXTENTS or not room or (not extent.zero and left > room and room < BLOCK_SIZE):
                yield batch
                batch, room = [], CHUNK_SIZE
            length = left if extent.zero or left <= room else room // BLOCK_SIZE * BLOCK_SIZE
            batch.append(Extent(offset, length, extent.zero))
            offset, left = offset + length, left - length
            if not extent.zero:
                room -= length
    if batch:
        yield batch


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
        return _without_zeros(batch, buffer, digests, zeros, give_back)


def _without_zeros(
    batch: list[Extent], buffer: memoryview, digests: bytearray, zeros: bytearray, give_back: Callable[[], None]
) -> BlockChunk:
    """The chunk with every block of zeros as a zero extent, and its bytes moved out of the data."""
    extents: list[Extent] = []
    kept = bytearray()
    read = end = block = 0
    for extent in batch:
        if extent.zero:
            _append(extents, extent)
            continue
        for offset in range(extent.offset, extent.end, BLOCK_SIZE):
            length = min(BLOCK_SIZE, extent.end - offset)
            if zeros[block]:
                _append(extents, Extent(offset, length, zero=True))
            else:
                if end != read:
                    buffer[end : end + length] = bytes(buffer[read : read + length])
                kept += digests[block * DIGEST_SIZE : (block + 1) * DIGEST_SIZE]
                # Pieces are counted from an extent's start: only one that begins at a piece may go on an earlier one.
                _append(extents, Extent(offset, length), joins=offset > extent.offset)
                end += length
            read += length
            block += 1
    if not end:
        give_back()
        return BlockChunk(tuple(extents), b"", b"")
    return BlockChunk(tuple(extents), buffer[:end], bytes(kept), release=give_back)


def _append(extents: list[Extent], extent: Extent, *, joins: bool = True) -> None:
    last = extents[-1] if extents else None
    if joins and last is not None and last.end == extent.offset and last.zero == extent.zero:
        extents[-1] = Extent(last.offset, last.length + extent.length, last.zero)
    else:
        extents.append(extent)
