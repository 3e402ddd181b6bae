"""Calls libzfs_core for the process that started it: a JSON line in, a JSON line out, until its input ends.

It is a program of its own (``binding.py`` says why) and imports nothing of ours, so that it starts fast. Its first
line tells the version of the binding, or why there is none. Then, for each request ``{"call": NAME, ...}``:

``{"done": VALUE}``, or ``{"failed": [[NAME, ERRNO, WORDS], ...]}`` with the names that failed and what libzfs_core and
the system say of each.

Names are ASCII (zfs_namecheck.c allows nothing else). In libzfs_core's own listings of missing things nothing is an
error: a hold of a snapshot that is gone is, and is told as ENOENT here.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

Failures = list[tuple[str, int, str]]


def names(listed: Any) -> list[bytes]:
    """Texts as libzfs_core takes them."""
    return [str(name).encode("ascii") for name in listed]


def calls(core: Any) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """What can be asked for."""

    def hold(asked: dict[str, Any]) -> None:
        (snapshot,) = names([asked["snapshot"]])
        if core.lzc_hold({snapshot: asked["tag"].encode("ascii")}):
            raise LookupError(snapshot.decode("ascii"))

    def release(asked: dict[str, Any]) -> None:
        (snapshot,) = names([asked["snapshot"]])
        core.lzc_release({snapshot: names([asked["tag"]])})

    def bookmark(asked: dict[str, Any]) -> None:
        snapshot, mark = names([asked["snapshot"], asked["bookmark"]])
        core.lzc_bookmark({mark: snapshot})

    def send_space(asked: dict[str, Any]) -> int:
        base = names([asked["base"]])[0] if asked["base"] else None
        return int(core.lzc_send_space(names([asked["snapshot"]])[0], base, asked["flags"]))

    return {
        "exists": lambda asked: bool(core.lzc_exists(names([asked["dataset"]])[0])),
        "snapshot": lambda asked: core.lzc_snapshot(names(asked["names"])),
        "destroy_snapshots": lambda asked: core.lzc_destroy_snaps(names(asked["names"]), False),
        "destroy_bookmarks": lambda asked: core.lzc_destroy_bookmarks(names(asked["names"])),
        "bookmark": bookmark,
        "hold": hold,
        "release": release,
        "send_space": send_space,
    }


def failures(error: Any) -> Failures:
    """An exception of libzfs_core as what failed with which errno, and its words."""
    found = []
    for each in getattr(error, "errors", None) or [error]:
        number, name, message = each.errno or 0, getattr(each, "name", None), each.message
        if type(each).__name__ == "ZFSGenericError":  # made with its name and message in each other's place
            name, message = message, name
        if type(each).__name__ == "SnapshotIsHeld":  # or in use: ZFS has one number for both
            message = "Snapshot is busy"
        shown = name.decode("ascii", "replace") if isinstance(name, bytes) else ""
        said = message.decode("utf-8", "replace") if isinstance(message, bytes) else str(message)
        found.append((shown, number, f"{said}: {os.strerror(number)}" if 0 < number < 200 else said))
    return found


def main() -> int:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no answer

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        import libzfs_core as core

        found = version("pyzfs")
    except (ImportError, OSError, PackageNotFoundError) as error:
        answer({"unusable": f"{type(error).__name__}: {error}"})
        return 1
    answer({"version": found})
    known = calls(core)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer({"done": known[asked["call"]](asked)})
        except core.exceptions.ZFSError as error:
            answer({"failed": failures(error)})
        except LookupError as error:
            answer({"failed": [(str(error.args[0]), errno.ENOENT, "Snapshot not found: " + os.strerror(errno.ENOENT))]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
