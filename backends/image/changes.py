"""What a stream has to carry, as extents in ascending order: found, checked against the kept digests, narrowed.

Each function is a generator over the one before, and none holds more than a window of the image.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from backends.image.extents import Verdict, compare_maps, data_segments, trusted_end
from backends.image.kept_digests import SECTION_BLOCKS, KeptDigests
from backends.image.reading import PIECE, WINDOW, Image
from replicator.checksums import Checksums
from replicator.endpoint import Range
from replicator.errors import DamagedData
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE, Extent


def merged(extents: Iterable[Extent]) -> Iterator[Extent]:
    """Adjacent extents of one kind as one."""
    current: Extent | None = None
    for extent in extents:
        if current is not None and current.end == extent.offset and current.zero == extent.zero:
            current = Extent(current.offset, current.length + extent.length, current.zero)
            continue
        if current is not None:
            yield current
        current = extent
    if current is not None:
        yield current


def full(image: Image, start: int) -> Iterator[Extent]:
    """All data of an image from ``start``; its holes are left out."""
    for offset, length in data_segments(image.fd, start, image.size):
        yield Extent(offset, length)


def selected(image: Image, ranges: Iterable[Range], start: int) -> Iterator[Extent]:
    """Just these ranges of an image, what is a hole as zeros."""
    for wanted in ranges:
        position, end = max(wanted.offset, start), min(wanted.end, image.size)
        for offset, length in data_segments(image.fd, position, end):
            if offset > position:
                yield Extent(position, offset - position, zero=True)
            yield Extent(offset, length)
            position = offset + length
        if position < end:
            yield Extent(position, end - position, zero=True)


def mapped(newer: Image, older: Image, start: int) -> Iterator[Extent]:
    """Changes by where the blocks lie on the disk; only what that leaves open is read and compared.

    :raises OSError: EOPNOTSUPP before the first change where the file system has no mappings to show
    """
    trusted = max(start, trusted_end(newer.size, older.size))
    for judged in compare_maps(newer.fd, older.fd, start, trusted):
        if judged.verdict is Verdict.CHANGED:
            yield Extent(judged.offset, judged.length)
        elif judged.verdict is Verdict.ZEROED:
            yield Extent(judged.offset, judged.length, zero=True)
        elif judged.verdict is Verdict.SUSPECT:
            yield from compared(newer, older, judged.offset, judged.length)
    yield from compared(newer, older, trusted, newer.size - trusted)


def compared(newer: Image, older: Image, offset: int, length: int) -> Iterator[Extent]:
    """Changes in a range by reading both, to the piece of 4 KiB. What lies beyond the end of ``older`` is zeros."""
    end = offset + length
    overlap = min(end, max(offset, older.size))
    while offset < overlap:
        size = min(WINDOW, overlap - offset)
        mine, theirs = newer.read(offset, size), older.read(offset, size)
        if mine != theirs:
            yield from _pieces(mine, theirs, offset)
        offset += size
    for begin, size in data_segments(newer.fd, offset, end):
        yield Extent(begin, size)


def _pieces(mine: bytes, theirs: bytes, offset: int) -> Iterator[Extent]:
    for start in range(0, len(mine), PIECE):
        if mine[start : start + PIECE] != theirs[start : start + PIECE]:
            yield Extent(offset + start, min(PIECE, len(mine) - start))


def digested(mine: KeptDigests, theirs: KeptDigests, checksums: Checksums) -> Iterator[int]:
    """The numbers of the blocks that both have and whose kept digests differ, ascending. Reads no image.

    A last block that is short on one side differs by its length alone, so it is always among them.
    """
    common = min(mine.blocks, theirs.blocks)
    for first in range(0, common, SECTION_BLOCKS):
        count = min(SECTION_BLOCKS, common - first)
        for index in checksums.differing_blocks(mine.read(first, count), theirs.read(first, count)):
            yield first + index


def block_extents(image: Image, blocks: Iterable[int], start: int) -> Iterator[Extent]:
    """Blocks as extents from ``start`` on, holes of the image as zeros."""
    for block in blocks:
        offset = max(block * BLOCK_SIZE, start)
        end = min((block + 1) * BLOCK_SIZE, image.size)
        if offset < end:
            yield from selected(image, (Range(offset, end - offset),), start)


class Guard:
    """Compares what is read with the digests kept when it was written: a disk's silent damage is not sent on."""

    def __init__(self, image: Image, kept: KeptDigests, checksums: Checksums, key: bytes) -> None:
        self.image = image
        self.kept = kept
        self._checksums = checksums
        self._key = key

    def damaged(self, first: int, count: int) -> list[int]:
        """The numbers of those of ``count`` blocks from ``first`` that are not what was written."""
        offset = first * BLOCK_SIZE
        data = self.image.read(offset, min(count * BLOCK_SIZE, self.image.size - offset))
        found = self._checksums.digest_blocks(data, self._key, block_size=BLOCK_SIZE)
        expected = self.kept.read(first, len(found) // DIGEST_SIZE)
        return [first + index for index in self._checksums.differing_blocks(found, expected)]

    def verified(self, extents: Iterable[Extent]) -> Iterator[Extent]:
        """The same extents, each yielded once the blocks that it touches were read and found right.

        :raises DamagedData: names the first damaged byte range
        """
        for extent in extents:
            if not extent.zero:
                self._verify(extent)
            yield extent

    def _verify(self, extent: Extent) -> None:
        first, last = extent.offset // BLOCK_SIZE, (extent.end - 1) // BLOCK_SIZE
        step = WINDOW // BLOCK_SIZE
        for block in range(first, last + 1, step):
            damaged = self.damaged(block, min(step, last + 1 - block))
            if damaged:
                offset = damaged[0] * BLOCK_SIZE
                raise DamagedData(
                    f"{self.image.label} was damaged on its disk: bytes {offset} to {offset + BLOCK_SIZE - 1} are not "
                    "what was written, so they are not sent",
                    hint="check the disk; take a new snapshot, or restore this one from a replica",
                )


def verified_windows(guard: Guard, extents: Iterable[Extent]) -> Iterator[Extent]:
    """As :meth:`Guard.verified`, for long extents: verified and yielded in parts of a window."""
    return guard.verified(itertools.chain.from_iterable(map(_windows, extents)))


def _windows(extent: Extent) -> Iterator[Extent]:
    if extent.zero:
        yield extent
        return
    offset = extent.offset
    while offset < extent.end:
        stop = min(offset - offset % WINDOW + WINDOW, extent.end)
        yield Extent(offset, stop - offset)
        offset = stop


def narrowed(extents: Iterable[Extent], newer: Image, older: Guard | Image) -> Iterator[Extent]:
    """Written extents cut down to the pieces of 4 KiB that differ from the base here.

    With a :class:`Guard` on the base, a block of it that was damaged on its disk is not compared with: the target's
    base is still as it was, so the whole block is sent.
    """
    base = older.image if isinstance(older, Guard) else older
    for extent in extents:
        if extent.zero or extent.offset >= base.size:
            yield extent
            continue
        if isinstance(older, Guard) and _base_damaged(extent, older):
            yield extent
            continue
        yield from compared(newer, base, extent.offset, extent.length)


def _base_damaged(extent: Extent, guard: Guard) -> bool:
    first = extent.offset // BLOCK_SIZE
    end = min(extent.end, guard.image.size)
    return bool(guard.damaged(first, -(-end // BLOCK_SIZE) - first))


def total(extents: Iterable[Extent], start: int = 0) -> int:
    """Bytes of all extents from offset ``start`` on."""
    return sum(max(0, extent.end - max(extent.offset, start)) for extent in extents)


def mapped_estimate(newer: Image, older: Image) -> Iterator[Extent]:
    """As :func:`mapped` without reading: what is left open counts as changed."""
    trusted = trusted_end(newer.size, older.size)
    for judged in compare_maps(newer.fd, older.fd, 0, trusted):
        if judged.verdict is not Verdict.SAME:
            yield Extent(judged.offset, judged.length, judged.verdict is Verdict.ZEROED)
    yield from (Extent(offset, length) for offset, length in data_segments(newer.fd, trusted, newer.size))
