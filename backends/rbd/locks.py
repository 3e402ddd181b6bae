"""One writer of an image among all nodes: a lease on an object beside it.

The lock is RADOS' own, with an expiry: who does not renew it in time has lost it, and his work is cancelled: before it
expires, also where the renewal itself hangs, as a cluster lets an operation hang for longer than the lease lasts. What
he may still have under way is fenced by RBD's exclusive lock of the image, which the next one takes from him.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import threading
import time
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
    """How long a lock lasts that is not renewed, how often it is renewed, and after how long without a renewal the
    work is stopped (None: at three quarters of the lease, so that it has the rest to end in); seconds."""

    duration: int = 60
    renewal: float = 20.0
    patience: float | None = None

    @property
    def gives_up(self) -> float:
        """Seconds after the last renewal was asked for that the work is stopped."""
        return 0.75 * self.duration if self.patience is None else self.patience


@dataclass(frozen=True, slots=True)
class Held:
    """A lock that is held.

    :ivar work: stops with the loss of the lock, or for any other reason
    :ivar lost: the loss alone: what was stopped for another reason may still note how far it came, but not after this
    """

    work: Cancellation
    lost: Cancellation

    def check(self) -> None:
        """:raises StorageUnavailable: it is lost"""
        self.lost.check()


def lock_object(image: str) -> str:
    """The object that is locked for an image, by its id: it stays the same when the image is renamed."""
    return f"{HIDDEN.removeprefix('.').removesuffix('-')}.lock.{image}"


@contextmanager
def writing(
    session: Session,
    namespace: str,
    image: str,
    label: str,
    doing: str,
    lease: Lease,
    cancel: Cancellation,
    *,
    pool: int | None = None,
) -> Iterator[Held]:
    """Be the only writer of an image. Gives a cancellation for the work: ``cancel``, or the loss of the lease.

    :param image: its id
    :param label: the volume, for messages
    :param pool: the number of its pool, where that is not the session's
    :raises VolumeBusy: another one writes
    """
    holder = _Holder(session, namespace, lock_object(image), lease, pool)
    holder.take(label, doing)
    try:
        with cancel.child() as part:
            held = Held(part, Cancellation())
            with held.lost.unblock(lambda: part.cancel(held.lost.error)), holder.kept(held.lost, label):
                yield held
    finally:
        holder.give_back()


class _Holder:
    """One taking of a lock."""

    def __init__(self, session: Session, namespace: str, key: str, lease: Lease, pool: int | None) -> None:
        self._session = session
        self._namespace = namespace
        self._key = key
        self._pool = pool
        self._lease = lease
        self._cookie = uuid.uuid4().hex
        self._since = 0.0  # when what it has now was asked for: the lease began then or later

    def take(self, label: str, doing: str) -> None:
        self._since = time.monotonic()
        with self._session.ioctx(self._namespace, self._pool) as ioctx:
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
        with self._session.ioctx(self._namespace, self._pool) as ioctx:
            try:
                found = ioctx.read(self._key, _MAX_DESCRIPTION).decode(errors="backslashreplace")
            except self._session.binding.errors:
                found = ""
        return "".join(c if c.isprintable() else "?" for c in found) or "another replicator"

    @contextmanager
    def kept(self, lost: Cancellation, label: str) -> Iterator[None]:
        """Renew it while the block lasts; ``lost`` is cancelled where that does not succeed in time."""
        stop = threading.Event()
        threads = [
            threading.Thread(target=target, args=(stop, lost, label), name=name, daemon=True)
            for target, name in ((self._renew, "rbd-lease"), (self._watch, "rbd-lease-watch"))
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _renew(self, stop: threading.Event, lost: Cancellation, label: str) -> None:
        """Renew until ``stop``."""
        while not stop.wait(self._lease.renewal):
            asked = time.monotonic()
            try:
                with self._session.ioctx(self._namespace, self._pool) as ioctx:
                    ioctx.lock_exclusive(self._key, _NAME, self._cookie, "", self._lease.duration, flags=_MUST_RENEW)
            except self._session.binding.errors as error:
                lost.cancel(_lost(label, str(error)))
                return
            self._since = asked

    def _watch(self, stop: threading.Event, lost: Cancellation, label: str) -> None:
        """Beside the one that renews, as that may hang until long after the lease has run out."""
        while True:
            left = self._since + self._lease.gives_up - time.monotonic()
            if left <= 0:
                lost.cancel(_lost(label, f"the cluster has not answered for {self._lease.gives_up:g} s"))
                return
            if stop.wait(left):
                return

    def give_back(self) -> None:
        """Remove the object, and the lock with it, in one step, and only while it is ours."""
        try:
            with self._session.ioctx(self._namespace, self._pool) as ioctx:
                op = ioctx.create_write_op()
                try:
                    op.execute("lock", "assert_locked", _assertion(self._cookie))
                    op.remove()
                    ioctx.operate_write_op(op, self._key)
                finally:
                    op.release()
        except self._session.binding.errors as error:
            _log.warning("lock %s could not be removed, it expires by itself: %s", self._key, error)


def _lost(label: str, why: str) -> StorageUnavailable:
    return StorageUnavailable(
        f"{label}: this node's lock of it could not be renewed, so the work was stopped: {why}",
        hint="see `ceph -s`; it is tried again",
    )


def _this_process() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def _assertion(cookie: str) -> bytes:
    """``cls_lock_assert_op`` of version 1 (cls/lock/cls_lock_ops.h): name, type, cookie, tag."""
    fields = _string(_NAME) + bytes([_EXCLUSIVE]) + _string(cookie) + _string("")
    return struct.pack("<BBI", 1, 1, len(fields)) + fields
