"""What snapshots below a dataset hold: ``python -m tests.lab.contents tank/root [SNAPSHOT]``, in a guest, as JSON.

Written without the product, from the zfs command and plain files: it is what the product's copies are compared with.
The JSON has for each snapshot ``[GUID, digest]``, by the snapshot's name below the root; all of them, or those of one
name.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PIECE = 1 << 20
DEVICE_SECONDS = 60.0
Contents = dict[str, tuple[str, str]]


def _zfs(*arguments: str) -> list[list[str]]:
    done = subprocess.run(["zfs", *arguments], stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return [line.split("\t") for line in done.stdout.splitlines()]


def _pour(path: Path, digest: Any) -> None:
    with Path(path).open("rb", buffering=0) as file:
        while piece := file.read(PIECE):
            digest.update(piece)


def of_volume(snapshot: str) -> str:
    """Digest of a zvol's snapshot, read through its device."""
    device = Path("/dev/zvol", snapshot.replace(" ", "+"))
    deadline = time.monotonic() + DEVICE_SECONDS
    while not device.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{device} did not appear")
        time.sleep(0.1)
    digest = hashlib.sha256()
    _pour(device, digest)
    return digest.hexdigest()


def of_filesystem(snapshot: str) -> str:
    """Digest of a file system's snapshot: every entry with its attributes and content, in order."""
    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "zfs", "-o", "ro", snapshot, folder], check=True, timeout=60)
        try:
            for place, folders, files in os.walk(folder):
                folders.sort()
                for name in sorted([*folders, *files]):
                    _entry(Path(place, name), Path(folder), digest)
        finally:
            subprocess.run(["umount", folder], check=True, timeout=60)
    return digest.hexdigest()


def _entry(path: Path, root: Path, digest: Any) -> None:
    facts = path.lstat()
    record = [str(path.relative_to(root)), facts.st_mode, facts.st_uid, facts.st_gid, facts.st_mtime_ns]
    if stat.S_ISREG(facts.st_mode):
        record.append(facts.st_size)
    if stat.S_ISLNK(facts.st_mode):
        record.append(str(path.readlink()))
    else:
        record += [f"{name}={os.getxattr(path, name)!r}" for name in sorted(os.listxattr(path))]
    digest.update(repr(record).encode())
    if stat.S_ISREG(facts.st_mode):
        _pour(path, digest)


def below(root: str, only: str = "") -> Contents:
    """Every snapshot below a dataset, without the dataset's own; of ``only`` that name if there is one."""
    found: Contents = {}
    for name, kind in _zfs("list", "-Hpo", "name,type", "-r", "-t", "filesystem,volume", root):
        if kind == "volume":
            _zfs("set", "snapdev=visible", name)
        for snapshot, guid in _zfs("list", "-Hpo", "name,guid", "-t", "snapshot", "-d", "1", name):
            if name != root and only in ("", snapshot.partition("@")[2]):
                content = of_volume(snapshot) if kind == "volume" else of_filesystem(snapshot)
                found[snapshot.removeprefix(root + "/")] = guid, content
    return found


if __name__ == "__main__":
    print(json.dumps(below(*sys.argv[1:])))  # noqa: T201
