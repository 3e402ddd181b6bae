"""Which parts of an image file have data, and which parts of two files share their blocks on the disk.

Two files that both exist and whose bytes at the same offset lie in the same place on the disk have equal bytes there:
there is only one copy. So nothing that is shared need ever be read. The claim needs three things, all seen to here:

- both mappings must hold at the same moment. A balance or defragmentation can move blocks between two questions, so
  one file is asked before and after the other; if its answer changed, that window is compared by reading;
- the mapping must be the final one: no extent that is not yet allocated, encoded, inline or packed (fiemap.rst);
- the file system must itself call the extent shared: where it is not (another device of the same file system, say),
  equal numbers are chance.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto

from backends.image.linux import (
    FIEMAP_EXTENT_LAST,
    FIEMAP_EXTENT_MERGED,
    FIEMAP_EXTENT_SHARED,
    FIEMAP_EXTENT_UNWRITTEN,
    Mapped,
    fiemap,
)
from replicator.streams import BLOCK_SIZE

_BATCH = 2048
"""Extents asked for at a time: bounds memory whatever the fragmentation."""
_PLAIN = FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_SHARED | FIEMAP_EXTENT_MERGED


class Verdict(Enum):
    """What is known of a range of the newer file, against the older one."""

    SAME = auto()
    CHANGED = auto()
    ZEROED = auto()
    """A hole now, data before."""
    SUSPECT = auto()
    """Only reading both can tell."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A range with its verdict."""

    offset: int
    length: int
    verdict: Verdict


def data_segments(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """``(offset, length)`` of what is not a hole between ``start`` and ``end``, ascending (lseek(2), SEEK_DATA).

    A file system that knows no holes has one segment.
    """
    while start < end:
        try:
            begin = os.lseek(fd, start, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data behind
                return
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            yield start, end - start
            return
        if begin >= end:
            return
        stop = min(os.lseek(fd, begin, os.SEEK_HOLE), end)
        if stop <= begin:  # a block device answers SEEK_HOLE with where it was asked on some kernels
            stop = end
        yield begin, stop - begin
        start = stop


def _read_map(fd: int, start: int, end: int) -> tuple[list[Mapped], int]:
    """Extents from ``start``, clipped to it, at most a batch; and up to where they are complete."""
    found = fiemap(fd, start, end - start, _BATCH)
    complete = end
    if len(found) == _BATCH and not found[-1].flags & FIEMAP_EXTENT_LAST:
        complete = min(end, found[-1].end)
    return found, complete


def compare_maps(newer: int, older: int, start: int, end: int) -> Iterator[Judged]:
    """Verdicts for all of ``start`` to ``end``, ascending and without gaps, from the two files' mappings alone.

    Both files must be unchanging, and at least ``end`` long.

    :raises OSError: EOPNOTSUPP where the file system has no mappings to show
    """
    while start < end:
        mine, stop = _read_map(newer, start, end)
        theirs, stop_theirs = _read_map(older, start, stop)
        stop = min(stop, stop_theirs)
        again, _ = _read_map(newer, start, end)
        if again != mine:
            yield Judged(start, stop - start, Verdict.SUSPECT)
        else:
            yield from judge(mine, theirs, start, stop)
        start = stop


def judge(newer: list[Mapped], older: list[Mapped], start: int, end: int) -> Iterator[Judged]:
    """The same for two lists of extents that are complete between ``start`` and ``end``."""
    i = j = 0
    position = start
    while position < end:
        while i < len(newer) and newer[i].end <= position:
            i += 1
        while j < len(older) and older[j].end <= position:
            j += 1
        alike = _alike(newer, i, older, j)
        if alike:  # with the holes between them, which are holes in both
            stop = min(end, newer[i + alike - 1].end)
            yield Judged(position, stop - position, Verdict.SAME)
            position = stop
            i, j = i + alike - 1, j + alike - 1
            continue
        mine = newer[i] if i < len(newer) and newer[i].logical <= position else None
        theirs = older[j] if j < len(older) and older[j].logical <= position else None
        stop = end
        for extents, index in ((newer, i), (older, j)):
            if index < len(extents):
                extent = extents[index]
                stop = min(stop, extent.end if extent.logical <= position else extent.logical)
        yield Judged(position, stop - position, _verdict(mine, theirs))
        position = stop


def _alike(newer: list[Mapped], i: int, older: list[Mapped], j: int) -> int:
    """How many extents, from these on, are one and the same in both."""
    count = 0
    limit = min(len(newer) - i, len(older) - j)
    while count < limit:
        mine = newer[i + count]
        if mine != older[j + count] or mine.flags & (~_PLAIN | FIEMAP_EXTENT_SHARED) != FIEMAP_EXTENT_SHARED:
            break
        count += 1
    return count


def _has_data(extent: Mapped) -> bool:
    """Unwritten extents are space set aside; they read as zeros. (Their pages were written out: FIEMAP_FLAG_SYNC.)"""
    return not extent.flags & FIEMAP_EXTENT_UNWRITTEN or bool(extent.flags & ~(_PLAIN | FIEMAP_EXTENT_UNWRITTEN))


def _verdict(newer: Mapped | None, older: Mapped | None) -> Verdict:
    if newer is None or not _has_data(newer):
        return Verdict.SAME if older is None or not _has_data(older) else Verdict.ZEROED
    if older is None or not _has_data(older):
        return Verdict.CHANGED
    if (newer.flags | older.flags) & ~_PLAIN:
        return Verdict.SUSPECT
    if newer.physical - newer.logical != older.physical - older.logical:
        return Verdict.CHANGED
    shared = newer.flags & older.flags & FIEMAP_EXTENT_SHARED
    return Verdict.SAME if shared else Verdict.SUSPECT


def trusted_end(size: int, other: int) -> int:
    """Up to where mappings of files of two sizes may be trusted: a file's last block can share its place on the disk
    with one that is longer there, although what lies behind the end of the shorter is zeros."""
    if size == other:
        return size
    return min(size, other) // BLOCK_SIZE * BLOCK_SIZE
