"""System calls of Linux that Python has no function for.

Numbers and layouts are those of ``linux/fs.h``, ``linux/fiemap.h``, ``linux/falloc.h`` and ``linux/magic.h``.
Everything raises :class:`OSError`; nothing here knows what an image is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from functools import cache
from typing import NamedTuple

FICLONE = 0x40049409
FS_IOC_FIEMAP = 0xC020660B
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602
FS_NOCOW_FL = 0x00800000

FIEMAP_FLAG_SYNC = 0x0001
FIEMAP_EXTENT_LAST = 0x0001
FIEMAP_EXTENT_UNKNOWN = 0x0002
FIEMAP_EXTENT_DELALLOC = 0x0004
FIEMAP_EXTENT_UNWRITTEN = 0x0800
FIEMAP_EXTENT_MERGED = 0x1000
FIEMAP_EXTENT_SHARED = 0x2000

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_RENAME_NOREPLACE = 0x1
_RENAME_EXCHANGE = 0x2
_AT_FDCWD = -100

_FIEMAP_HEADER = struct.Struct("=QQIIII")
_FIEMAP_EXTENT = struct.Struct("=QQQ16xI12x")

_FILE_SYSTEMS = {
    0xEF53: "ext4",
    0x58465342: "XFS",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x2FC12FC1: "ZFS",
    0x6969: "NFS",
    0xCA451A4E: "bcachefs",
    0xF2F52010: "F2FS",
    0x794C7630: "overlayfs",
    0x7461636F: "OCFS2",
    0x00C36400: "CephFS",
    0x65735546: "FUSE",
}


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    libc.renameat2.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    libc.fstatfs.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return libc


def _raise(path: str | None = None) -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)


def clone(target: int, source: int) -> None:
    """Make the file ``target`` share all blocks of ``source`` (FICLONE, ioctl_ficlone(2)); both are descriptors.

    :raises OSError: EOPNOTSUPP, EXDEV, EINVAL … where that cannot be; see :func:`cannot_clone`
    """
    fcntl.ioctl(target, FICLONE, source)


def cannot_clone(error: OSError) -> bool:
    """Whether the error says that these two files cannot share blocks, rather than that something failed."""
    return error.errno in (
        errno.EOPNOTSUPP,
        errno.EXDEV,
        errno.EINVAL,
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EISDIR,
        errno.ETXTBSY,
        errno.EPERM,
    )


def copy_nocow(target: int, source: int) -> None:
    """Give the empty file ``target`` the no-copy-on-write flag of ``source``: btrfs clones only between files of like
    flags, and virtual machines' images often have it."""
    flags = bytearray(8)
    try:
        fcntl.ioctl(source, FS_IOC_GETFLAGS, flags, True)
        if not int.from_bytes(flags[:4], "little") & FS_NOCOW_FL:
            return
        fcntl.ioctl(target, FS_IOC_GETFLAGS, flags, True)
        wanted = int.from_bytes(flags[:4], "little") | FS_NOCOW_FL
        fcntl.ioctl(target, FS_IOC_SETFLAGS, wanted.to_bytes(8, "little"))
    except OSError as error:
        if error.errno not in (errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
            raise


def punch(fd: int, offset: int, length: int) -> None:
    """Make a range of a file a hole; its size stays. (fallocate(2), FALLOC_FL_PUNCH_HOLE)"""
    mode = _FALLOC_FL_KEEP_SIZE | _FALLOC_FL_PUNCH_HOLE
    while _libc().fallocate(fd, mode, offset, length) != 0:
        if ctypes.get_errno() != errno.EINTR:
            _raise()


def _renameat2(old: str, new: str, flags: int) -> None:
    if _libc().renameat2(_AT_FDCWD, os.fsencode(old), _AT_FDCWD, os.fsencode(new), flags) != 0:
        _raise(new)


def rename_noreplace(old: str, new: str) -> None:
    """Rename; FileExistsError if ``new`` exists."""
    _renameat2(old, new, _RENAME_NOREPLACE)


def exchange(one: str, other: str) -> None:
    """Exchange what two names mean, in one step (renameat2(2), RENAME_EXCHANGE)."""
    _renameat2(one, other, _RENAME_EXCHANGE)


class Mapped(NamedTuple):
    """One extent of a file: ``length`` bytes from ``logical`` lie at ``physical`` of the file system.

    A tuple, because a badly fragmented image has millions of them to be compared.
    """

    logical: int
    physical: int
    length: int
    flags: int

    @property
    def end(self) -> int:
        """First byte after it, in the file."""
        return self.logical + self.length


def fiemap(fd: int, start: int, length: int, limit: int) -> list[Mapped]:
    """At most ``limit`` extents of a file that touch ``length`` bytes from ``start``, ascending, what is in memory
    written out first. (Documentation/filesystems/fiemap.rst)

    :raises OSError: EOPNOTSUPP where the file system cannot say
    """
    buffer = bytearray(_FIEMAP_HEADER.size + limit * _FIEMAP_EXTENT.size)
    _FIEMAP_HEADER.pack_into(buffer, 0, start, length, FIEMAP_FLAG_SYNC, 0, limit, 0)
    fcntl.ioctl(fd, FS_IOC_FIEMAP, buffer, True)
    count: int = _FIEMAP_HEADER.unpack_from(buffer)[3]
    end = _FIEMAP_HEADER.size + count * _FIEMAP_EXTENT.size
    return list(map(Mapped._make, _FIEMAP_EXTENT.iter_unpack(memoryview(buffer)[_FIEMAP_HEADER.size : end])))


def file_system(fd: int) -> str:
    """The kind of file system a descriptor is on, as people call it."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs is 120 bytes; its first word is f_type
    if _libc().fstatfs(fd, buffer) != 0:
        _raise()
    kind = int.from_bytes(buffer.raw[: struct.calcsize("l")], "little") & 0xFFFFFFFF
    return _FILE_SYSTEMS.get(kind, f"file system 0x{kind:x}")
