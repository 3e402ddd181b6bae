"""The block devices of zvols: opens a snapshot of one for reading, through a clone that is there only meanwhile; and
has a change of ``readonly`` reach the device.

Not through ``snapdev=visible``: that would make a device of every snapshot of the zvol, and change a property that is
the operator's.

The device of a zvol is found by asking each one whose it is (``BLKZNAME``, ``include/sys/fs/zfs.h`` of OpenZFS), first
where udev puts it, then among those that have appeared in ``/sys/block`` since: there may be no udev, and a late event
of the clone before makes it remove the link of this one.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from backends.zfs import clones
from backends.zfs.context import Context
from replicator.cancellation import Cancellation
from replicator.errors import NotReadable, StorageUnavailable
from replicator.model import Version

DEVICE_DEADLINE = 60.0
"""Seconds until a clone has its device."""
_UNSEEN_SECONDS = 5.0
"""For which a device that may not be opened may take to say what its zvol says."""
_LOOK_AGAIN = 0.05
_BLKZNAME = 2 << 30 | 256 << 16 | 0x12 << 8 | 125
_DEVICES = Path("/dev")
_BLOCK_DEVICES = Path("/sys/block")


@contextmanager
def opened(context: Context, dataset: str, version: Version, cancel: Cancellation) -> Iterator[int]:
    """The content of a zvol's snapshot, a file descriptor.

    :raises NotReadable: no permission to clone, or to read the device
    :raises StorageUnavailable: the device did not appear
    """
    known = _devices()
    with clones.temporary(context, dataset, version, clones.ZVOL) as clone:
        device = _wait_for(clone, known, cancel)
        try:
            yield device
        finally:
            os.close(device)


def _devices() -> frozenset[tuple[str, str]]:
    """The zvols' devices: name and what tells it from an earlier one of that name (``diskseq``, Linux 5.15)."""
    found = set()
    with suppress(OSError):
        for place in _BLOCK_DEVICES.iterdir():
            if place.name.startswith("zd"):
                with suppress(OSError):  # it is just going
                    sequence = place / "diskseq"
                    unique = sequence.read_text() if sequence.exists() else str(place.stat().st_ino)
                    found.add((place.name, unique))
    return frozenset(found)


def _wait_for(zvol: str, known: frozenset[tuple[str, str]], cancel: Cancellation) -> int:
    until = time.monotonic() + DEVICE_DEADLINE
    link = _link(zvol)
    while True:
        for path in (link, *(_DEVICES / name for name, _ in sorted(_devices() - known))):
            device = _open_if(path, zvol)
            if device is not None:
                return device
        cancel.check()
        if time.monotonic() > until:
            raise StorageUnavailable(
                f"no device of the zvol {zvol} appeared within {DEVICE_DEADLINE:.0f} s",
                hint="see the kernel's log (dmesg), and whether /dev is a devtmpfs",
            )
        cancel.wait(_LOOK_AGAIN)


def _link(zvol: str) -> Path:
    return _DEVICES / "zvol" / zvol.replace(" ", "+")  # what zvol_id of OpenZFS makes of a space


def _open_if(path: Path, zvol: str) -> int | None:
    """Open a device if it is that of the zvol."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise NotReadable(f"{path} cannot be read: {error.strerror}", hint=clones.PERMISSION) from error
        return None  # not there yet, or not ready
    name = bytearray(256)
    try:
        fcntl.ioctl(fd, _BLKZNAME, name)
    except OSError:
        os.close(fd)
        return None
    if bytes(name).partition(b"\0")[0] == zvol.encode():
        return fd
    os.close(fd)
    return None


# -- readonly


def name_of(zvol: str) -> str:
    """The name of a zvol's device in /sys/block, "" where it has none (``volmode=none``), or none that is found."""
    link = _link(zvol)
    linked = [link.resolve().name] if link.is_symlink() else []
    for name in (*linked, *(name for name, _ in sorted(_devices()) if name not in linked)):
        try:
            device = _open_if(_DEVICES / name, zvol)
        except NotReadable:  # then udev's word has to do
            if name in linked:
                return name
            continue
        if device is not None:
            os.close(device)
            return name
    return ""


def settle(zvol: str, *, read_only: bool) -> bool:
    """Wait until the device is read-only, or writable, as ``zfs set readonly`` has said; whether it is.

    OpenZFS 2.3 does that a moment after the command has returned, also to those who have the device open. 2.1 does it
    when the device is opened and nobody has it open, so it is opened here; who has it open keeps what he has. Where
    there is no device, whoever makes it appear gets what the zvol says.
    """
    begun = time.monotonic()
    while True:
        name = name_of(zvol)
        if not name:
            return True
        opened = False
        with suppress(OSError):
            os.close(os.open(_DEVICES / name, os.O_RDONLY | os.O_CLOEXEC))
            opened = True
        with suppress(OSError):
            if ((_BLOCK_DEVICES / name / "ro").read_text().strip() == "1") is read_only:
                return True
        waited = time.monotonic() - begun
        if not opened and waited > _UNSEEN_SECONDS:
            return True  # nobody has it open, so 2.1 does it for the next one
        if waited > DEVICE_DEADLINE:
            return False
        time.sleep(_LOOK_AGAIN)
