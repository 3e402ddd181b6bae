"""What an operating system's error means for the operator."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replicator.errors import DamagedData, NoSpace, StorageError, StorageUnavailable
from replicator.units import format_size


@contextmanager
def storage_errors(storage: str, root: Path, doing: str, *, need: int | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a StorageError that names the storage, what was done, and the way out.

    :param need: bytes that the work needs, named when the storage is full
    """
    try:
        yield
    except OSError as error:
        raise translate(error, storage, root, doing, need) from error


def translate(error: OSError, storage: str, root: Path, doing: str, need: int | None = None) -> StorageError:
    """The StorageError for an OSError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(error, storage, root, doing, need)
    reason = error.strerror or str(error)
    if error.errno in (errno.EIO, errno.EBADMSG, errno.EUCLEAN, errno.EREMOTEIO):
        return DamagedData(
            f"storage {storage}: {doing} failed: {reason} (the disk or file system reports damage)",
            hint=f"look into the kernel's log (dmesg) for {root}, check its disks, then `replicator resync`",
        )
    if error.errno in (errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN, errno.ENODEV, errno.ENXIO) or not root.is_dir():
        return unavailable(storage, root, reason)
    remedies = {
        errno.EROFS: f"mount {root} writable",
        errno.EACCES: f"give the user that runs replicator access to {root}",
        errno.EPERM: f"give the user that runs replicator access to {root}",
        errno.EMFILE: "raise the limit of open files of the service (LimitNOFILE=)",
        errno.EFBIG: "the file system cannot hold a file of this size; choose another",
    }
    where = f" ({error.filename})" if error.filename else ""
    return StorageError(
        f"storage {storage}: {doing} failed: {reason}{where}",
        hint=remedies.get(error.errno or 0, f"see the kernel's log (dmesg) and the permissions below {root}"),
    )


def unavailable(storage: str, root: Path, reason: str) -> StorageUnavailable:
    """The storage's directory is not there now."""
    return StorageUnavailable(
        f"storage {storage}: directory {root} is not there: {reason}",
        hint=f"mount it, make it, or correct path in [storage.{storage}]",
    )


def _full(error: OSError, storage: str, root: Path, doing: str, need: int | None) -> NoSpace:
    what = "over its quota" if error.errno == errno.EDQUOT else "full"
    try:
        status = os.statvfs(root)
        free = f": {format_size(status.f_bavail * status.f_frsize)} free"
    except OSError:
        free = ""
    needed = f", {format_size(need)} needed" if need is not None else ""
    return NoSpace(
        f"storage {storage} ({root}) is {what}{free}{needed}; {doing} stopped",
        hint="make room there, keep fewer snapshots (keep = …, `replicator prune`) or enlarge it; "
        "what was received so far is kept",
    )
