"""Making chunks of a block stream out of extents, and taking them apart; what the storages of images share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from replicator.streams import BLOCK_SIZE, CHUNK_SIZE, DIGEST_SIZE, MAX_EXTENTS, BlockChunk, Extent


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


def without_zeros(
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


def runs(extents: Iterable[Extent]) -> Iterable[tuple[int, int, int | None]]:
    """``(offset, length, start in the data)`` of neighbouring extents taken together; None for zeros."""
    position = 0
    run: tuple[int, int, int | None] | None = None
    for extent in extents:
        start = None if extent.zero else position
        if not extent.zero:
            position += extent.length
        if run is not None and run[0] + run[1] == extent.offset and (run[2] is None) == extent.zero:
            run = (run[0], run[1] + extent.length, run[2])
            continue
        if run is not None:
            yield run
        run = (extent.offset, extent.length, start)
    if run is not None:
        yield run
