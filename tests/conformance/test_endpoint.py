"""Every endpoint, near or far: the same answers, the same errors, the same end state."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from replicator.cancellation import Cancellation
from replicator.endpoint import DigestRequest, Endpoint, PruneRequest, RemoveRequest, SnapshotRequest
from replicator.errors import (
    Cancelled,
    ConfigError,
    ConflictError,
    InvalidName,
    NoSuchSnapshot,
    NoSuchVolume,
    NotAReplica,
    NotAuthorized,
    ReplicatorError,
    StaleEpoch,
    StorageUnavailable,
    Unsupported,
    VolumeBusy,
)
from replicator.model import Capability, Lineage, Role, Version, VersionKind, VersionRef, VolumeId, snapshot_name
from replicator.streams import BLOCK_SIZE, DIGEST_SIZE
from tests.conformance.test_backend import BAD_SNAPSHOTS
from tests.support.blocks import KEY, digests_of, pattern
from tests.support.endpoint_cases import NODE, REPLICA, SOURCE, EndpointCase

SIZE = 5 * BLOCK_SIZE
DATA = pattern(SIZE)
GONE = VersionRef("gone", "0" * 32)
MISSING = VolumeId("store", "two/missing")
TAG = "replicator:vms:one:store"
LINEAGE = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)


@pytest.fixture
def case(near_or_far: EndpointCase) -> EndpointCase:
    """The endpoint, with a volume that has data."""
    near_or_far.storage.create(SOURCE.name, DATA)
    return near_or_far


def little(case: EndpointCase) -> bytes:
    """As little data as a volume can have."""
    return b"x".ljust(case.storage.unit, b"x")


def take(case: EndpointCase, name: str = "one", volume: VolumeId = SOURCE) -> Version:
    (taken,) = case.endpoint.snapshot(SnapshotRequest((volume,), name))
    return taken.get()


def versions(case: EndpointCase, volume: VolumeId = SOURCE) -> tuple[Version, ...]:
    state = case.endpoint.state(volume)
    assert state is not None
    return state.versions


# -- listings


def test_it_is_an_endpoint_of_its_node(case: EndpointCase) -> None:
    assert isinstance(case.endpoint, Endpoint)
    assert case.endpoint.node == NODE


def test_storages(case: EndpointCase) -> None:
    here = case.local.storage("store")
    for found in (case.endpoint.storage("store"), *case.endpoint.storages()):
        assert replace(found, free=here.free, total=here.total) == here
    with pytest.raises(StorageUnavailable) as caught:
        case.endpoint.storage("absent")
    assert caught.value.hint


def test_volumes(case: EndpointCase) -> None:
    case.storage.create("two/other", little(case))
    assert case.endpoint.volumes("store") == case.local.volumes("store")
    assert [v.id.name for v in case.endpoint.volumes("store")] == ["two/other", "vm"]
    with pytest.raises(StorageUnavailable):
        case.endpoint.volumes("absent")


def test_states(case: EndpointCase) -> None:
    case.endpoint.ensure_primary(SOURCE)
    for name in ("one", "two", "three"):
        case.endpoint.hold(SOURCE, take(case, name).ref, TAG)
    assert case.endpoint.state(SOURCE) == case.local.state(SOURCE)
    # A held snapshot of ZFS may have a bookmark beside it.
    assert [v.name for v in versions(case) if v.kind is VersionKind.SNAPSHOT] == ["one", "two", "three"]
    assert case.endpoint.state(MISSING) is None
    with pytest.raises(StorageUnavailable):
        case.endpoint.state(VolumeId("absent", "two/vm"))


def test_many_versions(case: EndpointCase) -> None:
    """More than fits one frame of any sane size, where a snapshot is not a file of its own."""
    many = 3000 if case.storage.backend.kind == "memory" else 40
    case.storage.resize("vm", max(512, case.storage.unit))
    for number in range(many):
        case.storage.backend.snapshot(("vm",), f"{number:05d}-{'x' * 150}")
    assert case.endpoint.state(SOURCE) == case.local.state(SOURCE)
    assert len(versions(case)) == many


@pytest.mark.parametrize(
    "name", ["two/../../etc/passwd", "two//vm", "two/./vm", "two/a\0b", "two/a@b", "two/" + "x" * 201]
)
def test_volume_names_that_are_refused(case: EndpointCase, name: str) -> None:
    volume = VolumeId("store", name)
    for ask in (
        lambda: case.endpoint.state(volume),
        lambda: case.endpoint.states((SOURCE, volume)),
        lambda: case.endpoint.heads((SOURCE, volume)),
        lambda: case.endpoint.snapshot(SnapshotRequest((volume,), "one")),
        lambda: case.endpoint.hold(volume, GONE, TAG),
        lambda: case.endpoint.abort_receive(volume),
        lambda: case.endpoint.set_aside(volume, "diverged-now"),
        lambda: case.endpoint.adopt(volume, LINEAGE),
        lambda: case.endpoint.prune(PruneRequest(volume, "vms", "last=1", ())),
    ):
        with pytest.raises((InvalidName, NotAuthorized)):
            ask()


def test_states_and_heads(case: EndpointCase) -> None:
    case.storage.create(REPLICA.name, DATA)
    one = take(case)
    wanted = (REPLICA, MISSING, SOURCE)
    found = case.endpoint.states(wanted)
    assert [each.volume for each in found] == list(wanted)
    assert [each.get() for each in found] == [case.endpoint.state(volume) for volume in wanted]
    (twice, again) = case.endpoint.states((SOURCE, SOURCE))
    assert twice == again
    heads = case.endpoint.heads(wanted)
    assert set(heads) == set(case.local.heads(wanted))
    assert {head.newest for head in heads if head.volume == SOURCE} <= {one}
    assert case.endpoint.states(()) == ()
    assert case.endpoint.heads(()) == ()


def test_a_storage_that_is_not_there_keeps_nobody_from_the_others(case: EndpointCase) -> None:
    absent = VolumeId("absent", "two/vm")
    found = case.endpoint.states((SOURCE, absent))
    assert found[0].get() == case.endpoint.state(SOURCE)
    with pytest.raises(StorageUnavailable) as caught:
        found[1].get()
    assert caught.value.hint
    assert case.endpoint.state(SOURCE) is not None
    with pytest.raises(StorageUnavailable):
        case.endpoint.heads((SOURCE, absent))


# -- sources


def test_a_source_becomes_a_primary_once(case: EndpointCase) -> None:
    lineage = case.endpoint.ensure_primary(SOURCE)
    assert (lineage.role, lineage.epoch) == (Role.PRIMARY, 1)
    assert case.endpoint.ensure_primary(SOURCE) == lineage
    case.storage.reopen()
    state = case.storage.backend.state("vm")
    assert state is not None
    assert state.lineage == lineage


def test_a_replica_or_nothing_is_no_source(case: EndpointCase) -> None:
    case.storage.create(REPLICA.name, DATA)
    case.storage.backend.set_lineage(REPLICA.name, replace(LINEAGE, role=Role.REPLICA))
    with pytest.raises(ConflictError) as caught:
        case.endpoint.ensure_primary(REPLICA)
    assert caught.value.hint
    with pytest.raises(NoSuchVolume):
        case.endpoint.ensure_primary(MISSING)


def test_snapshots(case: EndpointCase) -> None:
    case.storage.create("other", little(case))
    other = VolumeId("store", "other")
    taken = case.endpoint.snapshot(SnapshotRequest((SOURCE, other), "one"))
    made = tuple(each.get() for each in taken)
    assert [v.size for v in made] == [SIZE, case.storage.unit]
    assert case.endpoint.snapshot(SnapshotRequest((other, SOURCE), "one")) == (taken[1], taken[0])
    assert (versions(case), versions(case, other)) == (made[:1], made[1:])
    assert case.endpoint.snapshot(SnapshotRequest((), "one")) == ()
    absent = VolumeId("absent", "vm")
    try:
        first, gone, second = case.endpoint.snapshot(SnapshotRequest((SOURCE, absent, other), "two"))
    except NotAuthorized:  # the node does not say what storages it has
        first, second = case.endpoint.snapshot(SnapshotRequest((SOURCE, other), "two"))
    else:
        assert (gone.volume, gone.version) == (absent, None)
        assert isinstance(gone.error, StorageUnavailable)
    assert (versions(case)[1:], versions(case, other)[1:]) == ((first.get(),), (second.get(),))


def test_a_volume_without_a_snapshot_keeps_nobody_from_theirs(case: EndpointCase) -> None:
    one, gone = case.endpoint.snapshot(SnapshotRequest((SOURCE, MISSING), "one"))
    assert versions(case) == (one.get(),)
    assert (one.volume, gone.volume, gone.version) == (SOURCE, MISSING, None)
    assert isinstance(gone.error, NoSuchVolume)
    with pytest.raises(NoSuchVolume):
        gone.get()


@pytest.mark.parametrize("name", BAD_SNAPSHOTS)
def test_snapshot_names_that_are_refused(case: EndpointCase, name: str) -> None:
    with pytest.raises(InvalidName):
        take(case, name)
    with pytest.raises(InvalidName):
        case.endpoint.set_aside(VolumeId("store", "two/vm"), name)


def test_estimates(case: EndpointCase) -> None:
    one = take(case)
    assert case.endpoint.estimate(SOURCE, None, one.ref) == case.local.estimate(SOURCE, None, one.ref)
    with pytest.raises(NoSuchSnapshot):
        case.endpoint.estimate(SOURCE, None, GONE)


# -- protection


def test_holds(case: EndpointCase) -> None:
    one = take(case)
    case.endpoint.hold(SOURCE, one.ref, TAG)
    case.endpoint.hold(SOURCE, one.ref, TAG)
    assert versions(case)[0].holds == (TAG,)
    case.endpoint.release(SOURCE, one.ref, TAG)
    case.endpoint.release(SOURCE, one.ref, TAG)
    case.endpoint.release(SOURCE, GONE, TAG)
    assert versions(case) == (one,)
    with pytest.raises(NoSuchSnapshot):
        case.endpoint.hold(SOURCE, GONE, TAG)
    with pytest.raises((InvalidName, NotAuthorized)):
        case.endpoint.hold(SOURCE, one.ref, "replicator:../x")


def pruned(
    case: EndpointCase, keep: str = "last=1", *, protect: tuple[str, ...] = (), dry_run: bool = False
) -> list[str]:
    """What went, by name."""
    outcomes = case.endpoint.prune(PruneRequest(SOURCE, "vms", keep, protect, dry_run))
    assert all(outcome.reason for outcome in outcomes)
    assert not any(outcome.error for outcome in outcomes)
    return [outcome.version.name for outcome in outcomes if not outcome.kept]


def test_pruning(case: EndpointCase) -> None:
    moments = [datetime(2026, 11, 20, 8, minute, tzinfo=UTC) for minute in range(6)]
    ours = [take(case, snapshot_name("vms", moment)) for moment in moments]
    take(case, "by-hand")
    take(case, snapshot_name("other", moments[0]))
    case.endpoint.hold(SOURCE, ours[0].ref, TAG)
    all_of_them = versions(case)
    going = [ours[n].name for n in (2, 3, 4)]
    assert pruned(case, protect=(ours[1].guid,), dry_run=True) == going
    assert versions(case) == all_of_them
    assert pruned(case, "all") == []
    assert pruned(case, protect=(ours[1].guid,)) == going
    assert pruned(case, protect=(ours[1].guid,)) == []
    assert [v.guid for v in versions(case)] == [v.guid for v in all_of_them if v.name not in going]
    with pytest.raises(NoSuchVolume):
        case.endpoint.prune(PruneRequest(MISSING, "vms", "last=1", ()))
    with pytest.raises(ConfigError, match="fortnightly"):
        pruned(case, "fortnightly=1")
    assert len(versions(case)) == 5


def test_pruning_says_why(case: EndpointCase) -> None:
    for minute in range(2):
        take(case, snapshot_name("vms", datetime(2026, 11, 20, 8, minute, tzinfo=UTC)))
    outcomes = case.endpoint.prune(PruneRequest(SOURCE, "vms", "last=1", (), True))
    assert [outcome.reason for outcome in outcomes] == ["destroyed: not kept by last=1", "kept: last 1 of 1"]


# -- digests


def test_digests(case: EndpointCase) -> None:
    one = take(case)
    request = DigestRequest(SOURCE, one.ref, KEY)
    batches = list(case.endpoint.digests(request, Cancellation()))
    assert b"".join(b.digests for b in batches) == digests_of(DATA)
    assert batches[0].offset == 0
    part = replace(request, offset=2 * BLOCK_SIZE, length=BLOCK_SIZE)
    (batch,) = case.endpoint.digests(part, Cancellation())
    assert (batch.offset, batch.digests) == (2 * BLOCK_SIZE, digests_of(DATA)[2 * DIGEST_SIZE : 3 * DIGEST_SIZE])
    small = list(case.endpoint.digests(replace(request, block_size=4096), Cancellation()))
    assert {b.block_size for b in small} == {4096}
    assert sum(len(b) for b in small) == SIZE // 4096


def test_digests_of_nothing(case: EndpointCase) -> None:
    with pytest.raises(NoSuchSnapshot):
        list(case.endpoint.digests(DigestRequest(SOURCE, GONE, KEY), Cancellation()))


def test_digests_left_in_the_middle_or_cancelled(case: EndpointCase) -> None:
    case.storage.create("large", pattern(64 * BLOCK_SIZE))
    volume = VolumeId("store", "large")
    request = DigestRequest(volume, take(case, "one", volume).ref, KEY, block_size=4096)
    for _ in range(5):  # more often than there are connections to lose
        batches = case.endpoint.digests(request, Cancellation())
        next(batches)
        batches.close()  # type: ignore[attr-defined]
    cancel = Cancellation()
    batches = case.endpoint.digests(request, cancel)
    next(batches)
    cancel.cancel()
    with contextlib.suppress(Cancelled):  # unless all of it was on its way already
        list(batches)
    with pytest.raises(Cancelled):
        list(case.endpoint.digests(request, cancel))
    assert case.endpoint.state(SOURCE) is not None


# -- decisions of people


def test_setting_aside_and_adopting(case: EndpointCase) -> None:
    case.storage.create(REPLICA.name, DATA)
    kept = case.endpoint.set_aside(REPLICA, "diverged-now")
    assert kept is not None
    assert case.storage.read_snapshot(REPLICA.name, kept) == DATA
    assert case.endpoint.set_aside(REPLICA, "diverged-later") is None
    for _ in range(2):
        case.endpoint.adopt(REPLICA, LINEAGE)
        state = case.endpoint.state(REPLICA)
        assert state is not None
        assert state.lineage == replace(LINEAGE, role=Role.REPLICA)
    with pytest.raises(StaleEpoch):
        case.endpoint.adopt(REPLICA, replace(LINEAGE, epoch=2))
    case.endpoint.adopt(REPLICA, replace(LINEAGE, epoch=9))
    with pytest.raises(NoSuchVolume):
        case.endpoint.adopt(MISSING, LINEAGE)
    assert case.endpoint.set_aside(MISSING, "diverged-now") is None


def test_removing_a_replica(case: EndpointCase) -> None:
    lineage = replace(LINEAGE, role=Role.REPLICA)
    request = RemoveRequest(REPLICA, "vms", lineage, ())
    case.endpoint.remove(request)
    case.storage.create(REPLICA.name, DATA)
    with pytest.raises(NotAReplica):
        case.endpoint.remove(request)
    assert case.storage.read(REPLICA.name) == DATA
    with pytest.raises(NotAuthorized if case.remote else NotAReplica):
        case.endpoint.remove(replace(request, volume=SOURCE))


def test_clones(case: EndpointCase) -> None:
    case.storage.create(REPLICA.name, DATA)
    one = take(case, "one", REPLICA)
    new = VolumeId("store", "two/clone")
    if Capability.CLONE not in case.endpoint.storage("store").capabilities:
        with pytest.raises(Unsupported):
            case.endpoint.clone(REPLICA, one.ref, new)
        return
    assert case.endpoint.clone(REPLICA, one.ref, new).id == new
    assert case.storage.read(new.name) == DATA
    with pytest.raises(VolumeBusy):
        case.endpoint.clone(REPLICA, one.ref, new)


# -- many at once


def test_several_threads(case: EndpointCase) -> None:
    one = take(case)
    expected = case.local.state(SOURCE)
    failures: list[object] = []

    def ask(work: Callable[[], bool]) -> None:
        try:
            for _ in range(10):
                if not work():
                    failures.append(work)
        except ReplicatorError as error:
            failures.append(error)

    digests = DigestRequest(SOURCE, one.ref, KEY)
    work: list[Callable[[], bool]] = [
        lambda: case.endpoint.state(SOURCE) == expected,
        lambda: len(case.endpoint.volumes("store")) == 1,
        lambda: b"".join(b.digests for b in case.endpoint.digests(digests, Cancellation())) == digests_of(DATA),
    ]
    threads = [threading.Thread(target=ask, args=(each,)) for each in work * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
