"""The lease of an image: who cannot renew it in time has lost it, whatever became of the renewal."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from backends.rbd.locks import Lease, writing
from replicator.cancellation import Cancellation
from replicator.errors import StorageUnavailable


class FakeError(Exception):
    def __init__(self, code: int) -> None:
        super().__init__("did not come back")
        self.errno = code


class FakeCluster:
    """A session of which a renewal does not come back before it is told to."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.answer = threading.Event()
        self.binding: Any = self
        self.errors = (FakeError,)

    @contextmanager
    def ioctx(self, _namespace: str, _pool: int | None) -> Iterator[Any]:
        yield self

    def lock_exclusive(self, *_arguments: Any, flags: int = 0) -> None:
        if flags:
            self.asked.set()
            self.answer.wait(60)
            raise FakeError(errno.ETIMEDOUT)

    def write_full(self, _key: str, _data: bytes) -> None:
        pass

    def create_write_op(self) -> Any:
        raise FakeError(errno.ETIMEDOUT)


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    made = FakeCluster()
    yield made
    made.answer.set()


def test_work_ends_before_its_lease_while_the_renewal_hangs(cluster: FakeCluster) -> None:
    session: Any = cluster
    lease = Lease(duration=3600, renewal=0.01, patience=0.2)
    with writing(session, "", "id", "store:vm", "receiving one", lease, Cancellation()) as held:
        try:
            assert cluster.asked.wait(30)
            assert held.work.wait(30)
            assert not cluster.answer.is_set()
            with pytest.raises(StorageUnavailable, match="could not be renewed"):
                held.work.check()
        finally:
            cluster.answer.set()


def test_what_was_stopped_before_still_learns_that_the_lease_is_lost(cluster: FakeCluster) -> None:
    """It would make a note of how far it came."""
    session: Any = cluster
    cancel = Cancellation()
    with writing(session, "", "id", "store:vm", "receiving one", Lease(3600, 0.01, 0.2), cancel) as held:
        try:
            cancel.cancel()
            assert held.lost.wait(30)
            with pytest.raises(StorageUnavailable):
                held.check()
        finally:
            cluster.answer.set()


def test_patience_ends_before_the_lease() -> None:
    for lease in (Lease(), Lease(2, 0.5), Lease(60, 20)):
        assert lease.gives_up < lease.duration
