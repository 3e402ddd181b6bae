"""Snapshots of many images at one instant, on a real cluster: with writers, in groups of others, cut off anywhere."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from backends.rbd import RbdBackend
from backends.rbd.binding import Binding, Group, Ioctx, load
from backends.rbd.catalog import read_raw
from backends.rbd.cluster import Connection
from backends.rbd.grouping import GROUP
from backends.rbd.naming import BEFORE, HIDDEN
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveRequest, SendRequest, Taken
from replicator.errors import NoSuchSnapshot, NoSuchVolume, SnapshotHeld, StorageError, Unsupported
from replicator.model import Capability, Lineage, Role, Version, VolumeId, VolumeState
from tests.conformance.replicas import DATA, TAG
from tests.lab.ceph import Cluster
from tests.support.blocks import KEY, apply, make_stream, make_version
from tests.support.rbd_case import RbdCase
from tests.support.rbd_cuts import Cut, CutBinding
from transport import checksum

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(600)]
VOLUMES = ("a", "b", "c")
SIZE = 16 << 20


@pytest.fixture
def case(ceph: Cluster) -> Iterator[RbdCase]:
    """An empty storage in a namespace, whose snapshots are taken together."""
    made = RbdCase(ceph.conf, grouped=True)
    yield made
    made.close()


def take(case: RbdCase, name: str, volumes: Sequence[str] = VOLUMES) -> dict[str, Version]:
    taken = case.backend.snapshot_each([(case.backend, tuple(volumes))], name)
    return {each.volume.name: each.get() for each in taken}


def make(case: RbdCase, volumes: Sequence[str] = VOLUMES) -> None:
    for volume in volumes:
        case.create(volume, DATA)
        case.resize(volume, SIZE)


class Writer:
    """Writes the numbers from 1 on, each into one image after the other, over a connection of its own: no image ever
    has a number that one before it has not."""

    def __init__(self, case: RbdCase, volumes: Sequence[str] = VOLUMES) -> None:
        self._case = case
        self._volumes = volumes
        self._stop = threading.Event()
        self._begun = threading.Event()
        self.error: BaseException | None = None
        self.number = 0

    def _run(self) -> None:
        connection = Connection("guest", self._case.where(), load)
        try:
            with connection.session("writing") as session:
                opened = [session.image(self._case.naming.place(v), read_only=False) for v in self._volumes]
                images: list[Any] = [each.__enter__() for each in opened]
                while not self._stop.is_set():
                    self.number += 1
                    for image in images:
                        image.write(self.number.to_bytes(8, "big"), 0)
                    self._begun.set()
                for each in opened:
                    each.__exit__(None, None, None)
        except Exception as error:  # noqa: BLE001 - the test says what it was
            self.error = error
            self._begun.set()
        finally:
            connection.close()

    def goes_on(self) -> bool:
        """Whether it writes another number."""
        self._begun.clear()
        return self._begun.wait(60) and self.error is None

    @contextmanager
    def writing(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        assert self._begun.wait(60)
        try:
            yield
        finally:
            self._stop.set()
            thread.join(60)
            assert self.error is None, self.error


def numbers(case: RbdCase, versions: dict[str, Version]) -> list[int]:
    return [int.from_bytes(case.read_snapshot(v, versions[v])[:8], "big") for v in VOLUMES]


def in_order(found: Sequence[int]) -> bool:
    """Whether these are of one instant: each has what the one after it has, and is one ahead at most."""
    return sorted(found, reverse=True) == list(found) and found[0] - found[-1] <= 1


def clean(case: RbdCase, ceph: Cluster) -> bool:
    """Whether nothing is left of what snapshots are taken with: no group, no hidden snapshot that nothing needs."""
    with case.session() as session, session.ioctx(str(case.namespace)) as ioctx:
        if GROUP in session.pool.group_list(ioctx):
            return False
    for volume in VOLUMES:
        with case.image(volume, read_only=True) as image:
            if image.group()["name"]:
                return False
            raw = list(read_raw(image, image.id()))
            befores, grouped = [r for r in raw if r.name.startswith(HIDDEN)], [r for r in raw if r.grouped]
            versions = state_of(case, volume).versions
            if len(befores) != len(grouped) or len(versions) != sum(1 for r in raw if r not in befores):
                return False
    return "replicator.lock" not in ceph.run("rados", "-p", case.pool, "-N", str(case.namespace), "ls")


# -- one instant


def test_all_snapshots_are_of_one_instant(case: RbdCase, ceph: Cluster) -> None:
    make(case)
    grouped = 0
    with Writer(case).writing():
        for number in range(8):
            found = numbers(case, take(case, f"s{number}"))
            assert in_order(found), found
    for volume in VOLUMES:
        with case.image(volume, read_only=True) as image:
            grouped += sum(raw.grouped for raw in read_raw(image, image.id()))
    assert grouped  # somebody wrote between the two
    assert clean(case, ceph)


def test_one_by_one_they_are_not(ceph: Cluster) -> None:
    """So the check above tells."""
    case = RbdCase(ceph.conf)
    assert Capability.ATOMIC_GROUP not in case.backend.info().capabilities
    make(case)
    with Writer(case).writing():
        found = [numbers(case, take(case, f"s{number}")) for number in range(8)]
    assert not all(in_order(each) for each in found)
    case.close()


def test_the_guest_only_waits(case: RbdCase) -> None:
    make(case)
    writer = Writer(case)
    with writer.writing():
        take(case, "one")
        assert writer.goes_on()


def test_quiet_images_have_snapshots_like_any_other(case: RbdCase, ceph: Cluster) -> None:
    make(case)
    one = take(case, "one")
    for volume in VOLUMES:
        assert "one" in ceph.run("rbd", "snap", "ls", f"{case.pool}/{case.namespace}/{volume}")
        with case.image(volume, read_only=True) as image:
            assert [raw.user for raw in read_raw(image, image.id())] == [True]
        assert state_of(case, volume).versions == (one[volume],)
    assert [head.changed for head in case.backend.heads(VOLUMES)] == [False] * 3
    assert take(case, "one") == one
    assert clean(case, ceph)


# -- versions that are of a group


@contextmanager
def written_between(case: RbdCase, volume: str, *writes: tuple[int, bytes]) -> Iterator[None]:
    """Somebody writes to an image after its first snapshot, before the group's."""
    binding = load()

    class Late:
        def __init__(self, inner: Group) -> None:
            self._inner = inner

        def create_snap(self, name: str) -> None:
            for offset, data in writes:
                case.write(volume, offset, data)
            self._inner.create_snap(name)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    class LateBinding(Binding):
        def open_group(self, ioctx: Ioctx, name: str) -> Group:
            made: Any = Late(super().open_group(ioctx, name))
            return made  # type: ignore[no-any-return]

    old = case.backend
    wrapped = LateBinding(binding.rados, binding.rbd, binding.errors)
    case.backend = RbdBackend(
        case.name, case.where(), namespace=case.namespace, checksums=checksum, grouped=True, load=lambda: wrapped
    )
    try:
        yield
    finally:
        case.backend.close()
        case.backend = old


def sent(case: RbdCase, volume: str, base: Version | None, to: Version) -> int:
    old = case.read_snapshot(volume, base) if base else b""
    request = SendRequest(VolumeId("store", volume), base.ref if base else None, to.ref, KEY)
    done = apply(case.backend.send(request, Cancellation()), old, to.size or 0)
    assert bytes(done.data) == case.read_snapshot(volume, to)
    return done.written


def test_differences_from_what_a_group_has(case: RbdCase, ceph: Cluster) -> None:
    """Also where an object was made between the two, and is gone later: neither the first nor the last has it."""
    make(case)
    with written_between(case, "a", (12 << 20, b"short-lived"), (0, b"between")):
        one = take(case, "one")
    live = case.read("a")
    assert case.read_snapshot("a", one["a"]) == live
    assert live[12 << 20 :][:11] == b"short-lived"
    assert [head.changed for head in case.backend.heads(VOLUMES)] == [False] * 3
    with case.image("a") as image:
        image.discard(12 << 20, 4 << 20)
        image.write(b"later", 5 << 20)
    assert [head.changed for head in case.backend.heads(VOLUMES)] == [True, False, False]
    with written_between(case, "a", (8 << 20, b"x")):
        two = take(case, "two")
    three = take(case, "three")
    assert 0 < sent(case, "a", one["a"], two["a"]) < 1 << 20
    assert sent(case, "a", two["a"], three["a"]) < 1 << 20
    sent(case, "a", one["a"], three["a"])
    sent(case, "a", None, two["a"])
    assert sent(case, "b", one["b"], three["b"]) == 0
    assert clean(case, ceph)


def test_a_diff_from_what_a_group_has(case: RbdCase) -> None:
    """``rbd export-diff`` cannot: it would have to know the base by a name."""
    make(case)
    with written_between(case, "a", (12 << 20, b"short-lived"), (0, b"between")):
        one = take(case, "one")["a"]
    with case.image("a") as image:
        assert [raw.grouped for raw in read_raw(image, image.id())] == [False, True]
        image.discard(12 << 20, 4 << 20)
        image.write(b"later", 5 << 20)
    two = take(case, "two")["a"]
    content, carried = bytearray(case.read_snapshot("a", one)), 0
    assert isinstance(case.backend, RbdBackend)
    with case.backend.diff("a", one.ref, two.ref, Cancellation()) as pieces:
        place = 0
        for piece in pieces:
            place = max(place, piece.record.offset)
            data = bytes(piece.record.length) if piece.record.zero else bytes(piece.data)
            content[place : place + len(data)] = data
            place, carried = place + len(data), carried + len(piece.data)
    assert bytes(content) == case.read_snapshot("a", two)
    assert carried < 2 << 20  # of a new object, all before its last byte


def test_a_diff_whose_anchor_is_removed_has_no_end(case: RbdCase) -> None:
    make(case)
    with written_between(case, "a", (0, b"between")):
        one = take(case, "one")["a"]
    case.write("a", 5 << 20, b"later")
    two = take(case, "two")["a"]
    assert isinstance(case.backend, RbdBackend)
    with case.backend.diff("a", one.ref, two.ref, Cancellation()) as pieces:
        next(pieces)
        with case.image("a") as image:
            image.remove_snap(next(raw.name for raw in read_raw(image, image.id()) if raw.name.startswith(BEFORE)))
        with pytest.raises(NoSuchSnapshot):
            list(pieces)


def test_no_replica_becomes_a_clone_of_what_a_group_has(case: RbdCase) -> None:
    """A primary that went back to being a replica has such snapshots."""
    make(case)
    with written_between(case, "a", (0, b"between")):
        one = take(case, "one")["a"]
    case.backend.set_lineage("a", Lineage("a" * 32, Role.REPLICA, 2))
    wanted = ReceiveRequest(
        VolumeId("store", "copy"),
        Lineage("c" * 32, Role.PRIMARY, 1),
        one.ref,
        make_version("first", SIZE),
        KEY,
        origin=VolumeId("store", "a"),
    )
    with pytest.raises(Unsupported, match="in a group") as caught, make_stream() as stream:
        case.backend.receive(wanted, stream, Cancellation())
    assert "rbd flatten" in caught.value.hint
    assert case.backend.state("copy") is None


def test_holds_and_removal_of_what_a_group_has(case: RbdCase, ceph: Cluster) -> None:
    make(case)
    with written_between(case, "a", (0, b"between")):
        one = take(case, "one")
    case.backend.hold("a", one["a"].ref, TAG)
    assert state_of(case, "a").versions[0].holds == (TAG,)
    with pytest.raises(SnapshotHeld, match=TAG):
        case.backend.destroy("a", one["a"].ref)
    with case.image("a") as image:
        (grouped,) = (raw for raw in read_raw(image, image.id()) if raw.grouped)
        with pytest.raises(load().rbd.ImageNotFound):
            image.remove_snap(grouped.name)
    with pytest.raises(Unsupported):
        case.backend.clone("a", one["a"].ref, "copy")
    case.backend.release("a", one["a"].ref, TAG)
    case.backend.destroy("a", one["a"].ref)
    with case.image("a") as image:
        assert list(image.list_snaps()) == []
        assert list(image.metadata_list()) == []
    assert state_of(case, "b").versions == (one["b"],)
    assert clean(case, ceph)


def test_random_changes(case: RbdCase, ceph: Cluster, soak: bool) -> None:
    """Whatever is written, zeroed, cut and grown, before, between and after: differences are right."""
    random_source = random.Random(11)
    volumes = ("a", "b")
    make(case)

    def change() -> None:
        with case.image("a") as image:
            for _ in range(random_source.randrange(6)):
                size = image.size()
                kind = random_source.choice(("write", "write", "discard", "resize"))
                offset = random_source.randrange(max(1, size))
                length = min(random_source.choice((4096, 65536, 4 << 20)), size - offset)
                if kind == "resize":
                    image.resize(random_source.randrange(1, 6) * (3 << 20))
                elif length and kind == "write":
                    image.write(random_source.randbytes(length), offset)
                elif length:
                    image.discard(offset, length)

    taken: list[Version] = []
    for number in range(60 if soak else 6):
        with written_between(case, "a", *((random_source.randrange(12 << 20), b"w") for _ in range(number % 3))):
            taken.append(take(case, f"s{number}", volumes)["a"])
        change()
    for base in taken:
        for to in taken:
            if base.position < to.position:
                sent(case, "a", base, to)
    for version in random_source.sample(taken, len(taken) // 2):  # also where anchors went with others
        case.backend.destroy("a", version.ref)
        taken.remove(version)
    for base, to in itertools.pairwise(taken):
        sent(case, "a", base, to)
    assert clean(case, ceph)


# -- what cannot be


def test_one_that_fails_keeps_nobody(case: RbdCase, ceph: Cluster) -> None:
    make(case)
    case.backend.set_lineage("b", Lineage("5f0c2f6e-95a3-4b39-9d2e-0e6ff3a6c111", Role.REPLICA, 1))
    taken = case.backend.snapshot_each([(case.backend, ("a", "b", "gone", "c"))], "one")
    assert [type(each.error) for each in taken] == [type(None), NoSuchVolume, NoSuchVolume, type(None)]
    assert clean(case, ceph)


def test_an_image_without_exclusive_lock(case: RbdCase, ceph: Cluster) -> None:
    make(case)
    path = f"{case.pool}/{case.namespace}/c"
    ceph.run("rbd", "feature", "disable", path, "fast-diff", "object-map", "exclusive-lock")
    assert len(take(case, "one")) == 3
    warnings = case.backend.info().warnings
    assert any("store:c" in warning and "no exclusive lock" in warning for warning in warnings), warnings
    assert not any("store:a" in warning for warning in warnings)
    assert clean(case, ceph)


def test_a_group_of_somebody_else(case: RbdCase, ceph: Cluster) -> None:
    """What is in it is of one instant; it stays as it is, and its other images get nothing."""
    make(case)
    place = f"{case.pool}/{case.namespace}"
    ceph.run("rbd", "group", "create", f"{place}/theirs")
    for volume in ("a", "b", "c"):
        ceph.run("rbd", "group", "image", "add", f"{place}/theirs", f"{place}/{volume}")
    ceph.run("rbd", "group", "snap", "create", f"{place}/theirs@mine")
    with written_between(case, "a", (0, b"between")):
        one = take(case, "one", ("a", "b"))
    assert case.backend.info().warnings == ()
    assert ceph.run("rbd", "group", "image", "ls", f"{place}/theirs").split() == [f"{place}/{v}" for v in "abc"]
    assert "mine" in ceph.run("rbd", "group", "snap", "ls", f"{place}/theirs")
    assert HIDDEN not in ceph.run("rbd", "group", "snap", "ls", f"{place}/theirs")
    with case.image("c", read_only=True) as image:
        assert [snap["group"]["snap_name"] for snap in image.list_snaps()] == ["mine"]
    assert case.read_snapshot("a", one["a"]) == case.read("a")
    case.create("d", DATA)
    take(case, "two", ("a", "b", "d"))
    warnings = case.backend.info().warnings
    assert any("store:d" in w or "group theirs" in w for w in warnings), warnings
    assert [v.name for v in state_of(case, "d").versions] == ["two"]


def test_a_guest_that_does_not_give_its_lock_away(case: RbdCase, ceph: Cluster) -> None:
    """There is nothing to make it wait with: they are taken one after the other, and that is said."""
    make(case)
    with case.image("b") as image:
        image.lock_acquire(load().rbd.RBD_LOCK_MODE_EXCLUSIVE)
        assert len(take(case, "one")) == 3
        assert any("one after the other" in warning for warning in case.backend.info().warnings)
    take(case, "two")
    assert not any("one after the other" in warning for warning in case.backend.info().warnings)
    assert clean(case, ceph)


def test_two_pools(case: RbdCase, ceph: Cluster) -> None:
    """A group goes across pools, where the namespaces have one name."""
    if "second" not in ceph.run("ceph", "osd", "pool", "ls").split():
        ceph.run("ceph", "osd", "pool", "create", "second", "8")
        ceph.run("rbd", "pool", "init", "second")
    ceph.run("rbd", "namespace", "create", f"second/{case.namespace}")
    make(case, ("a", "b"))
    other = RbdCase(ceph.conf, name="other", grouped=True, pool="second", namespace=case.namespace)
    other.create("c", DATA)
    assert case.backend.pool == other.backend.pool
    parts = [(case.backend, ("a", "b")), (other.backend, ("c",))]
    taken = case.backend.snapshot_each(parts, "one")
    assert case.backend.info().warnings == ()
    assert [str(each.volume) for each in taken] == ["store:a", "store:b", "other:c"]
    assert state_of(other, "c").versions == (taken[2].get(),)
    other.close()


def test_two_at_once(case: RbdCase, ceph: Cluster) -> None:
    """Two nodes, or two jobs: one waits for the other, and each has an instant of its own."""
    make(case)
    found: dict[str, tuple[Taken, ...]] = {}
    others = [case.open() for _ in range(3)]

    def work(number: int) -> None:
        backend = others[number]
        found[f"s{number}"] = backend.snapshot_each([(backend, VOLUMES)], f"s{number}")

    with Writer(case).writing():
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(200)
    assert sorted(found) == ["s0", "s1", "s2"]
    for taken in found.values():
        values = numbers(case, {each.volume.name: each.get() for each in taken})
        assert in_order(values), values
    assert clean(case, ceph)
    for backend in others:
        assert backend.info().warnings == ()
        backend.close()


def test_the_documented_rights_are_enough(case: RbdCase, ceph: Cluster) -> None:
    make(case)
    keyring = ceph.user("grouper", mon="profile rbd", osd=f"profile rbd pool={case.pool}")
    backend = case.open(case.where("grouper", keyring))
    taken = backend.snapshot_each([(backend, VOLUMES)], "one")
    assert [each.error for each in taken] == [None] * 3
    assert backend.info().warnings == ()
    backend.close()
    assert clean(case, ceph)


# -- cut off


def late_cut(case: RbdCase, cut: Cut) -> Binding:
    """One that is cut, and somebody writes to ``a`` in between: of that the group's snapshot becomes the version."""
    real = load()

    class LateCut(CutBinding):
        def open_group(self, ioctx: Ioctx, name: str) -> Group:
            inner: Any = super().open_group(ioctx, name)

            class Late:
                def create_snap(self, name: str) -> None:
                    case.write("a", 0, uuid.uuid4().bytes)
                    inner.create_snap(name)

                def __getattr__(self, name: str) -> Any:
                    return getattr(inner, name)

            made: Any = Late()
            return made  # type: ignore[no-any-return]

    return LateCut(real.rados, real.rbd, real.errors, cut)


def free(case: RbdCase) -> None:
    """The lock of who was cut off would be free a minute later."""
    with case.session() as session, session.ioctx(str(case.namespace)) as ioctx:
        try:
            ioctx.remove_object("replicator.lock.group")
        except session.binding.errors:
            return


def check_the_next_one(case: RbdCase, ceph: Cluster, old: dict[str, Version], name: str) -> None:
    """What is left is removed by it; what is a version by then stays one."""
    free(case)
    before = {volume: state_of(case, volume).versions for volume in VOLUMES}
    new = take(case, name)
    assert clean(case, ceph)
    for volume in VOLUMES:
        state = state_of(case, volume)
        assert state.versions == (*before[volume], new[volume])
        assert state.versions[0] == old[volume]
        assert case.read_snapshot(volume, new[volume]) == case.read(volume)
        for version in state.versions[1:]:
            case.backend.destroy(volume, version.ref)


def state_of(case: RbdCase, volume: str) -> VolumeState:
    state = case.backend.state(volume)
    assert state is not None
    return state


def test_cut_off_anywhere(case: RbdCase, ceph: Cluster, soak: bool) -> None:
    make(case)
    with written_between(case, "a", (0, b"first")):
        old = take(case, "old")
    done, at = False, 0
    while not done:
        cut = Cut(at)
        binding = late_cut(case, cut)
        backend = RbdBackend(
            case.name,
            case.where(),
            namespace=case.namespace,
            checksums=checksum,
            grouped=True,
            load=lambda binding=binding: binding,  # type: ignore[misc]
        )
        try:
            taken = backend.snapshot_each([(backend, VOLUMES)], f"cut{at}")
            done = all(each.error is None for each in taken) and len(cut.done) < at
        except StorageError:
            done = False
        finally:
            backend.close()
        check_the_next_one(case, ceph, old, f"new{at}")
        at += 1 if soak else 3
    assert at > 15


WORKER = """
import sys
from pathlib import Path
from tests.support.rbd_case import RbdCase
case = RbdCase(Path(sys.argv[1]), grouped=True, namespace=sys.argv[2])
for number in range(1000):
    case.backend.snapshot_each([(case.backend, ("a", "b", "c"))], f"{sys.argv[3]}-{number}")
    print(number, flush=True)
"""


def test_killed_while_it_takes_them(case: RbdCase, ceph: Cluster, soak: bool) -> None:
    make(case)
    old = take(case, "old")
    moments = random.Random(7)
    with Writer(case).writing():
        for number in range(20 if soak else 2):
            argv = [sys.executable, "-c", WORKER, str(case.conf), str(case.namespace), f"k{number}"]
            with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as worker:
                assert worker.stdout is not None
                assert worker.stdout.readline()
                threading.Event().wait(moments.uniform(0, 2))
                worker.kill()
            free(case)
            found = numbers(case, take(case, f"s{number}"))
            assert in_order(found), found
            assert clean(case, ceph)
    for volume in VOLUMES:
        assert state_of(case, volume).versions[0] == old[volume]
