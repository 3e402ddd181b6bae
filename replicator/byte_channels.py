"""Bytes in and out of this process: files, pipes and sockets, with waits that can be cancelled."""

from __future__ import annotations

import errno
import os
import select
import stat
from contextlib import suppress
from pathlib import Path

from replicator.cancellation import Cancellation
from replicator.errors import DeadlineExceeded, NoSpace, ReplicatorError, StorageError, UsageError
from replicator.streams import Buffer

PATIENCE = 3600.0
"""Seconds that whoever is at the other end of a pipe may do nothing."""
_POLL = 0.5
_GATHERED = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Channel:
    """A file descriptor that is waited for.

    A pipe is opened once more for this process alone, so that its reads and writes can be made not to block without
    anybody else noticing, who has the same one as his standard output.

    :param fd: stays open; what is opened here is closed with this
    :param label: as people write it
    """

    def __init__(self, fd: int, label: str, *, write: bool) -> None:
        self.label = label
        self._own = -1
        self._events = select.POLLOUT if write else select.POLLIN
        self.waits = not stat.S_ISREG(os.fstat(fd).st_mode)
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            with suppress(OSError):  # no /proc: it blocks, as far as the other end lets it
                mode = os.O_WRONLY if write else os.O_RDONLY
                self._own = os.open(f"/proc/self/fd/{fd}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
        self.fd = fd if self._own < 0 else self._own

    def wait(self, cancel: Cancellation) -> None:
        """Until something can be done with it. :raises DeadlineExceeded: nothing can for a long time"""
        if not self.waits:
            return
        poll = select.poll()
        poll.register(self.fd, self._events)
        waited = 0.0
        while not poll.poll(_POLL * 1000):
            cancel.check()
            waited += _POLL
            if waited >= PATIENCE:
                raise DeadlineExceeded(f"{self.label}: nothing moved for {PATIENCE:.0f} s", hint="")

    def close(self) -> None:
        """Close what was opened here."""
        if self._own >= 0:
            os.close(self._own)
            self._own = -1


class Writer:
    """Writes bytes in their order, small ones gathered.

    :raises BrokenPipeError: nobody reads any more
    """

    def __init__(self, fd: int, label: str, cancel: Cancellation) -> None:
        self._channel = Channel(fd, label, write=True)
        self._cancel = cancel
        self._gathered: list[Buffer] = []
        self._size = 0

    def write(self, data: Buffer) -> None:
        """Write it, or keep it for a while (it must stay as it is until then)."""
        self._gathered.append(data)
        self._size += len(data)
        if self._size >= _GATHERED:
            self.flush()

    def flush(self) -> None:
        """Write all that was kept."""
        view = memoryview(b"".join(self._gathered) if len(self._gathered) != 1 else self._gathered[0])
        self._gathered, self._size = [], 0
        while view:
            self._cancel.check()
            self._channel.wait(self._cancel)
            try:
                view = view[os.write(self._channel.fd, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise
            except OSError as error:
                raise told(error, f"writing {self._channel.label}") from error

    def close(self) -> None:
        """What was not flushed is not written."""
        self._channel.close()


class Reader:
    """Reads bytes in their order."""

    def __init__(self, fd: int, label: str, cancel: Cancellation) -> None:
        self._channel = Channel(fd, label, write=False)
        self._cancel = cancel
        self._ahead = b""

    def read(self, size: int) -> bytes:
        """See :data:`replicator.diff_format.Read`."""
        parts: list[bytes] = []
        missing = size
        while missing:
            if not self._ahead:
                self._ahead = self._some(missing)
                if not self._ahead:
                    break
            part, self._ahead = self._ahead[:missing], self._ahead[missing:]
            parts.append(part)
            missing -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _some(self, wanted: int) -> bytes:
        """At least one byte, or none at the end. Small pieces of what is read are kept: reads are of some size."""
        while True:
            self._cancel.check()
            self._channel.wait(self._cancel)
            try:
                return os.read(self._channel.fd, max(wanted, 64 << 10))
            except BlockingIOError:
                continue
            except OSError as error:
                raise told(error, f"reading {self._channel.label}") from error

    def close(self) -> None:
        """Release what was opened here."""
        self._channel.close()


def told(error: OSError, doing: str) -> ReplicatorError:
    """An error of the system as one of ours."""
    why = error.strerror or str(error)
    if error.errno in _FULL:
        return NoSpace(f"{doing} failed: {why}", hint="make room, or write to another place")
    if error.errno == errno.EFBIG:
        return StorageError(f"{doing} failed: {why}", hint="the file system there takes no file of that size")
    return StorageError(f"{doing} failed: {why}", hint="see the system's log (dmesg)")


# -- files that are there whole, or not at all


def check_new(path: Path) -> None:
    """:raises UsageError: it exists, or cannot be made"""
    if path.exists() or path.is_symlink():
        raise UsageError(f"{path} exists", hint="remove it, or write to another file")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", hint=f"mkdir -p {path.parent}")


class NewFile:
    """A file that gets its name once it is whole and durable; before, it is called ``NAME.partial``.

    :raises UsageError: it exists
    """

    def __init__(self, path: Path) -> None:
        check_new(path)
        self.path = path
        self._partial = path.with_name(f"{path.name}.partial")
        try:
            self.fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise told(error, f"making {self._partial}") from error
        self._open = True

    def publish(self) -> None:
        """It is whole."""
        try:
            os.fsync(self.fd)
            check_new(self.path)
            self._partial.rename(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise told(error, f"writing {self.path}") from error
        self._close()

    def discard(self) -> None:
        """Remove what is not whole; nothing where it is."""
        if self._open:
            self._close()
            with suppress(OSError):
                self._partial.unlink()

    def _close(self) -> None:
        self._open = False
        os.close(self.fd)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


def write_new(path: Path, data: bytes, cancel: Cancellation) -> None:
    """Write a small file, whole and durable, or not at all. :raises UsageError: it exists"""
    new = NewFile(path)
    try:
        writer = Writer(new.fd, str(path), cancel)
        writer.write(data)
        writer.flush()
        new.publish()
    finally:
        new.discard()
