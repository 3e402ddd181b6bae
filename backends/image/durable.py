"""Every call that changes something on the file system, so that what is durable when can be read (and tested) in one
place.

A name that was made, renamed or removed is durable only after the directory was synced; bytes only after the file was.
An :class:`Files` has no state; tests hand the backend one that fails, or dies, at the n-th call.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import uuid
from pathlib import Path

from backends.image import linux

FILE_MODE = 0o600
SNAPSHOT_MODE = 0o400
DIRECTORY_MODE = 0o700
LIVE_DIRECTORY_MODE = 0o755


class Files:
    """File operations. Paths are absolute; every method raises :class:`OSError`."""

    # -- one system call each

    def open_new(self, path: Path, mode: int = FILE_MODE) -> int:
        """A new empty file, open for reading and writing; FileExistsError if it is there."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)

    def make_directory(self, path: Path) -> None:
        """A new directory for us alone."""
        path.mkdir(DIRECTORY_MODE)

    def make_directory_at(self, name: str, folder: int) -> None:
        """A new directory for live images, in an open one."""
        os.mkdir(name, LIVE_DIRECTORY_MODE, dir_fd=folder)

    def write_all(self, fd: int, data: bytes) -> None:
        """Write a small file's whole contents."""
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]

    def write_at(self, fd: int, data: memoryview, offset: int) -> None:
        """Write bytes of an image."""
        while data:
            written = os.pwrite(fd, data, offset)
            data, offset = data[written:], offset + written

    def zero(self, fd: int, offset: int, length: int) -> None:
        """Make a range read as zeros: a hole where the file system has them, else written."""
        try:
            linux.punch(fd, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            zeros = memoryview(bytes(1 << 20))
            while length:
                part = min(length, len(zeros))
                self.write_at(fd, zeros[:part], offset)
                offset, length = offset + part, length - part

    def truncate(self, fd: int, size: int) -> None:
        """Set a file's size."""
        os.ftruncate(fd, size)

    def clone(self, target: int, source: int) -> None:
        """Make an empty file share all blocks of another; see :func:`backends.image.linux.clone`."""
        linux.clone(target, source)

    def copy_range(self, source: int, target: int, offset: int, length: int) -> int:
        """Copy within the kernel; the bytes copied, 0 at the end of ``source``."""
        return os.copy_file_range(source, target, length, offset, offset)

    def set_mode(self, fd: int, mode: int) -> None:
        """Set a file's permissions."""
        os.fchmod(fd, mode)

    def sync(self, fd: int) -> None:
        """Make a file durable, its metadata too."""
        os.fsync(fd)

    def sync_data(self, fd: int) -> None:
        """Make a file's bytes durable."""
        os.fdatasync(fd)

    def sync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.sync(fd)
        finally:
            os.close(fd)

    def rename(self, old: Path, new: Path) -> None:
        """Rename a file over whatever has the name."""
        old.rename(new)

    def rename_new(self, old: Path, new: Path) -> None:
        """Rename; FileExistsError if ``new`` exists."""
        linux.rename_noreplace(str(old), str(new))

    def exchange(self, one: Path, other: Path) -> None:
        """Exchange two names in one step."""
        linux.exchange(str(one), str(other))

    def link(self, old: Path, name: str, folder: int) -> None:
        """Give a file a second name in the open directory ``folder``; FileExistsError if it is taken."""
        os.link(old, name, dst_dir_fd=folder, follow_symlinks=False)

    def link_path(self, old: Path, new: Path) -> None:
        """Give a file of ours a second name; FileExistsError if that is taken."""
        os.link(old, new, follow_symlinks=False)

    def link_from(self, name: str, folder: int, new: Path) -> None:
        """Give the file ``name`` of an open directory a second name; FileExistsError if that is taken."""
        os.link(name, new, src_dir_fd=folder, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        """Remove a name; nothing happens if it is gone."""
        path.unlink(missing_ok=True)

    def unlink_at(self, name: str, folder: int) -> None:
        """Remove a name from an open directory; nothing happens if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)

    def remove_directory(self, path: Path) -> None:
        """Remove an empty directory; nothing happens if it is gone."""
        with contextlib.suppress(FileNotFoundError):
            path.rmdir()

    # -- made of those

    def ensure_directory(self, path: Path, below: Path) -> None:
        """Make ``path`` and what is missing between it and the existing directory ``below``, durably.

        Each new name is synced even if somebody else made it: that one may not have come to it yet.
        """
        missing = []
        while path != below and not path.is_dir():
            missing.append(path)
            path = path.parent
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):
                self.make_directory(folder)
            self.sync_directory(folder.parent)

    def create(self, path: Path, data: bytes, mode: int = FILE_MODE) -> None:
        """A new small file with durable contents; its name is durable once the directory is synced."""
        fd = self.open_new(path, mode)
        try:
            self.write_all(fd, data)
            self.sync(fd)
        finally:
            os.close(fd)

    def replace(self, path: Path, data: bytes, mode: int = FILE_MODE) -> None:
        """Write a small file so that a power cut leaves either the old contents or the new ones."""
        temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
        try:
            self.create(temporary, data, mode)
            self.rename(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.unlink(temporary)
            raise
        self.sync_directory(path.parent)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and what is in it; nothing happens if it is gone. Follows no link."""
        try:
            entries = list(os.scandir(path))
        except FileNotFoundError:
            return
        except NotADirectoryError:
            self.unlink(path)
            return
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                self.remove_tree(Path(entry.path))
            else:
                self.unlink(Path(entry.path))
        self.remove_directory(path)


def is_block_device(status: os.stat_result) -> bool:
    """Whether a stat result is of a block device."""
    return stat.S_ISBLK(status.st_mode)
