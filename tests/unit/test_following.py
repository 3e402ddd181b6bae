"""Sources that were renamed, cloned or made anew, and what their replicas become. Real driver, storages in memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import cast

import pytest

from backends.memory import CAPABILITIES, MemoryBackend
from replicator.cancellation import Cancellation
from replicator.conflicts import Recreated
from replicator.control import Orphan
from replicator.endpoint import Endpoint, PruneRequest, ReceiveRequest, SendRequest, SnapshotRequest
from replicator.errors import (
    ConflictError,
    NotAReplica,
    SnapshotHeld,
    StaleEpoch,
    StaleResume,
    Unsupported,
    VolumeBusy,
)
from replicator.local import LocalEndpoint, PeerView
from replicator.mending import Mender, Results
from replicator.model import (
    Capability,
    Lineage,
    Origin,
    Property,
    Role,
    StorageInfo,
    StreamKind,
    Version,
    VersionRef,
    VolumeId,
    VolumeInfo,
    VolumeState,
    clone_tag,
    hold_tag,
    replica_volume,
)
from replicator.orphans import find_orphans
from replicator.planning import Intermediates, Plan, SendPolicy
from replicator.replication import Options, Outcome, Pair, Replication
from replicator.runs import Runner, ready_tasks
from replicator.selection import SnapshotPatterns
from replicator.settings import Job
from replicator.streams import Chunk, ChunkStream, NativeChunk, Stream
from replicator.tasks import Task
from replicator.tracker import ReplicaKey, Tracker
from tests.support.blocks import pattern
from tests.support.faults import Crash, Fault, FaultyEndpoint, Point
from tests.support.versions import LINEAGE, OTHER_LINEAGE, TAG, snap
from transport import checksum

SIZE = 64 * 4096
TANK = "tank"


@dataclass
class World:
    """A source and a target node, each with a storage in memory."""

    source: MemoryBackend = field(default_factory=lambda: MemoryBackend(TANK, checksums=checksum))
    target: MemoryBackend = field(default_factory=lambda: MemoryBackend("backup", checksums=checksum))
    fault: FaultyEndpoint | None = None

    def __post_init__(self) -> None:
        self.here = LocalEndpoint("prox1", {TANK: self.source})
        self.there = FaultyEndpoint(LocalEndpoint("prox2", {"backup": self.target}))

    def pair(self, volume: str, *, same_path: bool = False) -> Pair:
        of = VolumeId(TANK, volume)
        replica = replica_volume("prox1", of, "backup", same_path=same_path)
        return Pair(self.here, of, self.there, replica, hold_tag("vms", "prox2", "backup"))

    def replication(self, volume: str, *, same_path: bool = False) -> Replication:
        options = Options(SendPolicy(Intermediates.ALL))
        pair = self.pair(volume, same_path=same_path)
        return Replication(pair, options, observer=lambda _: None, cancel=Cancellation())

    def sync(self, volume: str, snapshot: str = "", *, same_path: bool = False) -> Outcome:
        if snapshot:
            self.here.snapshot(SnapshotRequest((VolumeId(TANK, volume),), snapshot))
        return self.replication(volume, same_path=same_path).run()

    def replicas(self) -> list[str]:
        return [volume.id.name for volume in self.target.volumes()]

    def versions(self, replica: str) -> list[str]:
        state = self.target.state(replica)
        assert state is not None
        return [version.name for version in state.versions]


@pytest.fixture
def world() -> World:
    """With a volume ``vm`` and its replica."""
    made = World()
    made.source.create("vm", pattern(SIZE))
    made.sync("vm", "one")
    return made


# -- renamed


@pytest.mark.parametrize("when", ["looked", "renamed"])
def test_a_replica_that_moves_with_its_parent_just_then(
    world: World, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    old, new = VolumeId("backup", "prox1/vm"), VolumeId("backup", "prox1/web/vm")
    looked, renamed = world.target.state, world.target.rename

    def state(name: str) -> VolumeState | None:
        found = looked(name)
        if found is not None and name == old.name:
            renamed(old.name, new.name)
        return found

    def rename(name: str, to: str) -> None:
        renamed(name, to)
        renamed(name, to)

    monkeypatch.setattr(world.target, *(("state", state) if when == "looked" else ("rename", rename)))
    LocalEndpoint("prox2", {"backup": world.target}).rename(old, new)
    assert world.replicas() == [new.name]


def test_a_target_that_lists_what_is_not_there_is_not_asked_for_ever(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.source.rename("vm", "web/vm")
    listed = world.target.volumes()
    monkeypatch.setattr(world.target, "volumes", lambda: listed)
    monkeypatch.setattr(world.target, "state", lambda _: None)
    with pytest.raises(VolumeBusy, match="is listed, and is not there"):
        world.replication("web/vm").plan()


def test_the_replica_of_a_renamed_volume_gets_its_new_name(world: World) -> None:
    world.source.rename("vm", "web/vm")
    world.source.write("web/vm", 0, b"new")
    found, _, _ = world.replication("web/vm").plan()
    assert isinstance(found, Plan)
    assert found.renamed == VolumeId("backup", "prox1/vm")
    assert "becomes backup:prox1/web/vm" in found.notes[0]
    assert world.replicas() == ["prox1/vm"], "a plan changes nothing"
    outcome = world.sync("web/vm", "two")
    assert world.replicas() == ["prox1/web/vm"]
    assert world.versions("prox1/web/vm") == ["one", "two"]
    assert outcome.done < SIZE, "not all again"


class Forgetful(LocalEndpoint):
    """A source that continues nothing."""

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        if request.resume is not None:
            raise StaleResume("it was begun from another dataset", hint="")
        return super().send(request, cancel)


def test_what_the_source_does_not_continue_is_discarded(world: World) -> None:
    world.source.create("other", pattern(SIZE))
    world.here.snapshot(SnapshotRequest((VolumeId(TANK, "other"),), "one"))
    world.there.fault = Fault("receive", Point.CUT, Crash("kill -9"), chunks=1)
    with pytest.raises(Crash):
        world.sync("other")
    begun = world.target.state("prox1/other")
    assert begun is not None
    assert begun.resume is not None
    world.here = Forgetful("prox1", {TANK: world.source})
    outcome = world.sync("other")
    assert (outcome.steps, outcome.attempts) == (1, 2)
    assert world.versions("prox1/other") == ["one"]


@pytest.mark.parametrize("point", [Point.BEFORE, Point.AFTER])
def test_a_rename_that_is_cut_off_is_done_by_the_next_run(world: World, point: Point) -> None:
    world.source.rename("vm", "new")
    world.there.fault = Fault("rename", point, Crash("kill -9"))
    with pytest.raises(Crash):
        world.sync("new", "two")
    assert world.sync("new").steps == 1
    assert world.replicas() == ["prox1/new"]


def test_a_replica_moves_when_the_path_setting_changes(world: World) -> None:
    world.sync("vm", "two", same_path=True)
    assert world.replicas() == ["vm"]
    world.sync("vm", "three")
    assert world.replicas() == ["prox1/vm"]
    assert world.versions("prox1/vm") == ["one", "two", "three"]


def test_what_a_resync_kept_aside_is_not_followed(world: World) -> None:
    world.target.rename("prox1/vm", "prox1/vm-diverged-20261120T081710.123Z")
    world.sync("vm", "two")
    assert world.replicas() == ["prox1/vm", "prox1/vm-diverged-20261120T081710.123Z"]


def test_nothing_is_renamed_where_the_storage_cannot(world: World) -> None:
    world.target.capabilities = CAPABILITIES & ~Capability.RENAME
    world.source.rename("vm", "new")
    world.sync("new", "two")
    assert world.replicas() == ["prox1/new", "prox1/vm"]
    with pytest.raises(Unsupported):
        world.there.rename(VolumeId("backup", "prox1/vm"), VolumeId("backup", "x"))


def test_two_volumes_that_changed_their_names_are_for_people(world: World) -> None:
    world.source.create("db", pattern(SIZE, 2))
    world.sync("db", "first")
    world.source.rename("vm", "away")
    world.source.rename("db", "vm")
    found, _, _ = world.replication("vm").plan()
    assert isinstance(found, Recreated)
    assert found.elsewhere == VolumeId("backup", "prox1/db")
    with pytest.raises(ConflictError, match="backup:prox1/db") as caught:
        world.sync("vm", "two")
    assert caught.value.kind == "recreated"
    assert world.versions("prox1/vm") == ["one"]
    world.target.rename("prox1/vm", "prox1/elsewhere")
    world.sync("vm")
    world.source.rename("away", "db")
    world.sync("db", "three")
    assert world.replicas() == ["prox1/db", "prox1/vm"]
    assert world.versions("prox1/db") == ["one", "three"]


def test_a_superseded_source_renames_nothing(world: World) -> None:
    world.source.rename("vm", "new")
    world.target.set_lineage("prox1/vm", Lineage(lineage(world, "new"), Role.REPLICA, 9))
    with pytest.raises(ConflictError) as caught:
        world.sync("new", "two")
    assert caught.value.kind == "stale_epoch"
    assert world.replicas() == ["prox1/vm"]


def lineage(world: World, volume: str) -> str:
    state = world.source.state(volume)
    assert state is not None
    assert state.lineage is not None
    return state.lineage.uuid


def test_only_replicas_are_renamed_and_nothing_is_overwritten(world: World) -> None:
    new = VolumeId("backup", "prox1/new")
    with pytest.raises(NotAReplica):
        world.here.rename(VolumeId(TANK, "vm"), VolumeId(TANK, "new"))
    world.target.create("prox1/new", b"own")
    with pytest.raises(NotAReplica):
        world.there.rename(VolumeId("backup", "prox1/vm"), new)
    assert world.target.read("prox1/new") == b"own"
    with pytest.raises(Unsupported):
        world.there.rename(VolumeId("backup", "prox1/vm"), VolumeId("other", "x"))


# -- made anew


def test_a_volume_made_anew_is_never_sent_over_the_old_replica(world: World) -> None:
    world.source.rename("vm", "gone")
    world.source.create("vm", pattern(SIZE, 3))
    world.target.capabilities = CAPABILITIES & ~Capability.RENAME
    with pytest.raises(ConflictError, match="made anew") as caught:
        world.sync("vm", "fresh")
    assert caught.value.kind == "recreated"
    assert world.versions("prox1/vm") == ["one"]
    assert world.replicas() == ["prox1/vm"]


# -- clones


class Side:
    """A node with native volumes, as far as clones need it: what it was asked, in order."""

    def __init__(self, node: str, *states: VolumeState) -> None:
        self.node = node
        self.states = {state.id: state for state in states}
        self.asked: list[tuple[str, VolumeId, str]] = []
        self.received: list[ReceiveRequest] = []
        self.error: Exception | None = None
        self.size: int | None = None
        self.free = 0

    def estimate(
        self, _volume: VolumeId, _base: VersionRef | None, to: VersionRef, *, intermediates: bool = False
    ) -> int | None:
        self.asked.append((f"estimate {to.guid}{' and between' if intermediates else ''}", _volume, ""))
        return self.size

    def storage(self, name: str) -> StorageInfo:
        able = Capability.SEND | Capability.RECEIVE | Capability.ORIGINS | Capability.PROPERTIES
        return StorageInfo(name, "zfs", StreamKind.NATIVE, able, 0, self.free, "")

    def volumes(self, _storage: str) -> tuple[object, ...]:
        return ()

    def state(self, volume: VolumeId) -> VolumeState | None:
        return self.states.get(volume)

    def ensure_primary(self, volume: VolumeId) -> Lineage:
        found = self.states[volume].lineage
        assert found is not None
        return found

    def properties(self, volume: VolumeId) -> tuple[Property, ...]:
        self.asked.append(("properties", volume, ""))
        return (Property("compression", "zstd"),)

    def hold(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        assert any(v.guid == version.guid for v in self.states[volume].versions)
        self.asked.append((f"hold {version.guid}", volume, tag))

    def release(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        self.asked.append((f"release {version.guid}", volume, tag))

    def send(self, request: SendRequest, _cancel: Cancellation) -> Stream:
        assert request.base is not None
        chunks: Iterator[Chunk] = iter([NativeChunk(request.to.guid.encode())])
        return ChunkStream(StreamKind.NATIVE, chunks)

    def receive(self, request: ReceiveRequest, stream: Stream, _cancel: Cancellation) -> Version:
        list(stream)
        self.received.append(request)
        if self.error is not None:
            raise self.error
        assert request.lineage is not None
        before = self.states.get(request.volume)
        versions = (*(before.versions if before else ()), request.to)
        replica = replace(request.lineage, role=Role.REPLICA)
        self.states[request.volume] = VolumeState(request.volume, None, versions, replica)
        return request.to


TEMPLATE, CLONE = VolumeId(TANK, "template"), VolumeId(TANK, "clone")
REPLICA, COPY = VolumeId("backup", "prox1/template"), VolumeId("backup", "prox1/clone")


def cloned(*target: VolumeState) -> tuple[Side, Side, Replication]:
    mine, clones = Lineage(LINEAGE, Role.PRIMARY, 1), Lineage(OTHER_LINEAGE, Role.PRIMARY, 1)
    source = Side(
        "prox1",
        VolumeState(TEMPLATE, None, (snap(1, name="base"), snap(2)), mine),
        VolumeState(CLONE, None, (snap(3), snap(4)), clones, origin=Origin(TEMPLATE, "base")),
    )
    there = Side("prox2", *target)
    pair = Pair(cast(Endpoint, source), CLONE, cast(Endpoint, there), COPY, TAG)
    options = Options(SendPolicy())
    return source, there, Replication(pair, options, observer=lambda _: None, cancel=Cancellation())


def replica(*versions: Version, uuid: str = LINEAGE, role: Role = Role.REPLICA) -> VolumeState:
    return VolumeState(REPLICA, None, versions, Lineage(uuid, role, 1))


def test_a_clone_is_sent_onto_the_replica_of_its_origin() -> None:
    source, target, replication = cloned(replica(snap(1, name="renamed there"), snap(2)))
    replication.run()
    first, second = target.received
    assert (first.origin, first.base, first.to) == (REPLICA, snap(1, name="renamed there").ref, snap(3))
    assert (second.origin, second.base) == (None, snap(3).ref)
    assert first.properties == second.properties == (Property("compression", "zstd"),)
    assert [ask for ask in source.asked if ask[0] == "properties"] == [("properties", CLONE, "")], "asked once"
    tag = clone_tag(TAG)
    assert [ask for ask in source.asked if ask[2] == tag] == [
        ("hold guid1", TEMPLATE, tag),
        ("release guid1", TEMPLATE, tag),
    ]
    assert [ask for ask in target.asked if ask[2] == tag] == [
        ("hold guid1", REPLICA, tag),
        ("release guid1", REPLICA, tag),
    ]
    found, _, _ = replication.plan()
    assert isinstance(found, Plan)
    assert found.up_to_date


@pytest.mark.parametrize(
    "there",
    [
        (),
        (replica(snap(2)),),
        (replica(snap(1), uuid=OTHER_LINEAGE),),
        (replica(snap(1), role=Role.PRIMARY),),
        (replace(replica(snap(1)), lineage=None),),
    ],
)
def test_a_clone_without_its_origin_there_is_sent_in_full(there: tuple[VolumeState, ...]) -> None:
    _, _, replication = cloned(*there)
    found, _, _ = replication.plan()
    assert isinstance(found, Plan)
    assert [step.clone for step in found.steps] == [None, None]
    assert "in full" in found.notes[0]


def test_a_hold_that_an_interrupted_clone_left_is_released_by_its_origin() -> None:
    tag = clone_tag(TAG)
    source, target, replication = cloned(replica(snap(1), snap(2)))
    target.error = Crash("kill -9")
    with pytest.raises(Crash):
        replication.run()
    held = replace(snap(1, name="base"), holds=(tag,))
    source.states[TEMPLATE] = replace(source.states[TEMPLATE], versions=(held, snap(2)))
    target.states[REPLICA] = replica(replace(snap(1), holds=(tag,)), snap(2))
    pair = Pair(cast(Endpoint, source), TEMPLATE, cast(Endpoint, target), REPLICA, TAG)
    Replication(pair, Options(SendPolicy()), observer=lambda _: None, cancel=Cancellation()).run()
    assert ("release guid1", TEMPLATE, tag) in source.asked
    assert ("release guid1", REPLICA, tag) in target.asked


def task(name: str, target: str, origin: str = "") -> Task:
    volume = VolumeId(TANK, name)
    pair = Pair(cast(Endpoint, None), volume, cast(Endpoint, None), VolumeId("backup", f"prox1/{name}"), TAG)
    of = VolumeId(TANK, origin) if origin else None
    return Task(cast("object", None), ReplicaKey("vms", str(volume), target), pair, "prox2", of)  # type: ignore[arg-type]


def test_a_clone_goes_after_its_origin_target_by_target() -> None:
    tasks = [task(name, target, origin) for target in ("a", "b") for name, origin in
             (("clone", "template"), ("template", ""), ("of a clone", "clone"), ("other", "elsewhere"))]  # fmt: skip

    def ready(waiting: list[Task], running: list[Task]) -> set[tuple[str, str]]:
        return {(key.volume.removeprefix("tank:"), key.target) for key in ready_tasks(waiting, running)}

    assert ready(tasks, []) == {("template", "a"), ("other", "a"), ("template", "b"), ("other", "b")}
    left = [item for item in tasks if item.key.volume not in ("tank:template", "tank:other")]
    assert ready(left, [tasks[1]]) == {("clone", "b")}
    assert ready(left, []) == {("clone", "a"), ("clone", "b")}
    circle = [task("x", "a", "y"), task("y", "a", "x")]
    assert len(ready_tasks(circle, [])) == 2, "a peer may say so; nobody waits for ever"


# -- foreign snapshots


def test_foreign_snapshots_are_sent_by_their_names_and_never_destroyed(world: World) -> None:
    for name in ("autosnap_1_daily", "autosnap_1_hourly", "by hand"):
        world.here.snapshot(SnapshotRequest((VolumeId(TANK, "vm"),), name))
    names = [f"replicator_vms_20261120T0800{n:02d}.000Z" for n in range(3)]
    for name in names:
        world.here.snapshot(SnapshotRequest((VolumeId(TANK, "vm"),), name))
    world.here.snapshot(SnapshotRequest((VolumeId(TANK, "vm"),), "autosnap_2_daily"))
    foreign = SnapshotPatterns.parse(["autosnap_*", "!*_hourly"])
    policy = SendPolicy(Intermediates.NEWEST, "vms", foreign)
    Replication(world.pair("vm"), Options(policy), observer=lambda _: None, cancel=Cancellation()).run()
    sent = ["one", "autosnap_1_daily", names[2], "autosnap_2_daily"]
    assert world.versions("prox1/vm") == sent
    for endpoint, volume in ((world.here, VolumeId(TANK, "vm")), (world.there, VolumeId("backup", "prox1/vm"))):
        outcomes = endpoint.prune(PruneRequest(volume, "vms", "last=1", ()))
        assert all(o.kept for o in outcomes if o.version.job is None)
    assert world.versions("prox1/vm") == sent
    everything = SendPolicy(Intermediates.NEWEST, "vms", SnapshotPatterns.parse(["*"]))
    other_job = snap(9, job="other")
    assert not everything.selects(other_job), "other jobs have their own targets"


# -- a peer among volumes of this node's own


def test_a_peer_with_the_same_paths_changes_replicas_only(world: World) -> None:
    world.target.create("own", b"own")
    world.target.rename("prox1/vm", "vm")
    own, theirs = VolumeId("backup", "own"), VolumeId("backup", "vm")
    (one,) = world.target.snapshot(("own",), "replicator_vms_20261120T080000.000Z")
    peer = LocalEndpoint("prox2", {"backup": world.target}).for_peer(
        PeerView("prox1", replicas_only=frozenset({"backup"}))
    )
    epoch = Lineage(lineage(world, "vm"), Role.PRIMARY, 1)
    for lineage_ in (None, Lineage(OTHER_LINEAGE, Role.PRIMARY, 1)):
        if lineage_ is not None:
            world.target.set_lineage("own", lineage_)
        for refused in (
            lambda: peer.adopt(own, epoch),
            lambda: peer.set_aside(own, "diverged-x"),
            lambda: peer.abort_receive(own),
            lambda: peer.clone(own, one.ref, VolumeId("backup", "new")),
            lambda: peer.prune(PruneRequest(own, "vms", "last=1", ())),
            lambda: peer.hold(own, one.ref, "replicator:x"),
            lambda: peer.release(own, one.ref, "replicator:x"),
            lambda: peer.rename(own, VolumeId("backup", "new")),
        ):
            with pytest.raises(NotAReplica):
                refused()
    peer.adopt(theirs, replace(epoch, epoch=2))
    with pytest.raises(StaleEpoch):
        peer.adopt(theirs, epoch)
    pulling = LocalEndpoint("prox2", {"backup": world.target}).for_peer(
        PeerView("prox1", replicas_only=frozenset({"backup"}), sources=frozenset({"backup"}))
    )
    pulling.hold(own, one.ref, "replicator:x")
    with pytest.raises(NotAReplica):
        pulling.adopt(own, epoch)


def test_the_origin_of_a_clone_is_no_failure_of_pruning(world: World) -> None:
    def held(_volume: str, version: VersionRef) -> None:
        raise SnapshotHeld(f"{version.name} is what a clone began as", hint="")

    for name in ("20261120T080000", "20261120T080001"):
        world.source.snapshot(("vm",), f"replicator_vms_{name}.000Z")
    world.source.destroy = held  # type: ignore[assignment,method-assign]
    outcomes = world.here.prune(PruneRequest(VolumeId(TANK, "vm"), "vms", "last=1", ()))
    told = next(o for o in outcomes if "clone" in o.reason)
    assert (told.kept, told.error) == (True, "")


# -- sources that are gone


def listed(name: str, role: Role | None = Role.REPLICA) -> VolumeInfo:
    return VolumeInfo(VolumeId("backup", name), None, Lineage(LINEAGE, role, 1) if role else None)


@pytest.mark.parametrize("path", ["node", "same"])
def test_replicas_without_a_source_are_shown(path: str) -> None:
    table = {
        "name": "vms", "source": {"volumes": ["tank:*", "!*-swap"]}, "targets": ["prox2:backup"],
        "replica_path": path,
    }  # fmt: skip
    job = Job.model_validate(table, context={"node": "prox1"})
    place = "" if path == "same" else "prox1/"
    volumes = [
        listed(f"{place}vm"),
        listed(f"{place}gone"),
        listed(f"{place}gone-swap"),
        listed(f"{place}gone-diverged-20261120T081710.123Z"),
        listed(f"{place}own", None),
        listed(f"{place}primary", Role.PRIMARY),
    ]
    volumes += [listed("prox3/other")] if place else []
    found = find_orphans(job, job.targets[0], frozenset({VolumeId(TANK, "vm")}), volumes)
    assert found == (Orphan("vms", "tank:gone", "prox2:backup", f"backup:{place}gone"),)


# -- what a resync says beforehand


def effects(pair: Pair) -> list[str]:
    item = Task(cast("object", None), ReplicaKey("vms", str(pair.source_volume), "prox2:backup"), pair, "prox2")  # type: ignore[arg-type]
    runner = SimpleNamespace(tracker=Tracker())
    return list(Mender(cast("Runner", runner), cast("Results", None)).effects(item))


def test_a_resync_says_what_sending_everything_takes() -> None:
    source, target, replication = cloned(VolumeState(COPY, None, (snap(8),), Lineage(OTHER_LINEAGE, Role.REPLICA, 1)))
    pair = replication._pair
    source.size, target.free = 5 << 30, 7 << 30
    told = effects(pair)
    assert any("everything is sent anew (about 5.00 GiB; 7.00 GiB are free there)" in line for line in told), told
    assert any("backup:prox1/clone-diverged-<time>" in line for line in told)
    target.free = 3 << 30
    assert any("3.00 GiB are free there, which is too little" in line for line in effects(pair))
    source.size = None
    assert any("(3.00 GiB are free there)" in line for line in effects(pair))
    del target.states[COPY]
    assert any("has nothing yet: everything is sent (3.00 GiB" in line for line in effects(pair))


def test_a_resync_of_a_renamed_volume_says_so(world: World) -> None:
    world.source.rename("vm", "new")
    told = effects(world.pair("new"))
    assert "the replica backup:prox1/vm becomes prox2/backup:prox1/new" in told
