"""Reading images: exactly, or with an error that says what is wrong."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from replicator.errors import DamagedData, StorageError

WINDOW = 1 << 20
"""Bytes read at a time; a multiple of every block size in use."""
PIECE = 4096
"""Bytes: how finely two versions are compared where both are here. The unit in which guests write."""


@dataclass(frozen=True, slots=True)
class Image:
    """An open image file that nobody changes.

    :ivar label: as people write it, for errors
    :ivar shrunk: makes the error for a file that ends too early
    """

    fd: int
    size: int
    label: str
    shrunk: Callable[[str, int], StorageError]

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` with the bytes from ``offset``.

        :raises DamagedData: the disk cannot read them
        """
        while view:
            try:
                count = os.preadv(self.fd, [view], offset)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EBADMSG, errno.EUCLEAN):
                    raise
                raise DamagedData(
                    f"{self.label} cannot be read at byte {offset}: {error.strerror}",
                    hint="look into the kernel's log (dmesg) and check the disk; a replica elsewhere can replace it",
                ) from error
            if not count:
                raise self.shrunk(self.label, offset)
            view, offset = view[count:], offset + count

    def read(self, offset: int, length: int) -> bytes:
        """The bytes of a range; beyond the end they are zeros."""
        data = bytearray(length)
        self.read_into(memoryview(data)[: max(0, min(length, self.size - offset))], offset)
        return bytes(data)


def snapshot_shrunk(label: str, offset: int) -> StorageError:
    """For an image that must never change."""
    return DamagedData(
        f"{label} ends at byte {offset}, before its recorded size",
        hint="somebody changed a file below .replicator; destroy that snapshot, then `replicator resync`",
    )
