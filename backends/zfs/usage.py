"""Who uses a dataset: whether anybody does by ZFS's own word, and who that is as far as Linux shows it.

ZFS knows of every use: a filesystem that is mounted, in whatever mount namespace, and a zvol whose device is open, by a
process, a mount, a device mapper target, an iSCSI target. It says so to whoever would roll the dataset back: a channel
program asks that without doing it (``zfs.check.rollback`` of zfs-program(8)), and runs as a part of a transaction
group, as only there ZFS looks (``dsl_dataset_handoff_check`` in ``dsl_dataset.c``). A zvol without a device
(``volmode=none``) is used by nobody, then. It takes root.

Without it there is what a user may see: mounts of this namespace, what the kernel has put upon the device
(``/sys/block/*/holders``), and processes of one's own.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from backends.zfs import devices
from backends.zfs.commands import CHANGE_DEADLINE, Finished, end
from backends.zfs.context import Context
from backends.zfs.listing import Dataset
from replicator.errors import StorageUnavailable, VolumeBusy

LET_GO_SECONDS = 5.0
"""In which who only looks in is gone again."""
UDEV_SECONDS = 60.0
"""The same for udev, which opens each device that has just changed; on a busy machine it takes its time."""
_UDEV = ("(udev-worker)", "systemd-udevd", "udevd")
"""Its processes, by their short names."""
_LOOK_AGAIN = 0.1
_ANSWER_AGAIN = 1.0
_MAX_NAMED = 3
_PROC = Path("/proc")
_BLOCK = Path("/sys/block")
_PROGRAM = b"""
args = ...
code = zfs.check.rollback(args["argv"][1])
if code ~= 0 then error("refused with " .. code) end
"""
_REFUSED = "refused with "
_BUSY = "16"
"""EBUSY, of asm-generic/errno-base.h."""
_ESCAPED = re.compile(r"\\([0-7]{3})")
"""How /proc/self/mountinfo shows a space, see proc_pid_mountinfo(5)."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo.

    :ivar device: ``MAJOR:MINOR`` of the block device
    :ivar source: of a ZFS filesystem the dataset
    """

    device: str
    place: str
    kind: str
    source: str


def check_idle(context: Context, label: str, dataset: Dataset) -> None:
    """:raises VolumeBusy: somebody uses it, also after a moment"""
    begun = time.monotonic()
    while in_use(context, dataset):
        users = users_of(dataset)
        passing = bool(users) and all(user.startswith(_UDEV) for user in users)
        if time.monotonic() - begun > (UDEV_SECONDS if passing else LET_GO_SECONDS):
            named = ", ".join(users) or "somebody who cannot be seen from here (another mount namespace?)"
            raise VolumeBusy(
                f"{label} is in use by {named}, so it cannot become a replica",
                hint="stop what uses it, then run it again",
            )
        time.sleep(_LOOK_AGAIN)


def in_use(context: Context, dataset: Dataset) -> bool:
    """Whether anybody uses it; where ZFS does not say, whether anybody is seen to."""
    done = _asked(context, dataset.name)
    if done.status == 0:
        return False
    said = done.errors.partition(_REFUSED)[2]
    if re.match(rf"{_BUSY}\b", said):
        return True
    return bool(users_of(dataset))


def _asked(context: Context, dataset: str) -> Finished:
    process = context.runner.write_to(("zfs", "program", context.names.pool, "-", dataset))
    try:
        with suppress(BrokenPipeError):  # its own words say why
            os.write(process.pipe, _PROGRAM)
        process.close_pipe()
        until = time.monotonic() + CHANGE_DEADLINE
        while time.monotonic() < until:
            done = process.finish(_ANSWER_AGAIN)
            if done is not None:
                return done
            process.check()
    finally:
        end(process)
    raise StorageUnavailable(f"ZFS does not say whether {dataset} is in use", hint="see `zpool status`")


# -- who that is


def mounts() -> list[Mount]:
    """Those of this process's namespace; none where it may not look."""
    found = []
    with suppress(OSError):
        for line in (_PROC / "self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            before, _, behind = line.partition(" - ")
            fields, rest = before.split(" "), behind.split(" ")
            if len(fields) > 4 and len(rest) > 1:
                found.append(Mount(fields[2], _plain(fields[4]), rest[0], _plain(rest[1])))
    return found


def _plain(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), text)


def below(dataset: str) -> str:
    """A dataset below this one that is mounted in a folder of it, "" if there is none."""
    seen = mounts()
    places = [mount.place for mount in seen if mount.kind == "zfs" and mount.source == dataset]
    folders = tuple(f"{place.rstrip('/')}/" for place in places)
    others = (mount for mount in seen if mount.kind == "zfs" and mount.source.startswith(f"{dataset}/"))
    return next((mount.source for mount in others if mount.place.startswith(folders)), "")


def users_of(dataset: Dataset) -> tuple[str, ...]:
    """Mounts, devices and processes that use it; a few of them: ``/srv``, ``dm-3``, ``qemu-system-x86 (4711)``."""
    found: list[str] = []
    for user in _of_zvol(dataset.name) if dataset.is_zvol else _of_filesystem(dataset.name):
        found.append(user)
        if len(found) == _MAX_NAMED:
            break
    return tuple(found)


def _of_filesystem(dataset: str) -> Iterator[str]:
    places = [mount.place for mount in mounts() if mount.kind == "zfs" and mount.source == dataset]
    yield from (f"a mount at {place}" for place in places)
    ours: set[int] = set()
    for place in places:
        with suppress(OSError):
            ours.add(Path(place).stat().st_dev)
    yield from _processes(lambda status: status.st_dev in ours)


def _of_zvol(zvol: str) -> Iterator[str]:
    name = devices.name_of(zvol)
    if not name:
        return
    parts = [_BLOCK / name, *(_BLOCK / name).glob(f"{name}p*")]
    numbers = set()
    for part in parts:
        with suppress(OSError):
            numbers.add((part / "dev").read_text().strip())
        with suppress(OSError):
            yield from sorted(holder.name for holder in (part / "holders").iterdir())
    yield from (f"a mount at {mount.place}" for mount in mounts() if mount.device in numbers)

    def is_it(status: os.stat_result) -> bool:
        return bool(status.st_rdev) and f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}" in numbers

    yield from _processes(is_it)


def _processes(wanted: Callable[[os.stat_result], bool]) -> Iterator[str]:
    """Those that have something of it open, or are in a folder of it; this one left out."""
    for process in _PROC.iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with suppress(OSError):  # it ended, or is not ours to look at
            if any(_is(entry, wanted) for entry in (process / "cwd", *(process / "fd").iterdir())):
                name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                yield f"{name} ({process.name})"


def _is(entry: Path, wanted: Callable[[os.stat_result], bool]) -> bool:
    with suppress(OSError):
        return wanted(entry.stat())
    return False
