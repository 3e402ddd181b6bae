"""One writer of an image among all nodes: a lease on an object beside it.

The lock is RADOS' own, with an expiry: who does not renew it in time has lost it, and his work is cancelled. What he
may still have under way is fenced by RBD's exclusive lock of the image, which the next one takes from him.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from backends.rbd.cluster import Session
from backends.rbd.failures import number
from backends.rbd.naming import HIDDEN
from replicator.cancellation import Cancellation
from replicator.errors import StorageUnavailable, VolumeBusy

_log = logging.getLogger(__name__)

_NAME = "replicator"
_MUST_RENEW = 2  # LIBRADOS_LOCK_FLAG_MUST_RENEW: never takes a lock that it has lost (rados/librados.h)
_EXCLUSIVE = 1  # ClsLockType::EXCLUSIVE (cls/lock/cls_lock_types.h)
_MAX_DESCRIPTION = 512


@dataclass(frozen=True, slots=True)
class Lease:
    """How long a lock lasts that is not renewed, and how often it is renewed; seconds."""

    duration: int = 60
    renewal: float = 20.0


def lock_object(image: str) -> str:
    """The object that is locked for an image, by its id: it stays the same when the image is renamed."""
    return f"{HIDDEN.removeprefix('.').removesuffix('-')}.lock.{image}"


@contextmanager
def writing(
    session: Session, namespace: str, image: str, label: str, doing: str, lease: Lease, cancel: Cancellation
) -> Iterator[Cancellation]:
    """Be the only writer of an image. Gives a cancellation for the work: ``cancel``, or the loss of the lease.

    :param image: its id
    :param label: the volume, for messages
    :raises VolumeBusy: another one writes
    """
    holder = _Holder(session, namespace, lock_object(image), lease)
    holder.take(label, doing)
    try:
        with cancel.child() as part:
            stop = threading.Event()
            renewing = threading.Thread(target=holder.keep, args=(stop, part, label), name="rbd-lease", daemon=True)
            renewing.start()
            try:
                yield part
            finally:
                stop.set()
                renewing.join()
    finally:
        holder.give_back()


class _Holder:
    """One taking of a lock."""

    def __init__(self, session: Session, namespace: str, key: str, lease: Lease) -> None:
        self._session = session
        self._namespace = namespace
        self._key = key
        self._lease = lease
        self._cookie = uuid.uuid4().hex

    def take(self, label: str, doing: str) -> None:
        with self._session.ioctx(self._namespace) as ioctx:
            try:
                ioctx.lock_exclusive(self._key, _NAME, self._cookie, doing[:_MAX_DESCRIPTION], self._lease.duration)
            except self._session.binding.errors as error:
                if number(error) not in (errno.EBUSY, errno.EEXIST):
                    raise
                raise self._busy(label, doing) from None
            who = f"{_this_process()}: {doing}"
            ioctx.write_full(self._key, who.encode()[:_MAX_DESCRIPTION])

    def _busy(self, label: str, doing: str) -> VolumeBusy:
        found, seconds = self._description(), self._lease.duration
        before, own, what = found.partition(f"{_this_process()}: ")
        if own and not before:
            return VolumeBusy(
                f"{label} is locked by this process itself ({what}), so {doing} cannot begin",
                hint=f"it goes on by itself: when that is done, or {seconds} s after its connection to Ceph was lost",
            )
        return VolumeBusy(
            f"{label} is in use by {found}, so {doing} cannot begin",
            hint=f"wait until it is done; a process that died loses the volume after {seconds} s",
        )

    def _description(self) -> str:
        with self._session.ioctx(self._namespace) as ioctx:
            try:
                found = ioctx.read(self._key, _MAX_DESCRIPTION).decode(errors="backslashreplace")
            except self._session.binding.errors:
                found = ""
        return "".join(c if c.isprintable() else "?" for c in found) or "another replicator"

    def keep(self, stop: threading.Event, work: Cancellation, label: str) -> None:
        """Renew until ``stop``; cancel the work where that fails."""
        while not stop.wait(self._lease.renewal):
            try:
                with self._session.ioctx(self._namespace) as ioctx:
                    ioctx.lock_exclusive(self._key, _NAME, self._cookie, "", self._lease.duration, flags=_MUST_RENEW)
            except self._session.binding.errors as error:
                work.cancel(
                    StorageUnavailable(
                        f"{label}: this node's lock of it could not be renewed, so the work was stopped: {error}",
                        hint="see `ceph -s`; it is tried again",
                    )
                )
                return

    def give_back(self) -> None:
        """Remove the object, and the lock with it, in one step, and only while it is ours."""
        try:
            with self._session.ioctx(self._namespace) as ioctx:
                op = ioctx.create_write_op()
                try:
                    op.execute("lock", "assert_locked", _assertion(self._cookie))
                    op.remove()
                    ioctx.operate_write_op(op, self._key)
                finally:
                    op.release()
        except self._session.binding.errors as error:
            _log.warning("lock %s could not be removed, it expires by itself: %s", self._key, error)


def _this_process() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _assertion(cookie: str) -> bytes:
    """``cls_lock_assert_op`` of version 1 (cls/lock/cls_lock_ops.h): name, type, cookie, tag."""
    fields = _string(_NAME) + bytes([_EXCLUSIVE]) + _string(cookie) + _string("")
    return struct.pack("<BBI", 1, 1, len(fields)) + fields
