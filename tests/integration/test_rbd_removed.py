"""A snapshot of a real Ceph cluster that is removed while it is read: what is read of it then is zeros, or newer
data, and no error. So nothing that was read is believed then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from backends.rbd import RbdBackend
from backends.rbd.binding import Binding, Completion, Image, Ioctx, load
from replicator.cancellation import Cancellation
from replicator.endpoint import DigestRequest, SendRequest
from replicator.errors import NoSuchSnapshot
from replicator.model import Version, VolumeId
from replicator.streams import BLOCK_SIZE
from tests.conformance.replicas import DATA, SIZE, asked, first, receive, state_of
from tests.conformance.replicas import VM as REPLICA
from tests.lab.ceph import Cluster
from tests.support.blocks import KEY, apply, full_chunks, make_chunk, make_stream, make_version, pattern
from tests.support.rbd_case import RbdCase, purge
from transport import checksum

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(300)]
VM = VolumeId("store", "vm")


class _Image:
    """An image at whose first read something happens."""

    def __init__(self, inner: Image, happens: list[Callable[[], None]]) -> None:
        self._inner = inner
        self._happens = happens

    def aio_read(self, offset: int, length: int, oncomplete: Callable[..., None], advice: int) -> Completion:
        while self._happens:
            self._happens.pop()()
        return self._inner.aio_read(offset, length, oncomplete, advice)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True)
class EventfulBinding(Binding):
    """The real one; ``happens`` is done at the first read."""

    happens: list[Callable[[], None]] = field(default_factory=list)

    def open_image(self, ioctx: Ioctx, name: str, *, read_only: bool) -> Image:
        """An image at whose first read something happens."""
        made: Any = _Image(super().open_image(ioctx, name, read_only=read_only), self.happens)
        return made  # type: ignore[no-any-return]


@pytest.fixture
def case(ceph: Cluster) -> Iterator[RbdCase]:
    """A storage in a namespace, with a volume."""
    made = RbdCase(ceph.conf)
    made.create("vm", DATA)
    yield made
    made.close()


def take(case: RbdCase, name: str) -> Version:
    (version,) = case.backend.snapshot(("vm",), name)
    return version


def remove(case: RbdCase, name: str, volume: str = "vm") -> Callable[[], None]:
    """As an operator does it by hand."""

    def do() -> None:
        with case.image(volume) as image:
            if image.is_protected_snap(name):
                image.unprotect_snap(name)
            image.remove_snap(name)

    return do


def remove_image(case: RbdCase) -> None:
    with case.session() as session:
        place = case.naming.place("vm")
        purge(session, place)
        with session.ioctx(place.namespace) as ioctx:
            session.pool.remove(ioctx, place.image)


def eventful(case: RbdCase, happens: Callable[[], None]) -> RbdBackend:
    real = load()
    binding = EventfulBinding(real.rados, real.rbd, real.errors, [happens])
    return RbdBackend("store", case.where(), namespace=case.namespace, checksums=checksum, load=lambda: binding)


@pytest.mark.parametrize("gone", ["sent", "base", "image"])
def test_while_it_is_sent(case: RbdCase, gone: str) -> None:
    one = take(case, "one")
    case.write("vm", 0, b"two")
    two = take(case, "two")
    happens = {"sent": remove(case, "two"), "base": remove(case, "one"), "image": lambda: remove_image(case)}[gone]
    backend = eventful(case, happens)
    with pytest.raises(NoSuchSnapshot, match="removed") as caught:
        apply(backend.send(SendRequest(VM, one.ref, two.ref, KEY), Cancellation()), DATA, SIZE)
    assert caught.value.hint
    backend.close()


def test_while_its_digests_are_made(case: RbdCase) -> None:
    one = take(case, "one")
    backend = eventful(case, remove(case, "one"))
    with pytest.raises(NoSuchSnapshot, match="removed"):
        list(backend.digests(DigestRequest(VM, one.ref, KEY, BLOCK_SIZE), Cancellation()))
    backend.close()


def test_while_the_head_of_a_replica_is_put_back_to_it(case: RbdCase) -> None:
    one = first(case)
    data = pattern(SIZE, seed=9)
    two = make_version("two", SIZE)
    case.write(REPLICA.name, 0, b"intruder")
    backend = eventful(case, remove(case, "one", REPLICA.name))
    with pytest.raises(NoSuchSnapshot, match="removed"), make_stream(make_chunk((BLOCK_SIZE, b"two"))) as stream:
        backend.receive(asked(two, one), stream, Cancellation())
    backend.close()
    assert state_of(case).versions == ()
    receive(case, asked(two), make_stream(*full_chunks(data)))
    assert case.read_snapshot(REPLICA.name, two) == data


def test_records_of_it_go_with_the_next_one(case: RbdCase) -> None:
    one = take(case, "one")
    case.backend.hold("vm", one.ref, "replicator:j:b:copies")
    remove(case, "one")()
    two = take(case, "two")
    case.backend.hold("vm", two.ref, "replicator:j:b:copies")
    with case.image("vm", read_only=True) as image:
        numbers = {key.split(".")[2] for key, _ in image.metadata_list() if key.startswith("replicator.")}
        assert numbers == {str(snapshot["id"]) for snapshot in image.list_snaps()}
