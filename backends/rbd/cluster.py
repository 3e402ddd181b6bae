"""The connection to a Ceph cluster: one for a storage, made when it is first needed, made anew once it is lost."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from backends.rbd.binding import Binding, Image, Ioctx, Pool, Rados
from backends.rbd.failures import DENIED, LOST, not_connected, number, translate
from backends.rbd.header import Notes
from backends.rbd.naming import Place
from replicator.errors import ReplicatorError, StorageUnavailable

MON_SECONDS = 30
OSD_SECONDS = 60
"""Deadlines of a single operation; librados ends it with ETIMEDOUT."""
ATTEMPT_SECONDS = 4.0 * MON_SECONDS
"""Of a try to connect, which is a few operations."""
PAUSE_SECONDS = 5.0
"""After a try at a cluster that did not answer, until the next: what a run that has failed still asks fails at once."""
_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "client_mount_timeout": str(MON_SECONDS),
        "rados_mon_op_timeout": str(MON_SECONDS),
        "rados_osd_op_timeout": str(OSD_SECONDS),
        # What is written is written once, and what is read is read once; and a write that is done is then durable.
        "rbd_cache": "false",
        # The binding of librbd does not keep what is being written; so it has to be copied, as is the default.
        "rbd_disable_zero_copy_writes": "true",
        # Clones need no protected parent, and may be in another namespace.
        "rbd_default_clone_format": "2",
    }
)
_MAX_ANSWER = 16 << 20


@dataclass(frozen=True, slots=True)
class Where:
    """Which pool of which cluster, and as whom.

    :ivar keyring: None: where the configuration says
    :ivar data_pool: where new replicas have their data; None: in a pool called as that of their source, or in this one
    """

    pool: str
    conffile: Path
    user: str
    keyring: Path | None
    data_pool: str | None = None

    def __str__(self) -> str:
        return f"pool {self.pool} as client.{self.user}"


class Session:
    """A connection in use. Thread-safe.

    :ivar fsid: the cluster's identity
    :ivar client: this connection's number among the cluster's clients
    :ivar lost: it cannot be used again
    """

    def __init__(self, storage: str, binding: Binding, where: Where, rados: Rados) -> None:
        self.binding = binding
        self.rados = rados
        self.lost = False
        self._storage = storage
        self._where = where
        self.fsid = rados.get_fsid()
        self.client = rados.get_instance_id()
        with self.ioctx("") as ioctx:
            self.pool_id = ioctx.get_pool_id()

    @property
    def pool(self) -> Pool:
        """What is done to the images of a pool."""
        return self.binding.pool()

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Turn errors of the bindings into StorageErrors that say what was being done."""
        try:
            yield
        except self.binding.errors as error:
            self.lost = self.lost or number(error) in LOST | DENIED
            raise translate(error, self._storage, str(self._where), doing) from error
        except StorageUnavailable:
            self.lost = True
            raise

    @contextmanager
    def ioctx(self, namespace: str, pool: int | None = None) -> Iterator[Ioctx]:
        """The pool (or another one of this cluster, by its number) at a namespace."""
        ioctx = self.rados.open_ioctx(self._where.pool) if pool is None else self.rados.open_ioctx2(pool)
        try:
            # A full cluster or pool is an error at once, and what makes room is done all the same. Else librados would
            # keep every change back until there is room, and end it with a timeout that says nothing of it.
            ioctx.set_osdmap_full_try()
            if namespace:
                ioctx.set_namespace(namespace)
            yield ioctx
        finally:
            ioctx.close()

    @contextmanager
    def image(self, place: Place, *, read_only: bool = True, pool: int | None = None) -> Iterator[Image]:
        """An image at its head. Read-only ones are not seen as users of it."""
        with self.ioctx(place.namespace, pool) as ioctx:
            image = self.binding.open_image(ioctx, place.image, read_only=read_only)
            try:
                yield image
            finally:
                # A connection that is gone cannot take leave; what went wrong is being raised already.
                with suppress(*self.binding.errors):
                    image.close()

    @contextmanager
    def notes(self, namespace: str, image: str) -> Iterator[Notes]:
        """Where records of an image are written that others use; by its id."""
        with self.ioctx(namespace) as ioctx:
            yield self.binding.open_header(ioctx, image)

    def ask_mon(self, **command: str) -> dict[str, Any] | None:
        """What the monitors answer, None where this user may not ask."""
        status, answer, _ = self.rados.mon_command(json.dumps({**command, "format": "json"}), b"", timeout=MON_SECONDS)
        if status or len(answer) > _MAX_ANSWER:
            return None
        try:
            found = json.loads(answer)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


class _Users:
    """A session and how many are in it: one that is not the current one any more is shut down when all have left."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.count = 0


@dataclass(eq=False, slots=True)
class _Attempt:
    """One try to connect.

    :ivar failed: why it came to nothing
    """

    over: threading.Event = field(default_factory=threading.Event)
    failed: ReplicatorError | None = None


class Connection:
    """The way to a storage's cluster. A cluster that does not answer costs its time-out once: who asks meanwhile waits
    for the same attempt, and who asks just after it gets the same answer.

    :param load: the bindings, when they are needed
    :param clock: seconds that pass
    """

    def __init__(
        self, storage: str, where: Where, load: Callable[[], Binding], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._storage = storage
        self.where = where
        self._load = load
        self._clock = clock
        self._lock = threading.Lock()
        self._current: _Users | None = None
        self._attempt: _Attempt | None = None
        self._unreachable: tuple[float, StorageUnavailable] | None = None

    @contextmanager
    def session(self, doing: str) -> Iterator[Session]:
        """Work with the cluster; errors of the bindings become StorageErrors that say what was being done.

        :raises StorageUnavailable: it cannot be reached
        """
        binding = self._load()
        users = self._enter(binding)
        try:
            with users.session.errors(doing):
                yield users.session
        finally:
            self._leave(users)

    def close(self) -> None:
        """Drop the connection; who is still using it keeps it until he is done."""
        with self._lock:
            attempt = self._attempt
        if attempt is not None:
            attempt.over.wait(ATTEMPT_SECONDS)
        with self._lock:
            users, self._current = self._current, None
            idle = users is not None and users.count == 0
        if users is not None and idle:
            users.session.rados.shutdown()

    def _enter(self, binding: Binding) -> _Users:
        while True:
            with self._lock:
                if self._current is not None and not self._current.session.lost:
                    self._current.count += 1
                    return self._current
                attempt, mine = self._attempt, self._attempt is None
                if attempt is None:
                    self._check_answered()
                    attempt = self._attempt = _Attempt()
            if mine:
                self._try(attempt, binding)
            elif not attempt.over.wait(ATTEMPT_SECONDS):
                raise StorageUnavailable(
                    f"storage {self._storage} ({self.where}): no connection was made in {ATTEMPT_SECONDS:g} s",
                    hint=f"see `ceph -s`, and the mon_host of {self.where.conffile}",
                )
            if attempt.failed is not None:
                raise _again(attempt.failed)

    def _check_answered(self) -> None:
        """:raises StorageUnavailable: the cluster did not answer just now"""
        if self._unreachable is not None:
            when, error = self._unreachable
            if self._clock() - when < PAUSE_SECONDS:
                raise _again(error)
            self._unreachable = None

    def _try(self, attempt: _Attempt, binding: Binding) -> None:
        users = None
        try:
            users = _Users(self._connect(binding))
        except ReplicatorError as error:
            attempt.failed = error
        finally:
            with self._lock:
                self._attempt = None
                if users is not None:
                    self._current = users
                if isinstance(attempt.failed, StorageUnavailable):
                    self._unreachable = self._clock(), attempt.failed
            attempt.over.set()

    def _leave(self, users: _Users) -> None:
        with self._lock:
            users.count -= 1
            if users.session.lost and self._current is users:
                self._current = None
            over = self._current is not users and users.count == 0
        if over:
            users.session.rados.shutdown()

    def _connect(self, binding: Binding) -> Session:
        where = self.where
        options = dict(_OPTIONS)
        if where.keyring is not None:
            options["keyring"] = str(where.keyring)
        keyring = str(where.keyring or "the keyring that it names")
        try:
            rados = binding.new_connection(where.conffile, where.user, options)
        except Exception as error:
            raise not_connected(error, self._storage, str(where), str(where.conffile), keyring) from error
        try:
            rados.connect()
            return Session(self._storage, binding, where, rados)
        except BaseException as error:
            rados.shutdown()
            if isinstance(error, binding.errors):
                raise not_connected(error, self._storage, str(where), str(where.conffile), keyring) from error
            raise


def _again(error: ReplicatorError) -> ReplicatorError:
    """The same error, to be raised by another thread."""
    return type(error)(str(error), hint=error.hint)


def is_absent(error: BaseException) -> bool:
    """Whether an error of the binding says that something is not there."""
    return number(error) == errno.ENOENT


def exists_already(error: BaseException) -> bool:
    """Whether an error of the binding says that something of that name is there."""
    return number(error) == errno.EEXIST
