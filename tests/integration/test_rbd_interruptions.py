"""A receive into an RBD image that is cut off at every change that it makes: what is listed is whole, what was complete
is not lost, and the next one brings it to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from backends.rbd import RbdBackend
from backends.rbd.naming import HIDDEN
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import ReplicatorError, StorageError
from replicator.model import Version
from replicator.streams import BLOCK_SIZE, Stream
from tests.conformance.replicas import DATA, SIZE, TAG, VM, asked, first, receive, rest_of, state_of
from tests.lab.ceph import Cluster
from tests.support.blocks import changed, full_chunks, make_chunk, make_stream, make_version
from tests.support.rbd_case import RbdCase
from tests.support.rbd_cuts import Cut, cut_binding
from transport import checksum

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(900)]
TWO = changed(DATA, [(0, b"two"), (5 * BLOCK_SIZE, BLOCK_SIZE)])


@pytest.fixture
def case(ceph: Cluster) -> Iterator[RbdCase]:
    """A storage in a namespace."""
    made = RbdCase(ceph.conf)
    yield made
    made.close()


def change() -> Stream:
    """What makes DATA into TWO."""
    return make_stream(make_chunk((0, b"two")), make_chunk((5 * BLOCK_SIZE, BLOCK_SIZE)))


def cut_off(case: RbdCase, cut: Cut, do: Callable[[RbdBackend], object]) -> bool:
    """Do it over a connection that is cut; whether it was done all the same."""
    backend = RbdBackend(case.name, case.where(), namespace=case.namespace, checksums=checksum, load=cut_binding(cut))
    try:
        do(backend)
    except StorageError:
        return False
    finally:
        backend.close()
    return True


def received(request: ReceiveRequest, stream: Callable[[], Stream]) -> Callable[[RbdBackend], object]:
    def do(backend: RbdBackend) -> object:
        with stream() as opened:
            return backend.receive(request, opened, Cancellation())

    return do


def check_listing(case: RbdCase, contents: dict[str, bytes]) -> set[str]:
    """All that is listed is whole, and the head is nobody's; the guids."""
    state = case.backend.state(VM.name)
    if state is None:
        return set()
    assert not state.head_changed
    for version in state.versions:
        if version.guid in contents:
            assert case.read_snapshot(VM.name, version) == contents[version.guid]
    assert len({version.name for version in state.versions}) == len(state.versions)
    return {version.guid for version in state.versions}


def finish(case: RbdCase, to: Version, base: Version | None, data: bytes, full: Callable[[], Stream]) -> Version:
    """As a run does: continue what can be, or begin anew."""
    state = case.backend.state(VM.name)
    resume = state.resume if state is not None else None
    stream = rest_of(data, resume) if resume is not None else full()
    return receive(case, asked(to, base, resume=resume, hold=TAG), stream)


def check_tidy(case: RbdCase) -> None:
    """Nothing of ours is left but what belongs to a version."""
    with case.image(VM.name, read_only=True) as image:
        snapshots = {snapshot["id"]: snapshot["name"] for snapshot in image.list_snaps()}
        hidden = [name for name in snapshots.values() if name.startswith(HIDDEN) and "head-" not in name]
        keys = [key for key, _ in image.metadata_list()]
    assert not hidden
    assert "replicator.partial" not in keys
    for key in keys:
        if key.startswith(("replicator.snapshot.", "replicator.hold.", "replicator.protected.")):
            assert int(key.split(".")[2]) in snapshots


def steps_of(case: RbdCase, do: Callable[[RbdBackend], object]) -> list[str]:
    """The changes that it makes when nothing cuts it."""
    cut = Cut()
    assert cut_off(case, cut, do)
    return cut.done


def test_a_first_copy(ceph: Cluster) -> None:
    number, total = 0, 1
    while number < total:
        case = RbdCase(ceph.conf)
        to = make_version("one", SIZE)
        request = asked(to, hold=TAG)
        full = lambda: make_stream(*full_chunks(DATA))  # noqa: E731
        if number == 0:
            total = len(steps_of(case, received(request, full)))
            case.close()
            case = RbdCase(ceph.conf)
        done = cut_off(case, Cut(number), received(request, full))
        assert not done
        assert check_listing(case, {to.guid: DATA}) <= {to.guid}
        made = finish(case, to, None, DATA, full)
        assert case.read_snapshot(VM.name, made) == DATA
        assert made.holds == (TAG,)
        assert state_of(case).versions == (made,)
        check_tidy(case)
        case.close()
        number += 1


def test_an_increment(case: RbdCase) -> None:
    one = first(case)
    total = len(steps_of(case, received(asked(make_version("zero", SIZE), one, hold=TAG), change)))
    assert total > 6
    for number in range(total):
        to = make_version(f"two-{number}", SIZE)
        done = cut_off(case, Cut(number), received(asked(to, one, hold=TAG), change))
        assert not done
        assert one.guid in check_listing(case, {one.guid: DATA, to.guid: TWO})
        made = finish(case, to, one, TWO, change)
        assert case.read_snapshot(VM.name, made) == TWO
        assert case.read_snapshot(VM.name, one) == DATA
        assert (state_of(case).resume, state_of(case).head_changed) == (None, False)
        check_tidy(case)
        case.backend.release(VM.name, made.ref, TAG)
        case.backend.destroy(VM.name, made.ref)
        assert state_of(case).versions[0] == one


def test_a_rebuild(case: RbdCase) -> None:
    one = first(case)
    two = receive(case, asked(make_version("two", SIZE), one, hold=TAG), change())
    three = receive(case, asked(make_version("three", SIZE), two), make_stream(make_chunk((9, b"three"))))
    right = changed(TWO, [(9, b"three")])

    def rebuild(number: int) -> ReceiveRequest:
        return asked(two, two, mode=ReceiveMode.REBUILD, aside=f"diverged-{number}", hold="tag")

    def stream() -> Stream:
        return make_stream(make_chunk((0, TWO[:BLOCK_SIZE])))

    case.damage(VM.name, two, 77, b"damage")
    total = len(steps_of(case, received(rebuild(999), stream)))
    assert total > 12
    for number in range(total):
        case.damage(VM.name, two, 77, b"damage")
        assert not cut_off(case, Cut(number), received(rebuild(number), stream))
        found = check_listing_of_rebuild(case)
        assert {one.guid, two.guid, three.guid} <= found
        made = receive(case, rebuild(number + 1000), stream())
        assert set(made.holds) == {TAG, "tag"}
        assert case.read_snapshot(VM.name, two) == TWO
        assert case.read_snapshot(VM.name, three) == right
        assert (state_of(case).resume, state_of(case).head_changed) == (None, False)
        names = [version.name for version in state_of(case).versions]
        assert (names[0], names[-2:]) == ("one", ["two", "three"])
        assert all(name.startswith("diverged-") for name in names[1:-2])
        check_tidy(case)
        for version in state_of(case).versions:
            if version.is_diverged:
                case.backend.destroy(VM.name, version.ref)


def check_listing_of_rebuild(case: RbdCase) -> set[str]:
    state = state_of(case)
    assert state.resume is None
    assert len({version.name for version in state.versions}) == len(state.versions)
    return {version.guid for version in state.versions}


def test_discarding(case: RbdCase) -> None:
    one = first(case)

    def begin() -> None:
        with pytest.raises(ReplicatorError):
            receive(case, asked(make_version("two", SIZE), one), half())

    def half() -> Stream:
        return make_stream(*full_chunks(TWO)[:2], then=StorageError("cut"))

    begin()
    total = len(steps_of(case, lambda backend: backend.abort_receive(VM.name)))
    for number in range(total):
        begin()
        assert not cut_off(case, Cut(number), lambda backend: backend.abort_receive(VM.name))
        assert check_listing(case, {one.guid: DATA}) == {one.guid}
        case.backend.abort_receive(VM.name)
        state = state_of(case)
        assert (state.resume, state.head_changed, state.versions) == (None, False, (one,))
        assert case.read(VM.name) == DATA
        check_tidy(case)
