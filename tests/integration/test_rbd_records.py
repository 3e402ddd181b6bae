"""Records of images that others use, on a real cluster: written without asking who has the lock."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from backends.rbd.binding import load
from backends.rbd.cluster import Connection, is_absent
from replicator.errors import NoSuchVolume
from replicator.model import Lineage, Role, VolumeState
from tests.conformance.replicas import DATA, PRIMARY, TAG
from tests.lab.ceph import Cluster
from tests.support.rbd_case import RbdCase

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(300)]
KEY = "replicator.test"


@pytest.fixture
def case(ceph: Cluster) -> Iterator[RbdCase]:
    """An empty storage in a namespace."""
    made = RbdCase(ceph.conf)
    yield made
    made.close()


@contextmanager
def locked(case: RbdCase, volume: str) -> Iterator[Any]:
    """Somebody has an image's exclusive lock and does not give it away; gives the image as he has it."""
    connection = Connection("guest", case.where(), load)
    try:
        with (
            connection.session("having the lock") as session,
            session.image(case.naming.place(volume), read_only=False) as image,
        ):
            image.lock_acquire(session.binding.rbd.RBD_LOCK_MODE_EXCLUSIVE)
            yield image
    finally:
        connection.close()


def seen(case: RbdCase, volume: str) -> VolumeState:
    state = case.backend.state(volume)
    assert state is not None
    return state


def test_who_has_the_lock_is_not_asked(case: RbdCase) -> None:
    case.create("vm", DATA)
    (one, two) = (case.backend.snapshot(("vm",), name)[0] for name in ("one", "two"))
    with locked(case, "vm") as guest:
        case.backend.set_lineage("vm", PRIMARY)
        case.backend.hold("vm", one.ref, TAG)
        case.backend.hold("vm", two.ref, TAG)
        case.backend.release("vm", two.ref, TAG)
        case.backend.release("vm", two.ref, TAG)
        guest.write(b"still his", 0)
        state = seen(case, "vm")
    assert state.lineage == PRIMARY
    assert [version.holds for version in state.snapshots] == [(TAG,), ()]
    with case.image("vm") as image:
        assert image.is_protected_snap("one")
        assert not image.is_protected_snap("two")
    assert case.read("vm").startswith(b"still his")


def test_a_guest_that_writes_all_the_time(case: RbdCase) -> None:
    """Where librbd was seen to wait without end."""
    case.create("vm", DATA)
    (one,) = case.backend.snapshot(("vm",), "one")
    stop, failed = threading.Event(), []

    def write() -> None:
        try:
            with case.image("vm") as image:
                while not stop.is_set():
                    image.write(b"x" * 4096, 0)
        except Exception as error:  # noqa: BLE001 - the test says what it was
            failed.append(error)

    guest = threading.Thread(target=write)
    guest.start()
    try:
        for epoch in range(1, 21):
            lineage = Lineage(PRIMARY.uuid, Role.PRIMARY, epoch)
            case.backend.set_lineage("vm", lineage)
            case.backend.hold("vm", one.ref, TAG)
            assert (seen(case, "vm").lineage, seen(case, "vm").snapshots[0].holds) == (lineage, (TAG,))
            case.backend.release("vm", one.ref, TAG)
    finally:
        stop.set()
        guest.join(60)
    assert not failed
    assert seen(case, "vm").snapshots[0].holds == ()


def test_they_are_what_librbd_reads_and_writes(case: RbdCase) -> None:
    case.create("vm", DATA)
    for value in ("a", "ä" * 2000):
        with case.image("vm") as image, case.session() as session:
            with session.notes(str(case.namespace), image.id()) as notes:
                notes.metadata_set(KEY, value)
                assert dict(image.metadata_list()) == {KEY: value}
                notes.metadata_remove(KEY)
                notes.metadata_remove(KEY)
            assert dict(image.metadata_list()) == {}


def test_an_image_that_is_gone_does_not_come_back(case: RbdCase) -> None:
    case.create("vm", DATA)
    with case.image("vm") as image:
        identity = image.id()
    with case.session() as session, session.ioctx(str(case.namespace)) as ioctx:
        session.pool.remove(ioctx, "vm")
        with session.notes(str(case.namespace), identity) as notes:
            with pytest.raises(session.binding.errors) as caught:
                notes.metadata_set(KEY, "a")
            assert is_absent(caught.value)
            with pytest.raises(session.binding.errors) as caught:
                notes.metadata_remove(KEY)
            assert is_absent(caught.value)
        with pytest.raises(session.binding.errors) as caught:
            ioctx.read(f"rbd_header.{identity}")
        assert is_absent(caught.value)
    with pytest.raises(NoSuchVolume):
        case.backend.set_lineage("vm", PRIMARY)
