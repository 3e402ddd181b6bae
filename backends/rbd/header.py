"""Records of an image that others use, written into its header beside librbd.

librbd asks for the exclusive lock before it changes metadata. Where a guest writes all the time it was seen to wait for
that without end (16.2), with the record written by then. What is done here is librbd's own operation on the same
object, without that: it asks nobody, and ends with the deadline of the OSDs. (Nor does librbd refuse to change metadata
where another one has the lock and keeps it.) Who receives into an image has its lock, and writes through librbd.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from backends.rbd.binding import Ioctx


_HEAD = struct.pack("<Q", (1 << 64) - 2)  # CEPH_NOSNAP (include/types.h)


class Notes(Protocol):
    """Where records are written: a :class:`Header`, or an open image."""

    def metadata_set(self, key: str, value: str) -> None:
        """Write one, in one step."""

    def metadata_remove(self, key: str) -> None:
        """Remove one. An open image raises KeyError where there is none."""


class Header:
    """The header of an image, by its id (images of format 2: there are no others with features).

    All are operations of the OSD class ``rbd`` (cls/rbd/cls_rbd.cc). It would make a header that is not there (16.2):
    so the size is asked for in the same step, and of an image that is gone that is ENOENT, one of the binding's errors.
    """

    def __init__(self, ioctx: Ioctx, image: str) -> None:
        self._ioctx = ioctx
        self._object = f"rbd_header.{image}"  # RBD_HEADER_PREFIX (rbd_types.h)

    def metadata_set(self, key: str, value: str) -> None:
        """Write a record, in one step."""
        self._execute("metadata_set", struct.pack("<I", 1) + _text(key) + _text(value))  # a map of one key

    def metadata_remove(self, key: str) -> None:
        """Remove a record; nothing happens if it is gone."""
        self._execute("metadata_remove", _text(key))

    def _execute(self, method: str, data: bytes) -> None:
        operation = self._ioctx.create_write_op()
        try:
            operation.execute("rbd", "get_size", _HEAD)
            operation.execute("rbd", method, data)
            self._ioctx.operate_write_op(operation, self._object)
        finally:
            operation.release()


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data
