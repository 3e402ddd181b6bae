"""Images of a real Ceph cluster: what happens to them there beside replication."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from backends.rbd import RbdBackend
from backends.rbd.binding import Binding, Image, Ioctx, load
from backends.rbd.catalog import read_catalog
from backends.rbd.changes import find_changes
from backends.rbd.cluster import Connection
from backends.rbd.locks import Lease, lock_object, writing
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveRequest, SendRequest
from replicator.errors import (
    ConnectionLost,
    NoSuchSnapshot,
    NotAReplica,
    SnapshotHeld,
    StorageError,
    StorageUnavailable,
    VolumeBusy,
)
from replicator.model import Capability, Role, Version, VersionRef, VolumeId
from replicator.streams import BLOCK_SIZE, BlockChunk
from tests.conformance.replicas import DATA, PRIMARY, SIZE, TAG, asked, first, receive, state_of
from tests.conformance.replicas import VM as REPLICA
from tests.lab.ceph import Cluster
from tests.support.blocks import KEY, apply, changed, full_chunks, make_chunk, make_stream, make_version, pattern
from tests.support.rbd_case import RbdCase
from transport import checksum

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(600)]
SOURCE = VolumeId("store", "vm")


class CountingImage:
    """An image that knows whether it was closed."""

    def __init__(self, inner: Image) -> None:
        self.closed = False
        self._inner = inner

    def close(self) -> None:
        self._inner.close()
        self.closed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@dataclass(frozen=True)
class CountingBinding(Binding):
    """Remembers what was opened."""

    opened: list[CountingImage] = field(default_factory=list)

    def open_image(self, ioctx: Ioctx, name: str, *, read_only: bool) -> Image:
        made: Any = CountingImage(super().open_image(ioctx, name, read_only=read_only))
        self.opened.append(made)
        return made  # type: ignore[no-any-return]


@pytest.fixture
def case(ceph: Cluster) -> Iterator[RbdCase]:
    """An empty storage in a namespace."""
    made = RbdCase(ceph.conf)
    yield made
    made.close()


@pytest.fixture
def whole(ceph: Cluster) -> Iterator[RbdCase]:
    """A storage that is a whole pool, which is empty."""
    if "whole" not in ceph.run("ceph", "osd", "pool", "ls").split():
        ceph.run("ceph", "osd", "pool", "create", "whole", "8")
        ceph.run("rbd", "pool", "init", "whole")
    made = RbdCase(ceph.conf, whole=True)
    yield made
    made.close()


def take(case: RbdCase, name: str, volume: str = "vm") -> Version:
    (version,) = case.backend.snapshot((volume,), name)
    return version


def sent(case: RbdCase, base: Version | None, to: Version, backend: RbdBackend | None = None) -> int:
    """Send, apply, see that the result is the snapshot; the bytes that were carried."""
    old = case.read_snapshot("vm", base) if base else b""
    request = SendRequest(SOURCE, base.ref if base else None, to.ref, KEY)
    done = apply((backend or case.backend).send(request, Cancellation()), old, to.size or 0)
    assert bytes(done.data) == case.read_snapshot("vm", to)
    return done.written


# -- a whole pool


def test_namespaces_are_folders(whole: RbdCase, ceph: Cluster) -> None:
    for volume in ("vm", "prox1/vm", "a/b/vm-1"):
        whole.create(volume, DATA)
        take(whole, "one", volume)
    ceph.run("rbd", "create", "--size", "1M", "whole/50%")
    assert [str(v.id) for v in whole.backend.volumes()] == ["store:a/b/vm-1", "store:prox1/vm", "store:vm"]
    assert any("50%" in warning for warning in whole.backend.info().warnings)
    assert ceph.run("rbd", "ls", "whole/prox1").split() == ["vm"]
    assert ceph.run("rbd", "ls", "whole/a%2Fb").split() == ["vm-1"]
    until = time.monotonic() + 100
    while (info := whole.backend.info()).free == 0:  # the cluster says how much there is for a new pool a while later
        assert time.monotonic() < until, ceph.run("ceph", "df", "detail")
        time.sleep(0.2)
    assert info.total >= info.free
    assert "16." in info.detail or "Ceph" in info.detail


def test_a_replica_and_a_clone_in_namespaces_of_their_own(whole: RbdCase, ceph: Cluster) -> None:
    one = first(whole)
    assert ceph.run("rbd", "ls", "whole/prox1").split() == ["vm"]
    whole.backend.clone(REPLICA.name, one.ref, "vm-copy")
    assert whole.read("vm-copy") == DATA
    assert "replicator.lock" not in ceph.run("rados", "-p", "whole", "--all", "ls")
    whole.backend.destroy(REPLICA.name, one.ref)
    assert whole.read("vm-copy") == DATA


# -- identity


def test_a_snapshot_of_the_same_name_is_another(case: RbdCase) -> None:
    case.create("vm", DATA)
    one = take(case, "one")
    with case.image("vm") as image:
        image.remove_snap("one")
        image.create_snap("one")
    state = case.backend.state("vm")
    assert state is not None
    assert [v.name for v in state.versions] == ["one"]
    assert state.versions[0].guid != one.guid
    with pytest.raises(NoSuchSnapshot):
        sent_to(case, one.ref)


def sent_to(case: RbdCase, to: VersionRef) -> None:
    case.backend.send(SendRequest(SOURCE, None, to, KEY), Cancellation()).close()


def test_a_renamed_snapshot_and_image_are_the_same(case: RbdCase, ceph: Cluster) -> None:
    one = first(case)
    with case.image(REPLICA.name) as image:
        image.rename_snap("one", "renamed")
    assert state_of(case).versions == (replace(one, name="renamed"),)
    case.create("vm", DATA)
    made = take(case, "one")
    ceph.run("rbd", "mv", f"rbd/{case.namespace}/vm", f"rbd/{case.namespace}/vm2")
    state = case.backend.state("vm2")
    assert state is not None
    assert state.versions == (made,)


@pytest.mark.parametrize("way", [("cp",), ("deep", "cp")])
def test_a_copied_image_has_nothing_in_common(case: RbdCase, ceph: Cluster, way: tuple[str, ...]) -> None:
    one = receive(case, asked(make_version("one", SIZE), hold=TAG), make_stream(*full_chunks(DATA)))
    space = f"rbd/{case.namespace}"
    ceph.run("rbd", *way, f"{space}/prox1%2Fvm", f"{space}/copy")
    state = case.backend.state("copy")
    assert state is not None
    assert (state.lineage, state.resume, state.head_changed) == (None, None, False)
    assert one.guid not in {version.guid for version in state.versions}
    assert all(version.holds == () for version in state.versions)
    with pytest.raises(NotAReplica):
        receive(case, replace(asked(make_version("two", SIZE)), volume=VolumeId("store", "copy")), make_stream())


def test_foreign_snapshots_are_versions_and_groups_are_not(case: RbdCase, ceph: Cluster) -> None:
    case.create("vm", DATA)
    space = f"rbd/{case.namespace}"
    ceph.run("rbd", "snap", "create", f"{space}/vm@by-hand")
    ceph.run("rbd", "group", "create", f"{space}/g")
    ceph.run("rbd", "group", "image", "add", f"{space}/g", f"{space}/vm")
    ceph.run("rbd", "group", "snap", "create", f"{space}/g@all")
    state = case.backend.state("vm")
    assert state is not None
    assert [v.name for v in state.versions] == ["by-hand"]
    sent(case, None, state.versions[0])


def test_what_is_held_cannot_be_removed_by_hand(case: RbdCase) -> None:
    case.create("vm", DATA)
    one, two = take(case, "one"), take(case, "two")
    with case.image("vm") as image:
        image.protect_snap("two")
        for version in (one, two):
            case.backend.hold("vm", version.ref, TAG)
        with pytest.raises(load().rbd.ImageBusy):
            image.remove_snap("one")
    for version in (one, two):
        case.backend.release("vm", version.ref, TAG)
    case.backend.destroy("vm", one.ref)
    with pytest.raises(SnapshotHeld, match="protected"):  # by somebody else, before us
        case.backend.destroy("vm", two.ref)
    with case.image("vm") as image:
        image.unprotect_snap("two")
    case.backend.destroy("vm", two.ref)
    with case.image("vm") as image:
        assert [key for key, _ in image.metadata_list()] == []


# -- finding changes


def object_map(case: RbdCase, on: bool) -> None:
    rbd = load().rbd
    with case.image("vm") as image:
        image.update_features(rbd.RBD_FEATURE_OBJECT_MAP | rbd.RBD_FEATURE_FAST_DIFF, on)


def test_images_without_object_map(case: RbdCase) -> None:
    case.create("vm", DATA)
    object_map(case, on=False)
    one = take(case, "one")
    case.write("vm", 3 * BLOCK_SIZE, b"changed")
    two = take(case, "two")
    assert 0 < sent(case, one, two) <= BLOCK_SIZE
    assert case.backend.estimate("vm", one.ref, two.ref) is None
    assert any("object map" in warning for warning in case.backend.info().warnings)
    assert [head.changed for head in case.backend.heads(("vm",))] == [False]
    case.write("vm", 0, b"x")
    assert [head.changed for head in case.backend.heads(("vm",))] == [True]


def test_an_object_map_that_is_not_valid_is_not_believed(case: RbdCase) -> None:
    """One that was switched on later is marked invalid, and says nothing of what was before."""
    case.create("vm", DATA)
    object_map(case, on=False)
    one = take(case, "one")
    case.write("vm", 3 * BLOCK_SIZE, b"changed")
    object_map(case, on=True)
    two = take(case, "two")
    assert sent(case, one, two) <= BLOCK_SIZE
    sent(case, None, two)
    assert any("invalid" in warning for warning in case.backend.info().warnings)


@pytest.mark.parametrize("stripes", [1, 3])
def test_all_changes_are_found(case: RbdCase, stripes: int) -> None:
    """Also of an image that is cut and grown between snapshots, of which librbd's own two passes leave some out."""
    number = random.Random(4 + stripes)
    rbd = load().rbd
    features = 61 | (rbd.RBD_FEATURE_STRIPINGV2 if stripes > 1 else 0)
    options = {"stripe_unit": 16384, "stripe_count": stripes} if stripes > 1 else {}
    most, places = 600_000, []
    with case.session() as session:
        place = case.naming.place("vm")
        with session.ioctx(place.namespace) as ioctx:
            rbd.RBD().create(ioctx, place.image, number.randrange(most), order=16, features=features, **options)
    for round_number in range(7):
        with case.image("vm") as image:
            for _ in range(number.randrange(1, 6)):
                size = image.size()
                what = number.choice("wwdzrr")
                if what == "r":
                    image.resize(number.choice([number.randrange(most), 65536 * number.randrange(9)]))
                elif size:
                    offset = number.randrange(size)
                    length = min(size - offset, number.choice([1, 100, 4096, 65536, 150_000]))
                    if what == "w":
                        image.write(number.randbytes(length), offset)
                    else:
                        (image.discard if what == "d" else image.write_zeroes)(offset, length)
        places.append(take(case, f"s{round_number}"))
        if round_number == 4:
            case.backend.destroy("vm", places.pop(2).ref)
    content = {version.guid: case.read_snapshot("vm", version) for version in places}
    with case.session() as session, case.image("vm", read_only=True) as image:
        found = read_catalog(session, image, "vm")
        for index, newer in enumerate(found.snapshots):
            for older in [None, *found.snapshots[: index + 1]]:
                image.set_snap_by_id(None)
                diff = find_changes(session, image, found.raw, older.raw if older else None, newer.raw)
                diff = replace(diff, whole_window=2 * diff.period, exact_window=diff.period)
                old = content[older.version.guid] if older else b""
                made = bytearray(old[: diff.size].ljust(diff.size, b"\0"))
                for extent in diff.extents():
                    data = bytes(extent.length) if extent.zero else image.read(extent.offset, extent.length)
                    made[extent.offset : extent.end] = data
                assert bytes(made) == content[newer.version.guid], (older, newer)


def test_a_rebuilt_snapshot_is_compared_by_reading(case: RbdCase) -> None:
    """It is newer to RBD than those after it."""
    case.create("vm", DATA)
    one = take(case, "one")
    case.write("vm", 0, b"two")
    two = take(case, "two")
    case.damage("vm", one, 5 * BLOCK_SIZE, b"damage")
    assert 0 < sent(case, one, two) <= 3 * 4096


def test_a_small_discard_reaches_the_replica(case: RbdCase) -> None:
    """4 KiB, which librbd may leave where they are when they are discarded, are zeros on both sides."""
    case.create("vm", DATA)
    one = take(case, "one")
    with case.image("vm") as image:
        image.write_zeroes(4 * BLOCK_SIZE + 4096, 4096)
        image.discard(6 * BLOCK_SIZE, 4096)
    two = take(case, "two")
    for base, to in ((None, one), (one, two)):
        stream = case.backend.send(SendRequest(SOURCE, base.ref if base else None, to.ref, KEY), Cancellation())
        receive(case, asked(to, base), stream)
        assert case.read_snapshot(REPLICA.name, to) == case.read_snapshot("vm", to)
    assert case.read_snapshot("vm", two)[4 * BLOCK_SIZE + 4096 :][:4096] == bytes(4096)


# -- writers


def test_an_image_in_use_is_not_written_to(case: RbdCase) -> None:
    one = first(case)
    request = asked(make_version("two", SIZE), one)
    with case.image(REPLICA.name), pytest.raises(VolumeBusy, match=r"in use by the client at 127\.0\.0\.1"):
        receive(case, request, make_stream())
    receive(case, request, make_stream(make_chunk((0, b"two"))))


def test_nobody_writes_beside_a_receive(case: RbdCase) -> None:
    one = first(case)
    refused: list[object] = []

    def intrude() -> None:
        with pytest.raises((load().rbd.Error, VolumeBusy)) as caught:
            case.write(REPLICA.name, 0, b"intruder")
        refused.append(caught.value)

    stream = make_stream(make_chunk((BLOCK_SIZE, b"two")), meanwhile=intrude)
    two = receive(case, asked(make_version("two", SIZE), one), stream)
    assert refused
    assert case.read_snapshot(REPLICA.name, two) == changed(DATA, [(BLOCK_SIZE, b"two")])


def test_a_second_node_is_refused_and_told_who_it_is(case: RbdCase) -> None:
    one = first(case)
    other = case.open()
    request = asked(make_version("two", SIZE), one)
    refused: list[str] = []

    def meanwhile() -> None:
        with pytest.raises(VolumeBusy) as caught, make_stream() as stream:
            other.receive(request, stream, Cancellation())
        refused.append(str(caught.value))

    receive(case, request, make_stream(make_chunk((0, b"two")), meanwhile=meanwhile))
    other.close()
    assert all("locked by this process itself (receiving two)" in text for text in refused)
    assert refused


def test_another_process_is_called_by_its_name(case: RbdCase) -> None:
    one = first(case)
    with case.session() as session, case.image(REPLICA.name, read_only=True) as image:
        place, key = case.naming.place(REPLICA.name), lock_object(image.id())
        with session.ioctx(place.namespace) as opened:
            ioctx: Any = opened
            ioctx.lock_exclusive(key, "replicator", "cookie", "", 600)
            ioctx.write_full(key, b"prox9, process 17: receiving two\x1b")
            with pytest.raises(VolumeBusy, match=r"in use by prox9, process 17: receiving two\?, so") as caught:
                receive(case, asked(make_version("two", SIZE), one), make_stream())
            assert "wait" in caught.value.hint
            ioctx.remove_object(key)


def test_a_lock_that_is_not_renewed_is_lost(ceph: Cluster) -> None:
    """Who took it goes on; who lost it is stopped."""
    case = RbdCase(ceph.conf, lease=Lease(2, 0.5))
    first(case)
    cancel = Cancellation()
    with case.session() as session, case.image(REPLICA.name, read_only=True) as image:
        place, identity = case.naming.place(REPLICA.name), image.id()
        never = Lease(1, 3600)
        with writing(session, place.namespace, identity, "store:vm", "sleeping", never, cancel):
            receive_once_free(case, asked(make_version("two", SIZE)), ())
        with session.ioctx(place.namespace) as ioctx, pytest.raises(session.binding.rados.ObjectNotFound):
            ioctx.stat(lock_object(identity))  # type: ignore[attr-defined]
        with writing(session, place.namespace, identity, "store:vm", "working", Lease(2, 0.1), cancel) as held:
            with session.ioctx(place.namespace) as ioctx:
                ioctx.remove_object(lock_object(identity))
            assert held.work.wait(30)
            with pytest.raises(StorageUnavailable, match="could not be renewed"):
                held.work.check()
    assert not cancel.cancelled
    case.close()


def test_work_stops_before_its_lease_when_the_cluster_hangs(case: RbdCase, ceph: Cluster) -> None:
    case.create("vm", DATA)
    with case.session() as session, case.image("vm", read_only=True) as image:
        identity, place = image.id(), case.naming.place("vm")
        lease = Lease(3600, 0.1, patience=2)
        with writing(session, place.namespace, identity, "store:vm", "working", lease, Cancellation()) as held:
            ceph.crash("osd")
            try:
                assert held.work.wait(50)  # librados itself ends the renewal after 60 s
            finally:
                ceph.start("osd")
            with pytest.raises(StorageUnavailable, match="has not answered for 2 s"):
                held.check()


# -- users and clusters


def test_reading_is_enough_for_a_source_but_for_its_snapshots(case: RbdCase, ceph: Cluster) -> None:
    case.create("vm", DATA)
    one = take(case, "one")
    case.write("vm", 0, b"two")
    two = take(case, "two")
    keyring = ceph.user("reader", mon="profile rbd", osd=f"profile rbd-read-only pool={case.pool}")
    reader = case.open(case.where("reader", keyring))
    assert [v.id for v in reader.volumes()] == [SOURCE]
    assert reader.state("vm") == case.backend.state("vm")
    sent(case, None, two, reader)
    assert sent(case, one, two, reader) <= BLOCK_SIZE
    assert reader.estimate("vm", one.ref, two.ref)
    (lack,) = reader.lacking(Capability.SEND)
    assert "client.reader" in lack.remedy
    with pytest.raises(StorageError, match="may not") as caught:
        reader.snapshot(("vm",), "three")
    assert "ceph auth caps" in caught.value.hint
    reader.close()


def test_the_documented_capabilities_are_enough_for_a_target(case: RbdCase, ceph: Cluster) -> None:
    keyring = ceph.user("target", mon="profile rbd", osd=f"profile rbd pool={case.pool}")
    case.backend.close()
    case.backend = case.open(case.where("target", keyring))
    assert case.backend.lacking(Capability.RECEIVE) == ()
    one = receive(case, asked(make_version("one", SIZE), hold=TAG), make_stream(*full_chunks(DATA)))
    two = receive(case, asked(make_version("two", SIZE), one), make_stream(make_chunk((0, b"two"))))
    case.backend.release(REPLICA.name, one.ref, TAG)
    case.backend.destroy(REPLICA.name, one.ref)
    case.backend.clone(REPLICA.name, two.ref, "copy")
    assert case.backend.info().detail


def test_a_source_needs_no_right_to_write_data(case: RbdCase, ceph: Cluster) -> None:
    """The capabilities that the README names for a cluster that only has sources."""
    prefixes = ("rbd_header.", "rbd_object_map.", "replicator.")
    caps = [f"profile rbd-read-only pool={case.pool}", "allow class-read object_prefix rbd_children"]
    caps += [f"allow rwx pool={case.pool} object_prefix {prefix}" for prefix in prefixes]
    keyring = ceph.user("sender", mon="profile rbd", osd=", ".join(caps))
    case.create("vm", DATA)
    case.create("bare", DATA)
    case.backend.close()
    case.backend = case.open(case.where("sender", keyring))
    assert case.backend.lacking(Capability.SEND) == ()
    one = take(case, "one")
    with case.image("vm") as guest:  # which has the image's lock
        guest.write(b"two", 0)
        two = take(case, "two")
        guest.write(b"three", 0)
    case.backend.hold("vm", two.ref, TAG)
    sent(case, None, two)
    sent(case, one, two)
    case.backend.release("vm", two.ref, TAG)
    case.backend.destroy("vm", one.ref)
    assert case.backend.heads(("vm",))[0].changed
    sender = Connection("sender", case.where("sender", keyring), load)
    place = case.naming.place("vm")
    with sender.session("overstepping") as session, session.ioctx(place.namespace) as ioctx:
        pool: Any = session.pool
        with session.image(place, read_only=False) as opened:
            image: Any = opened
            with pytest.raises(session.binding.rbd.PermissionError):
                image.write(b"damage", 0)
        for overstep, arguments in ((pool.remove, ("bare",)), (pool.create, ("new", SIZE))):
            with pytest.raises(session.binding.rbd.PermissionError):
                overstep(ioctx, *arguments)
    sender.close()
    assert (case.read("vm"), case.read("bare")) == (changed(DATA, [(0, b"three")]), DATA)


def test_no_cluster_no_key_no_pool(case: RbdCase) -> None:
    good = case.where()
    for where in (
        replace(good, pool="missing"),
        replace(good, user="nobody"),
        replace(good, conffile=good.conffile.with_name("missing.conf")),
        replace(good, keyring=good.conffile.with_name("missing.keyring")),
    ):
        backend = RbdBackend("store", where, checksums=checksum)
        with pytest.raises(StorageError) as caught:
            backend.info()
        assert caught.value.hint
        assert "storage store" in str(caught.value)
        backend.close()


def test_a_blocklisted_connection_is_made_anew(ceph: Cluster) -> None:
    """What it had locked is free once that has expired."""
    case = RbdCase(ceph.conf, lease=Lease(2, 0.5))
    one = first(case)

    def blocklist() -> None:
        with case.image(REPLICA.name, read_only=True) as image:
            for watcher in image.watchers_list():
                ceph.run("ceph", "osd", "blocklist", "add", str(watcher["addr"]), "60")

    to, target = make_version("two", SIZE), pattern(SIZE, seed=5)
    chunks = full_chunks(target)
    stream = make_stream(*chunks, meanwhile=once(blocklist))
    with pytest.raises(StorageError):
        receive(case, asked(to, one), stream)
    state = state_of(case)
    assert state.versions == (one,)
    assert state.lineage is not None
    assert state.lineage.role is Role.REPLICA
    receive_once_free(case, asked(to, one), chunks)
    assert case.read_snapshot(REPLICA.name, to) == target
    assert PRIMARY.epoch == state.lineage.epoch
    case.close()


def receive_once_free(case: RbdCase, request: ReceiveRequest, chunks: Sequence[BlockChunk]) -> Version:
    """Ask until nobody has the volume any more."""
    end = time.monotonic() + 90
    while True:
        try:
            return receive(case, request, make_stream(*chunks))
        except VolumeBusy:
            if time.monotonic() > end:
                raise


def once(what: Callable[[], None]) -> Callable[[], None]:
    """Does it the second time that it is called, and not again."""
    calls = itertools.count()
    return lambda: what() if next(calls) == 1 else None


def test_an_interrupted_receive_leaves_no_locks(case: RbdCase, ceph: Cluster) -> None:
    one = first(case)
    with pytest.raises(ConnectionLost):
        receive(case, asked(make_version("two", SIZE), one), make_stream(then=ConnectionLost("cut")))
    listed = ceph.run("rados", "-p", case.pool, "-N", str(case.namespace), "ls").split()
    assert not [name for name in listed if name.startswith("replicator.lock")]
    case.backend.abort_receive(REPLICA.name)
    with case.image(REPLICA.name) as image:
        assert image.read(0, SIZE) == DATA
    assert not state_of(case).head_changed


def test_streams_close_all_that_they_open(case: RbdCase) -> None:
    """Also what they open while they run: a connection can be left only then."""
    case.create("vm", DATA)
    one = take(case, "one")
    two = take(case, "two")
    case.damage("vm", one, 0, b"damage")
    binding = CountingBinding(load().rados, load().rbd, load().errors)
    backend = RbdBackend("store", case.where(), namespace=case.namespace, checksums=checksum, load=lambda: binding)
    for base in (None, one):
        sent(case, base, two, backend)
        assert binding.opened
        assert all(image.closed for image in binding.opened)
    backend.close()
