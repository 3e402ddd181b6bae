"""Clones of snapshots that are there only while somebody reads from them.

A clone is named after its dataset, with :data:`MARK`, the process that made it and a random word, and is no volume. One
that a killed process left behind is destroyed by the next who makes one of that dataset; those of processes that live
are theirs, also before their devices are open, which makes them busy.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure, is_missing, says
from backends.zfs.naming import MAX_DATASET
from replicator.errors import NotReadable
from replicator.model import Version

MARK = ".replicator-verify-"
"""In the name of a clone that is read from."""
PERMISSION = (
    "run replicator as root, or give its user `zfs allow USER clone,create,destroy,mount,acltype,canmount,readonly,"
    "snapdev,volmode` and the right to read /dev/zd* (group disk)"
)
ZVOL = ("-o", "readonly=on", "-o", "volmode=dev", "-o", "snapdev=hidden")
FILESYSTEM = ("-o", "readonly=on", "-o", "canmount=off", "-o", "acltype=posix")
"""With this the access control lists that are stored are shown."""
DESTROY_DEADLINE = 30.0
"""Seconds in which udev lets go of a clone's device."""
_LOOK_AGAIN = 0.05

log = logging.getLogger(__name__)


def is_temporary(volume: str) -> bool:
    """Whether this is the name of a clone that is read from."""
    return MARK in volume


@contextmanager
def temporary(context: Context, dataset: str, version: Version, settings: tuple[str, ...]) -> Iterator[str]:
    """A clone of a snapshot, by name.

    :param settings: :data:`ZVOL` or :data:`FILESYSTEM`
    :raises NotReadable: no permission to clone
    """
    discard_leftovers(context, dataset)
    clone = f"{dataset}{MARK}{owner(os.getpid())}-{secrets.token_hex(2)}"
    if len(clone) > MAX_DATASET:
        raise NotReadable(f"{dataset} has too long a name to be cloned for reading", hint="rename it")
    done = context.attempt("zfs", "clone", *settings, f"{dataset}@{version.name}", clone)
    if done.status != 0:
        error = failure(done, Operation(context.storage, f"{dataset}@{version.name}", "cloning for reading"))
        if says(done, "permission denied"):
            raise NotReadable(str(error), hint=PERMISSION)
        raise error
    try:
        yield clone
    finally:
        if not _destroy(context, clone):
            log.warning("%s, which was made for reading, is still busy; the next verification removes it", clone)


def owner(pid: int) -> str:
    """What tells a process from all others of this node since it was booted: its number, and when it began (field 22 of
    proc_pid_stat(5)); "" where there is none of that number."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{pid:x}.{int(fields[19]):x}"


def _is_living(word: str) -> bool:
    """Whether what is behind :data:`MARK` names a process that there is."""
    name = word.partition("-")[0]
    try:
        pid = int(name.partition(".")[0], 16)
    except ValueError:
        return False
    return owner(pid) == name


def discard_leftovers(context: Context, dataset: str) -> None:
    """Destroy clones that were left behind."""
    parent = dataset.rpartition("/")[0]
    listed = context.attempt("zfs", "list", "-H", "-d", "1", "-t", "filesystem,volume", "-o", "name", parent)
    for name in listed.output.split("\n") if listed.status == 0 else ():
        if name.startswith(f"{dataset}{MARK}") and not _is_living(name.removeprefix(f"{dataset}{MARK}")):
            context.attempt("zfs", "destroy", name)


def _destroy(context: Context, clone: str) -> bool:
    until = time.monotonic() + DESTROY_DEADLINE
    while True:
        done = context.attempt("zfs", "destroy", clone)
        if done.status == 0 or is_missing(done):
            return True
        if time.monotonic() > until:
            return False
        time.sleep(_LOOK_AGAIN)
