"""File operations that end in a power cut: what was not synced by then is lost.

The model is stricter than journaling file systems are: a name that was made, renamed or removed is undone unless its
directory was synced after it; bytes written and not synced become garbage; a file that was never synced is empty. So a
missing sync shows at some step, every time.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from backends.image.durable import Files


class PowerCut(BaseException):
    """The machine is off. No Exception: nothing may handle it."""


@dataclass
class _Change:
    """A change of a directory's names, and how to undo it."""

    folder: tuple[int, int]
    undo: Callable[[], object]


@dataclass
class _Written:
    """Bytes of a file that are not on the disk yet."""

    fd: int
    ranges: list[tuple[int, int]] = field(default_factory=list)
    whole: bool = False


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _of_folder(path: Path) -> tuple[int, int]:
    return _identity(path.parent.stat())


def _path(fd: int) -> Path:
    return Path(f"/proc/self/fd/{fd}").readlink()


class PowerCutFiles(Files):
    """Dies at the ``step``-th change (0: before the first); never, where there are fewer: see ``died``.

    :param backup: a directory on the same file system, outside the storage
    :ivar steps: changes made so far
    """

    def __init__(self, step: int, backup: Path) -> None:
        self._left = step
        self._backup = backup
        self._lock = threading.RLock()
        self._names: list[_Change] = []
        self._bytes: dict[tuple[int, int], _Written] = {}
        self._folders: dict[tuple[int, int], int] = {}
        self.died = False
        self.steps = 0

    def _step(self) -> None:
        if self.died:
            raise PowerCut
        if self._left == 0:
            self.died = True
            self._lose()
            raise PowerCut
        self._left -= 1
        self.steps += 1

    def close(self) -> None:
        """Forget what would be lost."""
        for written in self._bytes.values():
            os.close(written.fd)
        self._bytes.clear()
        for folder in self._folders.values():
            os.close(folder)
        self._folders.clear()

    def _anchored(self, path: Path) -> Path:
        """The same name in the same directory, whatever that will be called by the time of the cut."""
        key = _of_folder(path)
        if key not in self._folders:
            self._folders[key] = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        return Path(f"/proc/self/fd/{self._folders[key]}", path.name)

    def _lose(self) -> None:
        for written in self._bytes.values():
            if written.whole:
                os.ftruncate(written.fd, 0)
            for offset, length in written.ranges:
                size = os.fstat(written.fd).st_size
                if offset < size:
                    os.pwrite(written.fd, b"\xee" * min(length, size - offset), offset)
        for change in reversed(self._names):
            with contextlib.suppress(OSError):
                change.undo()
        self.close()

    def _renamed(self, path: Path, undo: Callable[[], object]) -> None:
        self._names.append(_Change(_of_folder(path), undo))

    def _unsynced(self, fd: int) -> _Written:
        key = _identity(os.fstat(fd))
        if key not in self._bytes:
            self._bytes[key] = _Written(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
        return self._bytes[key]

    def _keep(self, path: Path) -> Path:
        kept = self._backup / uuid.uuid4().hex
        os.link(path, kept, follow_symlinks=False)
        return kept

    def open_new(self, path: Path, mode: int = 0o600) -> int:
        with self._lock:
            self._step()
            fd = super().open_new(path, mode)
            self._renamed(path, self._anchored(path).unlink)
            return fd

    def make_directory(self, path: Path) -> None:
        with self._lock:
            self._step()
            super().make_directory(path)
            made = self._anchored(path)
            self._renamed(path, lambda: shutil.rmtree(made))

    def make_directory_at(self, name: str, folder: int) -> None:
        with self._lock:
            self._step()
            super().make_directory_at(name, folder)
            path = _path(folder) / name
            made = self._anchored(path)
            self._renamed(path, lambda: shutil.rmtree(made))

    def write_all(self, fd: int, data: bytes) -> None:
        with self._lock:
            self._step()
            self._unsynced(fd).whole = True
            super().write_all(fd, data)

    def write_at(self, fd: int, data: memoryview, offset: int) -> None:
        with self._lock:
            self._step()
            self._unsynced(fd).ranges.append((offset, len(data)))
            super().write_at(fd, data, offset)

    def zero(self, fd: int, offset: int, length: int) -> None:
        with self._lock:
            self._step()
            self._unsynced(fd).ranges.append((offset, length))
            super().zero(fd, offset, length)

    def truncate(self, fd: int, size: int) -> None:
        with self._lock:
            self._step()
            super().truncate(fd, size)

    def clone(self, target: int, source: int) -> None:
        with self._lock:
            self._step()
            super().clone(target, source)
            self._unsynced(target).whole = True

    def copy_range(self, source: int, target: int, offset: int, length: int) -> int:
        with self._lock:
            self._step()
            self._unsynced(target).ranges.append((offset, length))
            return super().copy_range(source, target, offset, length)

    def set_mode(self, fd: int, mode: int) -> None:
        with self._lock:
            self._step()
            super().set_mode(fd, mode)

    def _synced(self, fd: int) -> None:
        with self._lock:
            self._step()
            key = _identity(os.fstat(fd))
            self._names = [change for change in self._names if change.folder != key]
            written = self._bytes.pop(key, None)
            if written is not None:
                os.close(written.fd)

    def sync(self, fd: int) -> None:
        self._synced(fd)

    def sync_data(self, fd: int) -> None:
        self._synced(fd)

    def rename(self, old: Path, new: Path) -> None:
        with self._lock:
            self._step()
            kept = self._keep(new) if new.exists() else None
            super().rename(old, new)
            before, after = self._anchored(old), self._anchored(new)

            def undo() -> None:
                after.rename(before)
                if kept is not None:
                    os.link(kept, after)

            self._renamed(new, undo)

    def rename_new(self, old: Path, new: Path) -> None:
        with self._lock:
            self._step()
            super().rename_new(old, new)
            before, after = self._anchored(old), self._anchored(new)
            self._renamed(new, lambda: after.rename(before))

    def exchange(self, one: Path, other: Path) -> None:
        with self._lock:
            self._step()
            super().exchange(one, other)
            first, second = self._anchored(one), self._anchored(other)
            self._renamed(one, lambda: Files().exchange(first, second))

    def link(self, old: Path, name: str, folder: int) -> None:
        with self._lock:
            self._step()
            super().link(old, name, folder)
            path = _path(folder) / name
            self._renamed(path, self._anchored(path).unlink)

    def link_path(self, old: Path, new: Path) -> None:
        with self._lock:
            self._step()
            super().link_path(old, new)
            self._renamed(new, self._anchored(new).unlink)

    def link_from(self, name: str, folder: int, new: Path) -> None:
        with self._lock:
            self._step()
            super().link_from(name, folder, new)
            self._renamed(new, self._anchored(new).unlink)

    def unlink(self, path: Path) -> None:
        with self._lock:
            self._step()
            if not path.exists():
                return
            kept = self._keep(path)
            super().unlink(path)
            gone = self._anchored(path)
            self._renamed(path, lambda: os.link(kept, gone))

    def unlink_at(self, name: str, folder: int) -> None:
        self.unlink(_path(folder) / name)

    def remove_directory(self, path: Path) -> None:
        with self._lock:
            self._step()
            super().remove_directory(path)
            self._renamed(path, self._anchored(path).mkdir)
