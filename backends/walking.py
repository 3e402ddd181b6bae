"""Walks a folder that nobody changes (a snapshot) and writes its manifest; see :mod:`replicator.manifest`.

Only one folder is open at a time: the one above is reached by ``..``, which in a snapshot is where one came from. So
neither depth nor the length of a path matters, and no symbolic link is ever followed. Entries are taken in the order of
their names' bytes; the names of a folder with very many are sorted in a temporary file.

Blocks of zeros count the same whether they are stored or a hole: whether ZFS makes a hole of them depends on the
compression of the dataset that they are written to, which a replica need not share. Where the holes are is told apart
from that (:class:`~replicator.manifest.Holes`), so that a difference in storing is seen, and not taken for one of
content.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import heapq
import os
import stat
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import IO

from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.errors import DamagedData, NotReadable
from replicator.manifest import (
    MAX_PATH,
    MAX_RUN,
    NOTHING,
    Entry,
    EntryKind,
    Holes,
    Leave,
    Record,
    Run,
    RunKind,
    Unreadable,
)
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE

UNREADABLE_ERRORS = frozenset((errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EBADE, errno.ENODATA))
"""What a disk or a checksum that does not match makes of reading; ZFS says EIO, and EBADE (ECKSUM) in places."""
MAX_SORTED = 1 << 18
"""Names of a folder that are sorted in memory; more of them go through a temporary file."""
MAX_LINKED = 1 << 20
"""Files with several names that are remembered; content of later ones is read for each name."""
WINDOW = 16
"""Blocks read at a time: 1 MiB."""

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ACL = b"system.posix_acl_"
_FS_IOC_FSGETXATTR = 0x801C581F
"""linux/fs.h: _IOR('X', 31, struct fsxattr)."""
_FSXATTR = struct.Struct("=IIII12x")
_FS_XFLAG_HASATTR = 0x8000_0000
"""Says only that there are attributes, which are compared themselves."""
_PAIR = struct.Struct("<II")
_EXTENT = struct.Struct("<QQ")
_LENGTH = struct.Struct("<H")
_KINDS = {
    stat.S_IFREG: EntryKind.FILE,
    stat.S_IFDIR: EntryKind.FOLDER,
    stat.S_IFLNK: EntryKind.SYMLINK,
    stat.S_IFIFO: EntryKind.PIPE,
    stat.S_IFSOCK: EntryKind.SOCKET,
    stat.S_IFCHR: EntryKind.CHARACTER,
    stat.S_IFBLK: EntryKind.BLOCK,
}


def walk(
    root: int, key: bytes, checksums: Checksums, cancel: Cancellation, *, skip: frozenset[bytes] = frozenset()
) -> Iterator[Record]:
    """The manifest of an open folder.

    :param root: file descriptor of the folder; it stays open
    :param key: 32 bytes, for all digests
    :param skip: names in the root that do not belong to it (``.zfs``)
    :raises NotReadable: no permission to read something
    :raises DamagedData: folders do not lead back to where they were entered from
    """
    return _Walk(key, checksums, cancel).records(root, skip)


@dataclass(frozen=True, slots=True)
class _Level:
    """A folder that the walk is in. :ivar entered: whether it was opened, and is to be left by ``..``"""

    names: Iterator[bytes]
    inode: int
    length: int
    entered: bool


class _Walk:
    def __init__(self, key: bytes, checksums: Checksums, cancel: Cancellation) -> None:
        self._key = key
        self._checksums = checksums
        self._cancel = cancel
        self._reader = _ContentReader(key, checksums, cancel)
        self._seen: set[int] = set()

    def records(self, root: int, skip: frozenset[bytes]) -> Iterator[Record]:
        here = os.open(".", _FLAGS | os.O_DIRECTORY, dir_fd=root)
        levels: list[_Level] = []
        length = 0
        try:
            entry, level = self._folder(here, self._entry(b"", os.fstat(here)))
            levels.append(_Level((n for n in level.names if n not in skip), level.inode, 0, level.entered))
            yield replace(entry, inode=0)  # ZFS gives the root of a mounted snapshot a number of that mount
            while levels:
                self._cancel.check()
                name = next(levels[-1].names, None)
                if name is None:
                    done = levels.pop()
                    length -= done.length
                    if done.entered and levels:
                        here = self._leave(here, levels[-1].inode)
                    yield Leave()
                    continue
                status = self._status(here, name)
                if status is None:
                    yield Entry(name, EntryKind.UNKNOWN, unreadable=Unreadable.ENTRY)
                    continue
                entry = self._entry(name, status)
                if entry.kind is EntryKind.FOLDER:
                    below = self._open(here, name, os.O_DIRECTORY)
                    if below is not None:
                        os.close(here)
                        here = below
                    entry, level = self._folder(below, entry)
                    levels.append(level)
                    length += level.length
                    if length > MAX_PATH:
                        raise NotReadable(f"folders are nested in {length} bytes of names", hint="verify by scrub")
                    yield entry
                elif entry.kind is EntryKind.FILE:
                    yield from self._file(here, entry)
                else:
                    yield self._other(here, entry)
        finally:
            os.close(here)

    # -- looking

    def _status(self, here: int, name: bytes) -> os.stat_result | None:
        try:
            return os.stat(name, dir_fd=here, follow_symlinks=False)
        except OSError as error:
            _check_unreadable(error, name)
            return None

    def _open(self, here: int, name: bytes, flags: int = 0) -> int | None:
        """None where the storage cannot read it."""
        try:
            return os.open(name, _FLAGS | flags, dir_fd=here)
        except OSError as error:
            _check_unreadable(error, name)
            return None

    def _leave(self, here: int, inode: int) -> int:
        above = os.open("..", _FLAGS | os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        if os.fstat(above).st_ino != inode:
            os.close(above)
            raise DamagedData(
                "a folder does not lead back to the one that it was entered from", hint="scrub the pool: zpool scrub"
            )
        return above

    def _entry(self, name: bytes, status: os.stat_result) -> Entry:
        kind = _KINDS[stat.S_IFMT(status.st_mode)]
        return Entry(
            name,
            kind,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
            seconds=status.st_mtime_ns // 1_000_000_000,
            nanoseconds=status.st_mtime_ns % 1_000_000_000,
            links=0 if kind is EntryKind.FOLDER else status.st_nlink,
            inode=status.st_ino,
            size=status.st_size if kind is EntryKind.FILE else 0,
            device=status.st_rdev if kind in (EntryKind.CHARACTER, EntryKind.BLOCK) else 0,
        )

    # -- each kind

    def _folder(self, fd: int | None, entry: Entry) -> tuple[Entry, _Level]:
        if fd is None:
            unreadable = Unreadable.LISTING | Unreadable.ATTRIBUTES
            return replace(entry, unreadable=unreadable), _Level(iter(()), entry.inode, len(entry.name), False)
        entry = self._with_attributes(_with_flags(entry, fd), fd)
        names: Iterator[bytes] = iter(())
        try:
            names = sorted_names(fd)
        except OSError as error:
            _check_unreadable(error, entry.name)
            entry = replace(entry, unreadable=entry.unreadable | Unreadable.LISTING)
        return entry, _Level(names, entry.inode, len(entry.name), True)

    def _file(self, here: int, entry: Entry) -> Iterator[Record]:
        if entry.links > 1:
            if entry.inode in self._seen:
                entry = replace(entry, linked=True)
            elif len(self._seen) < MAX_LINKED:
                self._seen.add(entry.inode)
        fd = self._open(here, entry.name)
        if fd is None:
            yield replace(entry, unreadable=Unreadable.ATTRIBUTES)
            if entry.has_content:
                blocks = -(-entry.size // BLOCK_SIZE)
                if blocks:
                    yield Run(RunKind.UNREADABLE, blocks)
                yield Holes(0)
            return
        try:
            entry = self._with_attributes(_with_flags(entry, fd), fd)
            yield entry
            if entry.has_content:
                yield from self._reader.read(fd, entry.size)
        finally:
            os.close(fd)

    def _other(self, here: int, entry: Entry) -> Entry:
        """What is not opened: links, pipes, sockets, devices."""
        entry = self._with_attributes(entry, b"/proc/self/fd/%d/%s" % (here, entry.name))
        if entry.kind is not EntryKind.SYMLINK:
            return entry
        try:
            target = os.readlink(entry.name, dir_fd=here)
        except OSError as error:
            _check_unreadable(error, entry.name)
            return replace(entry, unreadable=entry.unreadable | Unreadable.TARGET)
        return replace(entry, target=self._digest(target))

    def _digest(self, *parts: bytes) -> bytes:
        return self._checksums.keyed_digest(self._key, *parts)[:DIGEST_SIZE]

    def _with_attributes(self, entry: Entry, place: int | bytes) -> Entry:
        follow = isinstance(place, int)
        xattrs = acl = NOTHING
        try:
            for name in sorted(map(os.fsencode, os.listxattr(place, follow_symlinks=follow))):
                value = os.getxattr(place, name, follow_symlinks=follow)
                piece = _PAIR.pack(len(name), len(value)) + name + value
                if name.startswith(_ACL):
                    acl = self._digest(acl, piece)
                else:
                    xattrs = self._digest(xattrs, piece)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                return entry
            if error.errno not in (errno.E2BIG, errno.ERANGE):
                _check_unreadable(error, entry.name)
            return replace(entry, unreadable=entry.unreadable | Unreadable.ATTRIBUTES)
        return replace(entry, xattrs=xattrs, acl=acl)


def _with_flags(entry: Entry, fd: int) -> Entry:
    buffer = bytearray(_FSXATTR.size)
    try:
        fcntl.ioctl(fd, _FS_IOC_FSGETXATTR, buffer)
    except OSError:  # this file system has no such thing
        return entry
    flags, _, _, project = _FSXATTR.unpack(buffer)
    return replace(entry, flags=flags & ~_FS_XFLAG_HASATTR, project=project)


def _check_unreadable(error: OSError, name: bytes) -> None:
    """Return where the storage could not read. :raises NotReadable: no permission; :raises OSError: anything else"""
    if error.errno in UNREADABLE_ERRORS:
        return
    if error.errno in (errno.EACCES, errno.EPERM):
        raise NotReadable(
            f"{os.fsdecode(name)!r} cannot be read: {error.strerror}",
            hint="run replicator as root, or with the capability CAP_DAC_READ_SEARCH",
        ) from error
    raise error


# -- names in order


def sorted_names(fd: int, *, limit: int = MAX_SORTED) -> Iterator[bytes]:
    """The names in an open folder, ascending by their bytes.

    :param limit: how many are sorted in memory at once
    """
    runs: list[IO[bytes]] = []
    batch: list[bytes] = []
    with os.scandir(fd) as found:
        for item in found:
            batch.append(os.fsencode(item.name))
            if len(batch) >= limit:
                runs.append(_spill(batch))
                batch = []
    batch.sort()
    return heapq.merge(batch, *map(_spilled, runs)) if runs else iter(batch)


def _spill(names: list[bytes]) -> IO[bytes]:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - closed once it was read, in _spilled
    for name in sorted(names):
        file.write(_LENGTH.pack(len(name)) + name)
    file.seek(0)
    return file


def _spilled(file: IO[bytes]) -> Iterator[bytes]:
    with contextlib.closing(file):
        while head := file.read(_LENGTH.size):
            yield file.read(_LENGTH.unpack(head)[0])


# -- content


class _ContentReader:
    """Reads files as runs of blocks."""

    def __init__(self, key: bytes, checksums: Checksums, cancel: Cancellation) -> None:
        self._key = key
        self._checksums = checksums
        self._cancel = cancel
        self._data = memoryview(bytearray(WINDOW * BLOCK_SIZE))
        self._digests = bytearray(WINDOW * DIGEST_SIZE)
        self._zeros = bytearray(WINDOW)

    def read(self, fd: int, size: int) -> Iterator[Record]:
        """All runs of a file, then its holes."""
        runs = _Runs()
        blocks, block, stored, where = -(-size // BLOCK_SIZE), 0, 0, NOTHING
        for start, end in data_extents(fd, size):
            stored += end - start
            where = self._checksums.keyed_digest(self._key, where, _EXTENT.pack(start, end))[:DIGEST_SIZE]
            first, last = start // BLOCK_SIZE, -(-end // BLOCK_SIZE)
            if first > block:
                yield from runs.add(RunKind.ZEROS, first - block)
                block = first
            while block < last:
                self._cancel.check()
                count = min(WINDOW, last - block)
                yield from self._blocks(fd, block, count, size, runs)
                block += count
        if block < blocks:
            yield from runs.add(RunKind.ZEROS, blocks - block)
        yield from runs.flush()
        yield Holes(stored, where)

    def _blocks(self, fd: int, block: int, count: int, size: int, runs: _Runs) -> Iterator[Record]:
        offset = block * BLOCK_SIZE
        view = self._data[: min(count * BLOCK_SIZE, size - offset)]
        try:
            filled = _fill(fd, view, offset)
        except OSError as error:
            if error.errno not in UNREADABLE_ERRORS:
                raise
            filled = False
        if not filled:
            if count == 1:
                yield from runs.add(RunKind.UNREADABLE, 1)
                return
            for single in range(block, block + count):
                yield from self._blocks(fd, single, 1, size, runs)
            return
        self._checksums.digest_blocks_into(view, self._key, self._digests, self._zeros)
        for index in range(count):
            if self._zeros[index]:
                yield from runs.add(RunKind.ZEROS, 1)
            else:
                digest = bytes(self._digests[index * DIGEST_SIZE : (index + 1) * DIGEST_SIZE])
                yield from runs.add(RunKind.DATA, 1, digest)


class _Runs:
    """Gathers blocks into runs."""

    def __init__(self) -> None:
        self._kind = RunKind.ZEROS
        self._count = 0
        self._digests = bytearray()

    def add(self, kind: RunKind, count: int, digest: bytes = b"") -> Iterator[Run]:
        if self._count and (kind is not self._kind or self._count >= MAX_RUN):
            yield from self.flush()
        self._kind = kind
        self._count += count
        self._digests += digest

    def flush(self) -> Iterator[Run]:
        if self._count:
            yield Run(self._kind, self._count, bytes(self._digests))
        self._count = 0
        self._digests.clear()


def _fill(fd: int, view: memoryview, offset: int) -> bool:
    """Read all of it; False where the file ends before."""
    while view:
        count = os.preadv(fd, [view], offset)
        if not count:
            return False
        view, offset = view[count:], offset + count
    return True


def data_extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """Where a file has data, as (start, end) in bytes; all of it on a file system that does not say."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
            end = min(size, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            start, end = end, size  # where it cannot say, reading will
        if start >= size:
            return
        yield start, end
