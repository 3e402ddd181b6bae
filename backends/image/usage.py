"""Who has an image open: best effort, as far as this user may look.

Root sees every process of the machine and every loop device; another user sees its own. A container's or another
host's use of a shared file system is not seen, so what is found is a reason to refuse, and nothing found is no proof.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_MAX_NAMED = 3
_PROC = Path("/proc")
_BLOCK = Path("/sys/block")


def users_of(fd: int) -> tuple[str, ...]:
    """Processes and loop devices that have the file behind ``fd`` open, this process left out; a few of them named,
    for example ``qemu-system-x86 (4711)`` or ``/dev/loop3``."""
    status = os.fstat(fd)
    found: list[str] = []
    for user in (*_loops(status), *_processes(status)):
        found.append(user)
        if len(found) == _MAX_NAMED:
            break
    return tuple(found)


def _loops(wanted: os.stat_result) -> Iterator[str]:
    """Loop devices over the file: the kernel has it open, so no process shows it."""
    for device in _BLOCK.glob("loop*/loop/backing_file"):
        with suppress(OSError):
            backing = Path(device.read_text(encoding="utf-8", errors="surrogateescape").rstrip("\n"))
            if os.path.samestat(backing.stat(), wanted):
                yield f"/dev/{device.parents[1].name}"


def _processes(wanted: os.stat_result) -> Iterator[str]:
    for process in _PROC.iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with suppress(OSError):  # it ended, or is not ours to look at
            if any(_is_same(entry, wanted) for entry in (process / "fd").iterdir()):
                name = (process / "comm").read_text(encoding="utf-8", errors="replace").strip()
                yield f"{name} ({process.name})"


def _is_same(entry: Path, wanted: os.stat_result) -> bool:
    with suppress(OSError):
        return os.path.samestat(entry.stat(), wanted)
    return False
