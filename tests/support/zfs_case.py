"""A ZFS storage for the conformance suites, in a machine that has ZFS and a pool to spare (a guest of tests/lab)."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backends.zfs import ZfsBackend
from backends.zfs.binding import LibraryChoice, installed
from backends.zfs.commands import Runner, SystemRunner
from backends.zfs.pool_state import PoolState
from backends.zfs.properties import PLACEHOLDER
from backends.zfs.taking_over import Terms
from backends.zfs.workers import Workers
from replicator.model import Version, VersionKind, VersionRef
from tests.support.cases import BackendCase
from transport import checksum

POOL = "tank"
_NUMBERS = itertools.count()
_DEVICE_DEADLINE = 60.0
_BLOCK = 4096
"""Bytes of a zvol's blocks in tests: small, so that their volumes may be."""


def zfs(*arguments: str) -> str:
    """Run zfs. :raises CalledProcessError: it failed"""
    done = subprocess.run(["zfs", *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, (arguments, done.stderr)
    return done.stdout


def device(dataset: str) -> Path:
    """The device of a zvol, once udev has made it."""
    path = Path("/dev/zvol", dataset.replace(" ", "+"))
    until = time.monotonic() + _DEVICE_DEADLINE
    while not path.exists():
        assert time.monotonic() < until, f"{path} did not appear"
        time.sleep(0.02)
    return path


def _open_writable(path: Path) -> int:
    """Open a zvol's device; OpenZFS 2.3 makes it writable a moment after ``zfs set readonly=off`` has returned."""
    until = time.monotonic() + _DEVICE_DEADLINE
    while True:
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EROFS or time.monotonic() > until:
                raise
        time.sleep(0.02)


class _Kept:
    """Processes that call libzfs_core, for one storage after the other: to start one takes longer than most tests."""

    def __init__(self) -> None:
        self._workers = Workers(PoolState(POOL))

    def ask(self, request: dict[str, Any], deadline: float) -> dict[str, Any]:
        return self._workers.ask(request, deadline)

    def close(self) -> None:
        """They end with this process."""


_KEPT = _Kept()


class ZfsCase(BackendCase):
    """:class:`~backends.zfs.ZfsBackend` on a root of its own in the pool ``tank``; volumes are zvols.

    :ivar terms: on which it takes replicas, once it is reopened
    """

    unit = _BLOCK
    damageable = False

    def __init__(self, name: str = "store", *, create: tuple[str, ...] = ()) -> None:
        self.root = f"{POOL}/case-{os.getpid()}-{next(_NUMBERS)}"
        self.name = name
        zfs("create", "-o", "mountpoint=none", *create, self.root)
        self.terms = Terms()
        self.backend = self._open()

    def _open(self, runner: Runner | None = None) -> ZfsBackend:
        runner = runner or SystemRunner(PoolState(POOL).check)
        return ZfsBackend(
            self.name,
            self.root,
            checksums=checksum,
            terms=self.terms,
            runner=runner,
            choice=LibraryChoice(self.name, self.root, runner, _KEPT, installed),
            info_age=0.0,
        )

    def close(self) -> None:
        """Destroy everything."""
        self.backend.close()
        for line in zfs("list", "-H", "-o", "name", "-r", "-t", "snapshot", self.root).split("\n"):
            for held in zfs("holds", "-H", line).split("\n") if line else ():
                if held:
                    zfs("release", held.split("\t")[1], line)
        until = time.monotonic() + _DEVICE_DEADLINE
        while subprocess.run(
            ["zfs", "destroy", "-R", self.root], capture_output=True, timeout=300, check=False
        ).returncode:
            assert time.monotonic() < until, zfs("destroy", "-R", self.root)
            time.sleep(0.1)  # udev still looks at a new device

    def reopen(self, runner: Runner | None = None) -> None:
        """As after a restart of the process; its commands are run by ``runner``."""
        self.backend.close()
        self.backend = self._open(runner)

    def dataset(self, volume: str) -> str:
        return f"{self.root}/{volume}"

    def parents(self, volume: str) -> None:
        place = self.root
        for part in volume.split("/")[:-1]:
            place += f"/{part}"
            if subprocess.run(["zfs", "list", place], capture_output=True, timeout=60, check=False).returncode:
                zfs("create", "-o", f"{PLACEHOLDER}={place}", place)

    def create(self, volume: str, data: bytes) -> None:
        assert data, "a zvol has at least one block"
        assert len(data) % _BLOCK == 0
        self.parents(volume)
        zfs("create", "-s", "-b", str(_BLOCK), "-V", str(len(data)), self.dataset(volume))
        self.write(volume, 0, data)

    def create_filesystem(self, volume: str, **files: bytes) -> Path:
        """A filesystem volume with files; where it is mounted."""
        self.parents(volume)
        mount = Path("/mnt", self.dataset(volume))
        zfs("create", "-o", f"mountpoint={mount}", self.dataset(volume))
        for name, data in files.items():
            (mount / name).write_bytes(data)
        return mount

    def write(self, volume: str, offset: int, data: bytes) -> None:
        path = device(self.dataset(volume))
        with self._writable(volume):
            fd = _open_writable(path)
            try:
                os.pwrite(fd, data, offset)
                os.fsync(fd)
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _writable(self, volume: str) -> Iterator[None]:
        readonly = zfs("get", "-H", "-o", "value", "readonly", self.dataset(volume)).strip() == "on"
        if readonly:
            zfs("set", "readonly=off", self.dataset(volume))
        yield
        if readonly:
            zfs("set", "readonly=on", self.dataset(volume))

    def resize(self, volume: str, size: int) -> None:
        zfs("set", f"volsize={size}", self.dataset(volume))

    def read(self, volume: str) -> bytes:
        return device(self.dataset(volume)).read_bytes()

    def read_snapshot(self, volume: str, version: Version | VersionRef) -> bytes:
        state = self.backend.state(volume)
        assert state is not None
        found = state.by_guid(version.guid)
        assert found is not None, f"no {version.guid} in {[v.name for v in state.versions]}"
        clone = f"{POOL}/read-{os.getpid()}-{next(_NUMBERS)}"
        zfs("clone", f"{self.dataset(volume)}@{found.name}", clone)
        try:
            return device(clone).read_bytes()
        finally:
            until = time.monotonic() + _DEVICE_DEADLINE
            while subprocess.run(["zfs", "destroy", clone], capture_output=True, timeout=60, check=False).returncode:
                assert time.monotonic() < until, f"{clone} is busy"
                time.sleep(0.05)  # udev still looks at the new device

    def damage(self, volume: str, version: Version | VersionRef, offset: int, data: bytes) -> None:
        raise NotImplementedError("ZFS lets nobody change a snapshot")

    @contextlib.contextmanager
    def in_use(self, volume: str) -> Iterator[None]:
        with device(self.dataset(volume)).open("rb") as file:
            user = subprocess.Popen(["sleep", "600"], stdin=file)
        try:
            yield
        finally:
            user.kill()
            user.wait()

    def bookmark(self, volume: str, version: Version) -> Version:
        zfs("bookmark", f"{self.dataset(volume)}@{version.name}", f"{self.dataset(volume)}#mark")
        state = self.backend.state(volume)
        assert state is not None
        return next(v for v in state.versions if v.kind is VersionKind.BOOKMARK and v.guid == version.guid)
