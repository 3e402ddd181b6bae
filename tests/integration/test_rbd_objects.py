"""Small pieces of one object in one operation, on a real cluster: nothing that librbd would have done is missing."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator

import pytest

from backends.rbd.cluster import Session
from backends.rbd.objects import objects_of
from replicator.cancellation import Cancellation
from replicator.endpoint import SendRequest
from replicator.errors import ReplicatorError
from replicator.model import VolumeId
from tests.conformance.replicas import VM, asked, receive
from tests.lab.ceph import Cluster
from tests.support.blocks import KEY, apply, changed, make_chunk, make_stream, make_version, pattern
from tests.support.rbd_case import RbdCase

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(600)]
OBJECT = 4 << 20
SIZE = 4 * OBJECT
PAGE = 4096


@pytest.fixture
def case(ceph: Cluster) -> Iterator[RbdCase]:
    """An empty storage in a namespace."""
    made = RbdCase(ceph.conf)
    yield made
    made.close()


def scattered(count: int, seed: int) -> list[tuple[int, bytes]]:
    """Pages in all objects but the last: some more than fit one operation."""
    step = 3 * OBJECT // count // PAGE * PAGE
    return [(number * step, pattern(PAGE, seed + number)) for number in range(count)]


def operations(ceph: Cluster) -> int:
    """Writing operations that the OSD has done."""
    counted = json.loads(ceph.run("ceph", "tell", "osd.0", "perf", "dump"))["osd"]
    return int(counted["op_w"])


def spec(case: RbdCase) -> str:
    place = case.naming.place(VM.name)
    return f"{case.pool}/{place.namespace}/{place.image}"


def test_scattered_pages_are_few_operations(case: RbdCase, ceph: Cluster) -> None:
    base = random.Random(1).randbytes(SIZE)
    one, two, three = (make_version(name, SIZE) for name in ("one", "two", "three"))
    chunks = [make_chunk((at, base[at : at + (1 << 20)])) for at in range(0, SIZE, 1 << 20)]
    receive(case, asked(one), make_stream(*chunks))
    before = operations(ceph)
    first, second = scattered(300, 1), scattered(150, 500)
    receive(case, asked(two, one), make_stream(make_chunk(*first[:200]), make_chunk(*first[200:])))
    assert operations(ceph) - before < 60
    receive(case, asked(three, two), make_stream(make_chunk(*second)))
    # The snapshots before are what they were.
    assert case.read_snapshot(VM.name, one) == base
    assert case.read_snapshot(VM.name, two) == changed(base, first)
    assert case.read_snapshot(VM.name, three) == changed(changed(base, first), second)
    # The object maps know of every object that was written to, and are right.
    names = {line.split()[1] for line in ceph.run("rbd", "snap", "ls", spec(case)).splitlines()[1:]}
    assert names == {"one", "two", "three"}
    for snapshot in ("", "@one", "@two", "@three"):
        ceph.run("rbd", "object-map", "check", f"{spec(case)}{snapshot}")
        assert "invalid" not in ceph.run("rbd", "info", f"{spec(case)}{snapshot}")
    request = SendRequest(VolumeId("store", VM.name), two.ref, three.ref, KEY)
    found = apply(case.backend.send(request, Cancellation()), changed(base, first), SIZE)
    assert bytes(found.data) == changed(changed(base, first), second)


def test_new_objects_are_known(case: RbdCase, ceph: Cluster) -> None:
    one, two = (make_version(name, SIZE) for name in ("one", "two"))
    receive(case, asked(one), make_stream())
    pages = scattered(100, 1)
    receive(case, asked(two, one), make_stream(make_chunk(*pages), make_chunk((3 * OBJECT - 50, 100))))
    assert case.read_snapshot(VM.name, one) == bytes(SIZE)
    assert case.read_snapshot(VM.name, two) == changed(bytes(SIZE), pages)
    ceph.run("rbd", "object-map", "check", f"{spec(case)}@two")
    assert "invalid" not in ceph.run("rbd", "info", f"{spec(case)}@two")


def make_image(session: Session, case: RbdCase, name: str, **options: object) -> None:
    with session.ioctx(case.namespace or "") as ioctx:
        session.binding.rbd.RBD().create(ioctx, name, SIZE, old_format=False, **options)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"features": 61}, True),
        ({"features": 1}, False),  # nothing keeps other writers away
        ({"features": 61 | 64}, False),  # every write has to be in the journal first
        ({"features": 61, "stripe_unit": 65536, "stripe_count": 4}, False),
        ({"features": 61, "data_pool": "objects-data"}, True),
    ],
    ids=["plain", "no lock", "journal", "striped", "data pool"],
)
def test_which_images_are_written_to_so(
    case: RbdCase, ceph: Cluster, options: dict[str, object], allowed: bool
) -> None:
    if "data_pool" in options:
        ceph.run("ceph", "osd", "pool", "create", str(options["data_pool"]), "4")
    with case.session() as session:
        make_image(session, case, "vm", **options)
        place = case.naming.place("vm")
        with session.image(place, read_only=False) as image, objects_of(session, place.namespace, image) as objects:
            assert (objects is not None) is allowed
            if objects is None:
                return
            image.aio_write(b"first", 0, lambda _: None)
            image.flush()
            done = objects.write(0, [(10, b"second"), (4000, b"third")], lambda _: None)
            done.wait_for_complete()  # type: ignore[attr-defined]
            assert done.get_return_value() == 0
        head = case.read("vm")
    assert head[:5] + head[10:16] + head[4000:4005] == b"firstsecondthird"


def test_a_clone_is_left_to_librbd(case: RbdCase) -> None:
    case.create("vm", pattern(PAGE))
    version = case.backend.snapshot(("vm",), "replicator_vms_20261120T080000.000Z")[0]
    case.backend.clone("vm", version.ref, "clone")
    with case.session() as session:
        place = case.naming.place("clone")
        with session.image(place, read_only=False) as image, objects_of(session, place.namespace, image) as objects:
            assert objects is None


def test_who_loses_the_lock_cannot_write_to_objects(case: RbdCase, ceph: Cluster) -> None:
    """Another client takes the exclusive lock away in the middle: no piece arrives after that."""
    base = random.Random(1).randbytes(SIZE)
    one, two = (make_version(name, SIZE) for name in ("one", "two"))
    receive(
        case, asked(one), make_stream(*(make_chunk((at, base[at : at + PAGE])) for at in range(0, SIZE, PAGE * 64)))
    )
    taken: list[bytes] = []

    def intrude() -> None:
        if taken:
            return
        with case.session() as session, session.image(case.naming.place(VM.name), read_only=False) as image:
            rbd = session.binding.rbd
            (owner,) = image.lock_get_owners()
            image.lock_break(rbd.RBD_LOCK_MODE_EXCLUSIVE, owner["owner"])  # type: ignore[attr-defined]
            image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
            taken.append(b"taken")

    with pytest.raises(ReplicatorError):
        receive(case, asked(two, one), make_stream(make_chunk(*scattered(100, 1)), meanwhile=intrude))
    assert taken
    assert all(case.read(VM.name)[at : at + PAGE] != data for at, data in scattered(100, 1))
