"""The connection to a Ceph cluster that does not answer: who asks how often, and who waits how long."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from backends.rbd.binding import Binding, Rados
from backends.rbd.cluster import PAUSE_SECONDS, Connection, Where
from replicator.errors import StorageError, StorageUnavailable

WHERE = Where("rbd", Path("/dev/null"), "admin", None)
WAITERS = 8


class CephError(Exception):
    """As the bindings raise them."""

    def __init__(self, code: int) -> None:
        super().__init__(f"[errno {code}] error")
        self.errno = code


class FakeIoctx:
    def __getattr__(self, name: str) -> Any:
        return lambda *_: 1


@dataclass
class FakeRados:
    connecting: Callable[[], None]
    shut_down: bool = False

    def connect(self) -> None:
        self.connecting()

    def get_fsid(self) -> str:
        return "fsid"

    def get_instance_id(self) -> int:
        return 1

    def open_ioctx(self, _pool: str) -> FakeIoctx:
        return FakeIoctx()

    def shutdown(self) -> None:
        assert not self.shut_down
        self.shut_down = True


@dataclass(frozen=True)
class FakeBinding(Binding):
    """``connecting`` is called by each try."""

    connecting: Callable[[], None] = lambda: None
    made: list[FakeRados] = field(default_factory=list)

    def new_connection(self, conffile: Path, user: str, options: Mapping[str, str]) -> Rados:  # noqa: ARG002
        rados: Any = FakeRados(self.connecting)
        self.made.append(rados)
        return rados  # type: ignore[no-any-return]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def connection(connecting: Callable[[], None]) -> tuple[Connection, FakeBinding, Clock]:
    binding, clock = FakeBinding(None, None, (CephError,), connecting), Clock()
    return Connection("pool", WHERE, lambda: binding, clock), binding, clock


def fail(code: int) -> Callable[[], None]:
    def connecting() -> None:
        raise CephError(code)

    return connecting


def ask(made: Connection) -> None:
    with made.session("asking"):
        pass


def test_all_who_ask_meanwhile_share_one_try() -> None:
    begun, go = threading.Event(), threading.Event()

    def connecting() -> None:
        begun.set()
        assert go.wait(30)
        raise CephError(errno.ETIMEDOUT)

    made, binding, _ = connection(connecting)
    told: list[str] = []

    def asking() -> None:
        with pytest.raises(StorageUnavailable) as caught:
            ask(made)
        told.append(caught.value.hint)

    threads = [threading.Thread(target=asking) for _ in range(WAITERS)]
    threads[0].start()
    assert begun.wait(30)
    for thread in threads[1:]:
        thread.start()
    go.set()
    for thread in threads:
        thread.join(30)
    assert len(told) == WAITERS
    assert all("ceph -s" in hint for hint in told)
    assert len(binding.made) == 1
    assert binding.made[0].shut_down


def test_who_asks_just_after_it_is_told_at_once() -> None:
    made, binding, clock = connection(fail(errno.ETIMEDOUT))
    for _ in range(3):
        with pytest.raises(StorageUnavailable, match="cannot be reached"):
            ask(made)
    assert len(binding.made) == 1
    clock.now += PAUSE_SECONDS
    with pytest.raises(StorageUnavailable):
        ask(made)
    assert len(binding.made) == 2


def test_a_key_that_is_refused_is_tried_each_time() -> None:
    made, binding, _ = connection(fail(errno.EACCES))
    for _ in range(2):
        with pytest.raises(StorageError, match="refuses the user's key"):
            ask(made)
    assert len(binding.made) == 2


@pytest.mark.parametrize("code", [errno.EPERM, errno.ESHUTDOWN])
def test_one_whose_user_may_not_is_made_anew(code: int) -> None:
    """He may have got the capability since, which only a new connection has."""
    made, binding, _ = connection(lambda: None)
    with pytest.raises(StorageError), made.session("asking"):
        raise CephError(code)
    ask(made)
    assert [rados.shut_down for rados in binding.made] == [True, False]
    with pytest.raises(StorageError), made.session("asking"):
        raise CephError(errno.ENOENT)
    ask(made)
    assert len(binding.made) == 2


def test_one_that_was_made_is_shared_and_left_once() -> None:
    begun, go = threading.Event(), threading.Event()

    def connecting() -> None:
        begun.set()
        assert go.wait(30)

    made, binding, _ = connection(connecting)
    threads = [threading.Thread(target=ask, args=(made,)) for _ in range(WAITERS)]
    for thread in threads:
        thread.start()
    assert begun.wait(30)
    closing = threading.Thread(target=made.close)
    closing.start()
    go.set()
    for thread in [*threads, closing]:
        thread.join(30)
    made.close()
    assert all(rados.shut_down for rados in binding.made)
