"""What the file system of a storage can do, found out by doing it."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from pathlib import Path

from backends.image import linux

_PROBE_BYTES = 4096


class Probe:
    """Finds out, once for each file system that is mounted at the path. Thread-safe."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._known: tuple[tuple[int, int], bool] | None = None

    def reflink(self) -> bool:
        """Whether files there can share blocks. :raises OSError: it cannot be found out"""
        status = self._root.stat()
        mounted = (status.st_dev, status.st_ino)
        with self._lock:
            if self._known is None or self._known[0] != mounted:
                self._known = (mounted, self._try())
            return self._known[1]

    def _try(self) -> bool:
        with tempfile.TemporaryFile(dir=self._root) as one, tempfile.TemporaryFile(dir=self._root) as other:
            one.write(bytes(range(256)) * (_PROBE_BYTES // 256))
            one.flush()
            try:
                linux.clone(other.fileno(), one.fileno())
            except OSError as error:
                if not linux.cannot_clone(error) or error.errno == errno.EPERM:
                    raise
                return False
        return True

    def describe(self) -> tuple[str, tuple[str, ...]]:
        """One sentence for people, and what they should know."""
        fd = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            kind = linux.file_system(fd)
        finally:
            os.close(fd)
        if self.reflink():
            return f"reflink copies ({kind})", ()
        detail = f"sparse copies ({kind} has no reflink): each snapshot takes the space of its data"
        warning = (
            "a snapshot of an image that is in use is not one instant here: stop the guest or freeze it (quiesce) "
            "while it is taken, or keep the images on XFS or btrfs"
        )
        return detail, (warning,)
