"""Where things are: live images, block devices, and the private directory beside them.

A volume's name becomes a path only here. Live images are opened component by component without following a symbolic
link anywhere, so no name and no link leads out of the storage's directory.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from backends.image.durable import Files
from backends.image.failures import unavailable
from replicator import names
from replicator.errors import InvalidName, NoSuchVolume, StorageError

PRIVATE = ".replicator"
_VOLUME_MARK = "="
"""Begins the directory of a volume; its ending is the last component of the volume's name."""
_FOLDER_MARK = "+"
"""Begins the directory of a component that is not the last. So ``a`` and ``a/b`` can both be volumes."""
_IGNORED = frozenset({"lost+found"})


@dataclass(frozen=True, slots=True)
class Live:
    """What is at a volume's name: an image file or a block device.

    :ivar identity: device, inode, size, time of the last write (not ctime, which sharing its blocks changes as well):
        changes when the file is replaced or written
    """

    size: int
    device: bool
    identity: tuple[int, ...]


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def live_of(fd: int) -> Live:
    """What an open live image is."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return Live(os.lseek(fd, 0, os.SEEK_END), True, (status.st_rdev,))
    return Live(status.st_size, False, _identity(status))


class Layout:
    """The directory of a storage.

    :param devices: block devices that are volumes, by volume name
    :param mount_point: the directory counts only while a file system is mounted on it
    """

    def __init__(
        self, storage: str, root: Path, devices: Mapping[str, Path], files: Files, *, mount_point: bool = False
    ) -> None:
        self.storage = storage
        self.root = root
        self._mount_point = mount_point
        self._devices = {self.check(name): path for name, path in devices.items()}
        self._files = files

    @property
    def private(self) -> Path:
        """The directory that is ours alone."""
        return self.root / PRIVATE

    @property
    def _volumes(self) -> Path:
        return self.private / "volumes"

    def check(self, volume: str) -> str:
        """A volume name that this storage can have. :raises InvalidName:"""
        names.check_volume(volume)
        for component in volume.split("/"):
            if component.startswith(".") or component in _IGNORED:
                raise InvalidName(
                    f"volume name {volume!r} cannot be used in the image storage {self.storage}: "
                    f"{component!r} is hidden, ours, or the file system's own",
                    hint="name images without a dot at the beginning",
                )
        return volume

    def require(self) -> None:
        """:raises StorageUnavailable: the directory is not there"""
        try:
            os.close(self._open_root())
        except OSError as error:
            raise unavailable(self.storage, self.root, error.strerror or str(error)) from error
        if self._mount_point and not self.root.is_mount():
            # Without this, replicas would fill the disk below, and sources look as if all volumes were gone.
            raise unavailable(self.storage, self.root, "nothing is mounted there")

    def _open_root(self) -> int:
        return os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    # -- live images

    @contextmanager
    def _folder(self, volume: str, *, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open directory of a live image, and its name there. FileNotFoundError if the directory is missing."""
        *parents, name = volume.split("/")
        folder = self._open_root()
        try:
            for parent in parents:
                if make:
                    self._make_folder(parent, folder)
                deeper = self._open_at(
                    volume, parent, folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                )
                os.close(folder)
                folder = deeper
            yield folder, name
        finally:
            os.close(folder)

    def _make_folder(self, name: str, folder: int) -> None:
        with contextlib.suppress(FileExistsError):
            self._files.make_directory_at(name, folder)
            self._files.sync(folder)

    def _open_at(self, volume: str, name: str, folder: int, flags: int) -> int:
        try:
            return os.open(name, flags, dir_fd=folder)
        except OSError as error:
            if error.errno == errno.ELOOP or (error.errno == errno.ENOTDIR and _is_link(name, folder)):
                raise InvalidName(
                    f"{name!r} in {self.storage}:{volume} is a symbolic link, which the image storage never follows",
                    hint="put the image itself there, or list a block device under devices = {…} of the storage",
                ) from error
            if error.errno == errno.ENOTDIR:
                raise FileNotFoundError(errno.ENOENT, "a component of it is a file", name) from error
            raise

    def open_live(self, volume: str) -> int | None:
        """A volume's live image, open for reading; None if there is none.

        :raises InvalidName: a component is a symbolic link
        :raises StorageError: neither a regular file nor a configured block device
        """
        device = self._devices.get(self.check(volume))
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not make us wait
        try:
            if device is not None:
                fd = os.open(device, flags)
            else:
                with self._folder(volume) as (folder, name):
                    fd = self._open_at(volume, name, folder, flags | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            mode = os.fstat(fd).st_mode
            if device is not None and not stat.S_ISBLK(mode):
                raise StorageError(
                    f"{device}, configured as the device {self.storage}:{volume}, is not a block device",
                    hint=f"correct devices in [storage.{self.storage}]",
                )
            if device is None and stat.S_ISDIR(mode):
                os.close(fd)
                return None
            if device is None and not stat.S_ISREG(mode):
                raise StorageError(
                    f"{self.storage}:{volume} is neither a regular file nor a configured block device",
                    hint=f"list a block device under devices = {{…}} in [storage.{self.storage}]",
                )
        except StorageError:
            os.close(fd)
            raise
        return fd

    def live(self, volume: str) -> Live | None:
        """What is at a volume's name now, None if nothing is."""
        fd = self.open_live(volume)
        if fd is None:
            return None
        try:
            return live_of(fd)
        finally:
            os.close(fd)

    def open_existing(self, volume: str) -> int:
        """A live image, open for reading. :raises NoSuchVolume:"""
        fd = self.open_live(volume)
        if fd is None:
            raise NoSuchVolume(
                f"{self.storage}:{volume} has no image at {self.where(volume)}", hint="correct the volume's name"
            )
        return fd

    def where(self, volume: str) -> Path:
        """The path of a live image, to be shown to people."""
        return self._devices.get(volume) or self.root / volume

    def is_device(self, volume: str) -> bool:
        """Whether a volume is a configured block device."""
        return volume in self._devices

    def publish_live(self, volume: str, image: Path) -> None:
        """Give the durable file ``image`` the name of a live image as well, durably; FileExistsError if taken."""
        with self._folder(volume, make=True) as (folder, name):
            self._files.link(image, name, folder)
            self._files.sync(folder)

    def link_live(self, volume: str, path: Path, opened: int) -> None:
        """Give a live image a second name, if it is still the opened file.

        :raises FileNotFoundError: it was replaced or removed
        """
        with self._folder(volume) as (folder, name):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if not os.path.samestat(status, os.fstat(opened)):
                raise FileNotFoundError(errno.ENOENT, "it was replaced just now", name)
            self._files.link_from(name, folder, path)

    def remove_live(self, volume: str) -> None:
        """Remove a live image's name, durably."""
        with self._folder(volume) as (folder, name):
            self._files.unlink_at(name, folder)
            self._files.sync(folder)

    # -- private directories

    def private_folder(self, volume: str) -> Path:
        """Where a volume's snapshots and state are kept; need not exist.

        :raises StorageError: somebody else has made our directory, or made it a link
        """
        *parents, name = self.check(volume).split("/")
        self._check_private()
        path = self._volumes
        for parent in parents:
            path /= _FOLDER_MARK + parent
        return path / (_VOLUME_MARK + name)

    def make_private_folder(self, volume: str) -> Path:
        """The same, made durably if it is missing."""
        self.check(volume)
        self._files.ensure_directory(self.private, self.root)  # by itself: it is checked before anything is made in it
        path = self.private_folder(volume)
        self._files.ensure_directory(path, self.private)
        return path

    def _check_private(self) -> None:
        try:
            status = self.private.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise StorageError(
                f"{self.private} is not a directory that only this user can write to",
                hint=f"chown and chmod 700 it if it is ours; else move it away: somebody else made {self.private}",
            )

    # -- listing

    def listing(self, warnings: list[str]) -> list[str]:
        """The names of all volumes, sorted; what cannot be one is told in ``warnings``."""
        found = set(self._devices)
        found.update(self._live_names(self.root, "", warnings))
        if self._volumes.is_dir():
            found.update(self._private_names(self._volumes, "", warnings))
        return sorted(found)

    def _live_names(self, folder: Path, prefix: str, warnings: list[str]) -> Iterator[str]:
        for entry in _entries(folder, warnings):
            if entry.name.startswith(".") or entry.name in _IGNORED:
                continue
            name = prefix + entry.name
            if entry.is_symlink():
                warnings.append(f"{_shown(name)} is a symbolic link and is not followed")
            elif not _usable(name, warnings):
                continue
            elif entry.is_dir(follow_symlinks=False):
                yield from self._live_names(Path(entry.path), name + "/", warnings)
            elif entry.is_file(follow_symlinks=False):
                yield name

    def _private_names(self, folder: Path, prefix: str, warnings: list[str]) -> Iterator[str]:
        for entry in _entries(folder, warnings):
            mark, name = entry.name[:1], prefix + entry.name[1:]
            if mark not in (_VOLUME_MARK, _FOLDER_MARK) or not entry.is_dir(follow_symlinks=False):
                continue
            if not _usable(name, warnings):
                continue
            if mark == _VOLUME_MARK:
                yield name
            else:
                yield from self._private_names(Path(entry.path), name + "/", warnings)


def _is_link(name: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _shown(name: str) -> str:
    return ascii(name)[:120]


def _usable(name: str, warnings: list[str]) -> bool:
    try:
        names.check_volume(name)
    except InvalidName as error:
        warnings.append(f"{_shown(name)} is left out: {error}")
        return False
    return True


def _entries(folder: Path, warnings: list[str]) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        warnings.append(f"{_shown(str(folder))} cannot be listed: {error.strerror}")
        return []
