"""Opens a filesystem or a snapshot of one for reading, without mounting it anywhere.

The mount system calls of Linux 5.2 (``fsopen``, ``fsconfig``, ``fsmount``; numbers of ``asm-generic/unistd.h``) make a
mount that is in no folder and no namespace: only who has its file descriptor can look into it, and with the last one
closed it is gone, whatever becomes of this process.

Extended attributes are asked for whatever the dataset's property ``xattr`` says: a replica need not have the properties
of its source, and what is stored is to be compared, not what is shown. For access control lists ZFS has no such option:
they are shown where the property ``acltype`` says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from replicator.errors import DamagedData, NoSuchSnapshot, NotReadable, ReplicatorError, StorageError

_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE = 0, 1, 6
_READ_ONLY_AND_INERT = 0x1 | 0x2 | 0x4 | 0x8 | 0x10
"""MOUNT_ATTR_ RDONLY, NOSUID, NODEV, NOEXEC, NOATIME of linux/mount.h."""
_OPTIONS = (b"ro", b"xattr")
_ACL = "system.posix_acl_access"


@contextmanager
def opened(snapshot: str) -> Iterator[int]:
    """The root folder of a snapshot, a file descriptor.

    :param snapshot: ``DATASET@SNAPSHOT``, or a dataset
    :raises NotReadable: no permission to mount, or a kernel that cannot
    """
    try:
        mount = _mount(snapshot)
    except OSError as error:
        raise _error(snapshot, error) from error
    try:
        root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
        try:
            yield root
        finally:
            os.close(root)
    finally:
        os.close(mount)


def _mount(snapshot: str) -> int:
    context = _call(_FSOPEN, b"zfs", _CLOEXEC)
    try:
        _call(_FSCONFIG, context, _SET_STRING, b"source", snapshot.encode(), 0)
        for option in _OPTIONS:
            _call(_FSCONFIG, context, _SET_FLAG, option, None, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, _READ_ONLY_AND_INERT)
    finally:
        os.close(context)


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    return libc


def _call(number: int, *arguments: int | bytes | None) -> int:
    """A system call. :raises OSError: it failed"""
    words = [ctypes.c_long(item) if isinstance(item, int) else ctypes.c_char_p(item) for item in arguments]
    result = int(_libc().syscall(ctypes.c_long(number), *words))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def shows_acls(root: int) -> bool:
    """Whether access control lists are shown. (A snapshot that is mounted already, by a look into .zfs/snapshot, keeps
    the options that it has there.)"""
    try:
        os.getxattr(root, _ACL)
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def _error(snapshot: str, error: OSError) -> ReplicatorError:
    what = f"{snapshot} cannot be mounted for reading: {error.strerror}"
    match error.errno:
        case errno.EPERM | errno.EACCES:
            return NotReadable(what, hint="run replicator as root, or with CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH")
        case errno.ENOSYS:
            return NotReadable(what, hint="this takes Linux 5.2 or newer")
        case errno.ENODEV:
            return StorageError(what, hint="load the kernel module: modprobe zfs")
        case errno.ENOENT:
            return NoSuchSnapshot(what, hint="")
        case errno.EIO:
            return DamagedData(what, hint="see `zpool status -v`, and scrub the pool")
        case _:
            return StorageError(what, hint="see the kernel's log (dmesg)")
