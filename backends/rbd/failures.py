"""What an error of librados or librbd means for the operator."""

from __future__ import annotations

import errno
import os

from replicator.errors import (
    DamagedData,
    NoSpace,
    NoSuchVolume,
    StorageError,
    StorageUnavailable,
    Unsupported,
    VolumeBusy,
)

LOST = frozenset({errno.ESHUTDOWN, errno.ETIMEDOUT, errno.ENOTCONN, errno.ECONNRESET})
"""Errors after which a connection is not used again."""
DENIED = frozenset({errno.EPERM, errno.EACCES})
"""Errors of a user who may not do that. A connection keeps the capabilities that its user had when it was made, for up
to an hour: so it is not used again either, and the next one has new ones."""


def number(error: BaseException) -> int:
    """The errno of an error of the binding, 0 where it has none."""
    found = getattr(error, "errno", None)
    return abs(found) if isinstance(found, int) else 0


def why(code: int) -> str:
    """What an errno of an operation means, in words."""
    meanings = {
        errno.ESHUTDOWN: "Ceph has blocklisted this connection",
        errno.ETIMEDOUT: "the OSDs did not answer in time",
        errno.EPERM: "the cephx user may not do that",
    }
    return meanings.get(code) or os.strerror(code)


def translate(error: Exception, storage: str, cluster: str, doing: str) -> StorageError:
    """The StorageError for an error of the binding.

    :param cluster: pool and user, as people know them
    :param doing: with the volume
    """
    code = number(error)
    reason = str(error) or os.strerror(code)
    said = f"storage {storage} ({cluster}): {doing} failed: {reason}"
    if code == errno.ESHUTDOWN:
        return StorageUnavailable(
            f"{said}; Ceph has blocklisted this connection",
            hint="the next run makes a new one; `ceph osd blocklist ls` shows for how long, and another client that "
            "took the image's lock is the usual cause",
        )
    if code in LOST:
        return StorageUnavailable(said, hint="see `ceph -s` for monitors or OSDs that are down; it is tried again")
    if code in (errno.ENOSPC, errno.EDQUOT):
        what = "the pool's quota is reached" if code == errno.EDQUOT else "the cluster is full"
        return NoSpace(
            f"{said} ({what})",
            hint="see `ceph df` and `ceph osd pool get-quota`; make room, keep fewer snapshots (keep = …) or add OSDs; "
            "what was received so far is kept",
        )
    if code in DENIED:
        return StorageError(
            f"{said}: the cephx user may not do that",
            hint="give it `mon 'profile rbd' osd 'profile rbd pool=POOL'` with `ceph auth caps`; see Ceph RBD in the "
            "README for what a source alone needs",
        )
    if code == errno.EROFS:
        return VolumeBusy(
            f"{said}: another client has the image's exclusive lock",
            hint="`rbd lock ls` and `rbd status` show who; stop it, then run it again",
        )
    if code == errno.EBUSY:
        return VolumeBusy(f"{said}: it is in use", hint="`rbd status` and `rbd children` show by whom")
    if code == errno.ENOENT:
        return NoSuchVolume(f"{said}: it is not there (any more)", hint="`rbd ls` and `rbd snap ls` show what there is")
    if code in (errno.EIO, errno.EBADMSG):
        return DamagedData(said, hint="see `ceph health detail` for inconsistent objects, then `replicator resync`")
    if code in (errno.EOPNOTSUPP, errno.ENOSYS, errno.ENAMETOOLONG, errno.EINVAL, errno.EDOM):
        return Unsupported(said, hint="see the image's features with `rbd info`, and the length of its name")
    return StorageError(said, hint="see `ceph -s` and `rbd info` of the image")


def not_connected(error: Exception, storage: str, cluster: str, conffile: str, keyring: str) -> StorageError:
    """The StorageError for a connection that could not be made."""
    code = number(error)
    said = f"storage {storage} ({cluster}) cannot be reached: {str(error) or type(error).__name__}"
    if code in DENIED:
        return StorageError(
            f"{said}: the cluster refuses the user's key",
            hint=f"compare it with `ceph auth get`; it is read from {keyring}",
        )
    if code == errno.ENOENT or not os.access(conffile, os.R_OK):
        return StorageUnavailable(
            f"{said}: the configuration, the keyring, the user or the pool is not there",
            hint=f"check {conffile} and {keyring} (readable by the user that runs replicator), and `ceph osd pool ls`",
        )
    return StorageUnavailable(said, hint=f"see `ceph -s`, and the mon_host of {conffile}")
