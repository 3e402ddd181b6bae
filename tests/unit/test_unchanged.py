"""Runs over volumes that do not change: no snapshot, nothing sent, and a lag that is right."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, NoReturn, cast

import pytest

from backends.memory import CAPABILITIES, MemoryBackend
from replicator import config, pruning
from replicator.cancellation import Cancellation
from replicator.control import RunReport
from replicator.endpoint import Endpoint, Head, SnapshotRequest, Taken
from replicator.engine import Engine
from replicator.errors import NoSpace, StorageUnavailable
from replicator.local import LocalEndpoint
from replicator.model import Capability, Lineage, Progress, Role, Version, VersionKind, VolumeId, snapshot_name
from replicator.planning import SendPolicy
from replicator.pruning import Tidying, source_request, target_request
from replicator.replication import Limits
from replicator.runs import Runner
from replicator.settings import Job
from replicator.settling import settled
from replicator.tracker import ReplicaKey, Tracker
from scheduler.limits import Slots
from tests.support.faults import Fault, FaultyEndpoint, Point
from tests.support.versions import at
from transport import checksum

VOLUMES = ("vm-1", "vm-2", "vm-3")
START = datetime(2026, 11, 20, 8, tzinfo=UTC)
CONFIG = """
[node]
name = "a"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[storage.store]
kind = "zfs"
root = "tank/vm"
[peer.b]
address = "10.99.0.2:8571"
[peer.c]
address = "10.99.0.3:8571"
[job.vms]
source = "store:*"
targets = {targets}
{rest}
"""


class Watched(FaultyEndpoint):
    """Notes every call, and does something just before one of them."""

    def __init__(self, inner: Endpoint) -> None:
        super().__init__(inner)
        self.calls: list[str] = []
        self.before: dict[str, Callable[[], None]] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or name in ("calls", "before", "fault", "node"):
            return found
        self.calls.append(name)
        act = self.before.pop(name, None)
        if act is not None:
            act()
        return found


class World:
    """Node a with volumes, nodes b and c for their replicas; all in memory."""

    def __init__(self, *, targets: str = '["b:store"]', rest: str = "") -> None:
        self.now = START
        self.memory = {name: MemoryBackend("store", checksums=checksum, clock=lambda: self.now) for name in "abc"}
        self.endpoints = {name: Watched(LocalEndpoint(name, {"store": m})) for name, m in self.memory.items()}
        self.node = "a"
        self.role_changes = 0
        self.events: list[tuple[str, str, str]] = []
        self.tracker = Tracker()
        self.seen: list[tuple[ReplicaKey, datetime | None]] = []
        self.configure(targets=targets, rest=rest)
        self.runner = Runner(
            self, self.tracker, self, Slots(4, 2), limits=Limits(), pacers=lambda *_: (), clock=lambda: self.now
        )
        for volume in VOLUMES:
            self.memory["a"].create(volume, volume.encode())

    def configure(self, *, targets: str = '["b:store"]', rest: str = "") -> None:
        self.job = config.parse(CONFIG.format(targets=targets, rest=rest)).jobs["vms"]

    # -- Network and Recorder

    def endpoint(self, node: str, job: Job | None = None) -> Endpoint:  # noqa: ARG002
        return self.endpoints[node]

    def pool(self, node: str, storage: str) -> str | None:
        return storage if node == self.node else None

    def run_finished(self, report: RunReport, started: datetime, newest: Version | None) -> None:
        pass

    def transfer_progress(self, key: ReplicaKey, progress: Progress | None) -> None:
        pass

    def replica_seen(self, key: ReplicaKey, newest: Version | None, backlog: int, as_of: datetime | None) -> None:
        del newest, backlog
        self.seen.append((key, as_of))

    def event(self, kind: str, subject: str, message: str = "") -> None:
        self.events.append((kind, subject, message))

    def replicas_gone(self, keys: Iterable[ReplicaKey]) -> None:
        pass

    # -- what tests do

    def run(self) -> list[RunReport]:
        self.now += timedelta(minutes=1)
        for endpoint in self.endpoints.values():
            endpoint.calls.clear()
        self.notes: list[object] = []
        reports = self.runner.run(self.job, None, None, self.notes.append, Cancellation())
        assert [report.outcome for report in reports] == ["ok"] * len(reports), reports
        return list(reports)

    def snapshots(self, node: str = "a", volume: str = "vm-1") -> list[str]:
        state = self.memory[node].state(volume if node == "a" else f"a/{volume}")
        return [] if state is None else [version.name for version in state.snapshots]

    def calls(self, node: str) -> set[str]:
        return set(self.endpoints[node].calls)

    def lag(self, volume: str = "vm-1", target: str = "b:store") -> float | None:
        return self.tracker.get(ReplicaKey("vms", f"store:{volume}", target)).lag(self.now)


def test_what_has_arrived_is_known_before_the_run_goes_on() -> None:
    """Letting go of the old base, and pruning, may take long."""
    world = World()
    world.run()
    for volume in VOLUMES:
        world.memory["a"].write(volume, 0, b"new")
    lags: list[float | None] = []

    def look() -> None:
        lags.append(min(world.lag(volume) or 0.0 for volume in VOLUMES))

    world.endpoints["b"].before["release"] = look
    world.run()
    assert lags == [0.0]


def test_what_does_not_change_costs_a_question_to_each_node() -> None:
    world = World()
    assert [report.steps for report in world.run()] == [1, 1, 1]
    assert world.calls("a") > {"snapshot", "send", "heads"}
    before = {node: [world.snapshots(node, volume) for volume in VOLUMES] for node in "ab"}
    world.run()
    world.now += timedelta(hours=3)
    reports = world.run()
    assert [(r.volume, r.steps, r.done, r.snapshot) for r in reports] == [
        (f"store:{volume}", 0, 0, world.snapshots("b", volume)[-1]) for volume in VOLUMES
    ]
    assert world.calls("a") == {"volumes", "heads"}
    assert world.calls("b") == {"heads"}
    assert before == {node: [world.snapshots(node, volume) for volume in VOLUMES] for node in "ab"}
    assert "0 volumes snapshotted, 3 unchanged" in str(world.notes[0])


def test_the_lag_is_that_of_the_last_look() -> None:
    world = World()
    world.run()
    assert world.lag() == 0
    world.now += timedelta(hours=1)
    assert world.lag() == 3600
    world.run()
    assert world.lag() == 0
    assert world.seen[-1] == (ReplicaKey("vms", "store:vm-3", "b:store"), world.now)
    looked = world.now
    world.now += timedelta(minutes=5)
    assert world.lag() == 300
    # Somebody writes, and the target cannot be reached: what was seen before stays true, and nothing newer is.
    world.memory["a"].write("vm-1", 0, b"!")
    world.runner.surveys.of(world.runner.tasks.of(world.job)[0])
    assert world.lag() == (world.now - looked).total_seconds()
    world.runner.surveys.of_all(world.runner.tasks.of(world.job))
    assert world.lag() == (world.now - looked).total_seconds()
    assert world.lag("vm-2") == 0


def test_only_what_changed_is_snapshotted() -> None:
    world = World()
    world.run()
    world.memory["a"].write("vm-2", 0, b"!")
    assert [report.steps for report in world.run()] == [0, 0, 1]
    assert [len(world.snapshots("a", volume)) for volume in VOLUMES] == [1, 2, 1]
    assert world.snapshots("b", "vm-2") == world.snapshots("a", "vm-2")
    assert world.memory["b"].read("a/vm-2") == b"!m-2"
    assert world.calls("a") >= {"snapshot"}
    assert "ensure_primary" not in world.calls("a"), "what was listed says so"
    for node in "ab":
        assert "state" not in world.calls(node), "all that is sent was listed at once"
        assert world.endpoints[node].calls.count("states") == 1
    assert "1 volume snapshotted, 2 unchanged" in str(world.notes[0])


def test_snapshots_of_one_run_are_of_one_instant() -> None:
    """What was unchanged when the run began, and is written to before the others are snapshotted, is snapshotted with
    them: together they must be what the volumes were at one moment."""
    world = World()
    world.run()
    world.memory["a"].write("vm-2", 0, b"!")
    world.endpoints["a"].before["snapshot"] = lambda: world.memory["a"].write("vm-3", 0, b"?")
    world.endpoints["a"].before["storage"] = lambda: setattr(world, "now", world.now + timedelta(seconds=1))
    assert [report.steps for report in world.run()] == [1, 1, 1]
    newest = {world.snapshots("b", volume)[-1] for volume in VOLUMES}
    assert len(newest) == 1
    assert world.memory["b"].read("a/vm-3") == b"?m-3"


def test_a_new_target_gets_what_there_is() -> None:
    world = World()
    world.run()
    taken = [world.snapshots("a", volume) for volume in VOLUMES]
    world.configure(targets='["b:store", "c:store"]')
    reports = world.run()
    assert sorted((report.target, report.steps) for report in reports) == [("b:store", 0)] * 3 + [("c:store", 1)] * 3
    assert [world.snapshots("a", volume) for volume in VOLUMES] == taken
    assert [world.snapshots("c", volume) for volume in VOLUMES] == taken
    world.run()
    assert world.calls("c") == {"heads"}


def test_a_plan_tells_of_what_is_quiet() -> None:
    world = World()
    tasks = world.runner.tasks.of(world.job)
    assert {survey.quiet for survey in world.runner.surveys.of_all(tasks).values()} == {False}
    world.run()
    world.memory["a"].write("vm-2", 0, b"!")
    for endpoint in world.endpoints.values():
        endpoint.calls.clear()
    surveys = world.runner.surveys.of_all(tasks)
    assert [surveys[task.key].quiet for task in tasks] == [True, False, True]
    assert {"state", "snapshot"}.isdisjoint(world.calls("a") | world.calls("b"))
    world.configure(rest='unchanged = "snapshot"')
    surveys = world.runner.surveys.of_all(world.runner.tasks.of(world.job))
    assert {survey.quiet for survey in surveys.values()} == {False}


@pytest.mark.parametrize(
    "rest",
    ['unchanged = "snapshot"', 'quiesce = {before = ["/bin/true"], after = ["/bin/true"], timeout = "10s"}'],
)
def test_jobs_that_want_a_snapshot_each_time(rest: str) -> None:
    world = World(rest=rest)
    world.run()
    assert [report.steps for report in world.run()] == [1, 1, 1]
    assert "heads" not in world.calls("a")


def test_where_nobody_can_tell_all_is_done() -> None:
    world = World()
    world.run()
    for node in "ab":
        world.endpoints[node].fault = Fault("heads", Point.BEFORE, StorageUnavailable("busy", hint=""))
        assert [report.steps for report in world.run()] == [1, 1, 1]
        assert world.endpoints[node].fault is None


def test_a_policy_that_keeps_less_counts_for_what_does_not_change() -> None:
    world = World(rest='keep = {source = "last=5", target = "last=5"}')
    for number in range(4):
        world.memory["a"].write("vm-1", 0, bytes([number]))
        world.run()
    world.run()
    assert world.calls("b") == {"heads"}
    world.configure(rest='keep = {source = "last=2", target = "last=3"}')
    world.run()
    assert world.endpoints["b"].calls.count("prune") == 1  # only where there is anything to destroy
    assert (len(world.snapshots("a")), len(world.snapshots("b"))) == (2, 3)
    world.run()
    assert world.calls("b") == {"heads"}


def test_when_volumes_that_stand_still_are_looked_at() -> None:
    now = 0.0
    tidy = Tidying(UTC, clock=lambda: now)
    world = World()
    place = ("a", VolumeId("store", "vm-1"))
    (task, *_) = world.runner.tasks.of(world.job)
    request = target_request(task, set())
    assert tidy.due({place: request}) == {place}
    assert tidy.due({place: request}) == frozenset()
    now += pruning.INTERVAL
    tidy.done(place, request)
    assert tidy.due({place: request}) == frozenset()
    now += pruning.INTERVAL
    assert tidy.due({place: request}) == {place}
    assert not tidy.has_work(request, None)


# -- snapshots of several storages


def test_one_bad_volume_stops_nobody_else() -> None:
    """Of an atomic storage as of others; each is reported by itself."""
    world = World()
    taken = world.memory["a"].snapshot

    def refuse(volumes: tuple[str, ...], name: str) -> tuple[Version, ...]:
        if "vm-2" in volumes:
            raise NoSpace("vm-2 is at its limit", hint="raise it")
        return taken(volumes, name)

    world.memory["a"].snapshot = refuse  # type: ignore[method-assign]
    for capabilities in (CAPABILITIES, CAPABILITIES & ~Capability.ATOMIC_GROUP):
        world.memory["a"].capabilities = capabilities
        for volume in VOLUMES:
            world.memory["a"].write(volume, 0, bytes([capabilities.value % 251]))
        reports = world.runner.run(world.job, None, None, lambda _: None, Cancellation())
        assert [(r.outcome, r.steps, r.message) for r in sorted(reports, key=lambda r: r.volume)] == [
            ("ok", 1, ""), ("failed", 0, "vm-2 is at its limit"), ("ok", 1, "")
        ]  # fmt: skip
        world.now += timedelta(minutes=1)


def test_all_storages_of_a_job_are_snapshotted_by_one_request() -> None:
    world = World()
    second, third = (MemoryBackend(name, checksums=checksum) for name in ("second", "third"))
    third.capabilities = CAPABILITIES & ~Capability.ATOMIC_GROUP
    here = LocalEndpoint("a", {"store": world.memory["a"], "second": second, "third": third})
    requests: list[tuple[str, ...]] = []
    take = here.snapshot

    def noted(request: SnapshotRequest) -> tuple[Taken, ...]:
        requests.append(tuple(str(volume) for volume in request.volumes))
        return take(request)

    here.snapshot = noted  # type: ignore[method-assign]
    world.endpoints["a"] = Watched(here)
    for backend in (second, third):
        for name in ("x", "y"):
            backend.create(name, b"1")
    volumes = [VolumeId(s, n) for s in ("second", "third", "absent") for n in "xy"] + [VolumeId("store", "vm-1")]
    primaries = set(volumes)
    failed = world.runner.snapshots.take(world.job, volumes, Cancellation(), primaries)
    assert requests == [("second:x", "second:y", "store:vm-1"), ("third:x",), ("third:y",)]
    assert sorted(map(str, failed)) == ["absent:x", "absent:y"]


# -- what a plan tells


def test_what_goes_from_the_source_is_told_once() -> None:
    """And it is what no target needs any more, not what one of them does not."""
    world = World(targets='["b:store", "c:store"]', rest='keep = {source = "last=1", target = "last=9"}')
    world.run()
    unreachable = world.endpoints["c"]
    world.endpoints["c"] = Watched(LocalEndpoint("c", {}))
    for number in range(3):
        world.memory["a"].write("vm-1", 0, bytes([number]))
        world.now += timedelta(minutes=1)
        world.runner.run(world.job, None, None, lambda _: None, Cancellation())
    world.endpoints["c"] = unreachable
    more = [snapshot_name("vms", world.now + timedelta(minutes=minutes)) for minutes in (1, 2)]
    for name in more:
        world.memory["a"].snapshot(("vm-1",), name)
    parsed = config.parse(CONFIG.format(targets='["b:store", "c:store"]', rest='keep = {source = "last=1"}'))
    engine = Engine(
        parsed, cast(Any, world), world.runner, cast(Any, None), cast(Any, None), daemon=False, check=lambda: ()
    )
    planned = [item for item in engine.plan("vms") if item.volume == "store:vm-1"]
    told = [[outcome.version.name for outcome in item.source_prunes] for item in planned]
    assert world.snapshots("b")[-1] != world.snapshots("c")[-1]
    assert told == [more[:1], []], "neither what b has nor what c has"
    assert [item.conflict for item in planned] == ["", ""]


def test_what_cannot_be_listed_is_not_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand either: what the replica needs is known only where the source was listed, too."""
    world = World(rest='keep = {target = "last=9"}')
    for number in range(3):
        world.memory["a"].write("vm-1", 0, bytes([number]))
        world.now += timedelta(minutes=1)
        world.run()

    def fail(_: object) -> NoReturn:
        raise StorageUnavailable("the pool is suspended", hint="")

    monkeypatch.setattr(world.endpoints["a"], "state", fail, raising=False)
    parsed = config.parse(CONFIG.format(targets='["b:store"]', rest='keep = {target = "last=1"}'))
    engine = Engine(
        parsed, cast(Any, world), world.runner, cast(Any, None), cast(Any, None), daemon=False, check=lambda: ()
    )
    there = world.snapshots("b")
    assert len(there) == 3
    reports = [report for report in engine.prune("vms", dry_run=False) if report.node == "b"]
    assert {report.message for report in reports} == {"the pool is suspended"}
    assert world.snapshots("b") == there


def test_a_plan_has_the_size_of_a_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(rest='intermediates = "all"')
    world.run()
    for node in "ab":
        world.memory[node].capabilities = CAPABILITIES | Capability.NATIVE_INTERMEDIATES
    for minutes in (1, 2):
        world.memory["a"].snapshot(("vm-1",), snapshot_name("vms", world.now + timedelta(minutes=minutes)))
    asked: list[bool] = []

    def estimate(*_: object, intermediates: bool = False) -> int:
        asked.append(intermediates)
        return 7

    monkeypatch.setattr(world.memory["a"], "estimate", estimate)
    tasks = world.runner.tasks.of(world.job, "store:vm-1")
    assert [survey.backlog for survey in world.runner.surveys.of_all(tasks).values()] == [7]
    assert asked == [True]


# -- when a replica is settled

PRIMARY = Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d00", Role.PRIMARY, 3)
REPLICA = Lineage(PRIMARY.uuid, Role.REPLICA, 3)
TAG = "replicator:vms:b:store"
NEWEST = Version(snapshot_name("vms", START), "g1", at(1), 7, holds=(TAG,))
OURS = Head(VolumeId("store", "vm"), NEWEST, False, PRIMARY)
THEIRS = Head(VolumeId("store", "a/vm"), NEWEST, False, REPLICA)


def changed_head(head: Head, **changes: object) -> Head:
    newest = {key: changes.pop(key) for key in ("guid", "holds", "name") if key in changes}
    return replace(head, newest=replace(NEWEST, **newest), **changes)  # type: ignore[arg-type]


def test_settled() -> None:
    found = settled(OURS, THEIRS, SendPolicy(job="vms"), TAG)
    assert found is not None
    assert (found.source, found.target) == (NEWEST, NEWEST)
    renamed = changed_head(THEIRS, name="called otherwise there")
    assert settled(OURS, renamed, SendPolicy(job="vms"), TAG) is not None


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (None, THEIRS),
        (OURS, None),
        (changed_head(OURS, changed=True), THEIRS),
        (OURS, changed_head(THEIRS, changed=True)),
        (OURS, changed_head(THEIRS, partial=True)),
        (changed_head(OURS, guid="g2"), THEIRS),
        (OURS, changed_head(THEIRS, guid="g2")),
        (changed_head(OURS, holds=()), THEIRS),
        (OURS, changed_head(THEIRS, holds=("replicator:other:b:store",))),
        (changed_head(OURS, name="by-hand"), THEIRS),
        (changed_head(OURS, lineage=None), THEIRS),
        (changed_head(OURS, lineage=REPLICA), THEIRS),
        (OURS, changed_head(THEIRS, lineage=None)),
        (OURS, changed_head(THEIRS, lineage=PRIMARY)),
        (OURS, changed_head(THEIRS, lineage=Lineage(REPLICA.uuid, Role.REPLICA, 2))),
        (OURS, changed_head(THEIRS, lineage=Lineage("6d9f2d6e-7f3a-4b0e-9a43-3f1f5f5a1d01", Role.REPLICA, 3))),
        (Head(OURS.volume, None, False, PRIMARY), Head(THEIRS.volume, None, False, REPLICA)),
    ],
)
def test_not_settled(ours: Head | None, theirs: Head | None) -> None:
    assert settled(ours, theirs, SendPolicy(job="vms"), TAG) is None


def test_a_bookmark_is_no_newest_snapshot() -> None:
    memory = MemoryBackend("store", checksums=checksum)
    memory.create("vm", b"x")
    (one,) = memory.snapshot(("vm",), "one")
    memory.bookmark("vm", one.ref, "mark")
    (head,) = memory.heads(("vm",))
    assert head.newest is not None
    assert head.newest.kind is VersionKind.SNAPSHOT
    (taken,) = LocalEndpoint("a", {"store": memory}).snapshot(SnapshotRequest((VolumeId("store", "vm"),), "one"))
    assert taken.get() == one


@pytest.mark.parametrize("by", ["run", "prune"])
def test_what_a_target_in_conflict_may_continue_from_is_not_pruned(by: str) -> None:
    world = World(rest='keep = {source = "last=2", target = "last=9"}')
    source, target = world.memory["a"], world.memory["b"]
    for number in range(2):
        source.write("vm-1", 0, bytes([number]))
        world.run()
    older, newest = world.snapshots("a")
    state = target.state("a/vm-1")
    assert state is not None
    for tag in state.snapshots[-1].holds:
        target.release("a/vm-1", state.snapshots[-1].ref, tag)
    target.destroy("a/vm-1", state.snapshots[-1].ref)
    target.write("a/vm-1", 0, b"somebody was here")
    for number in range(3):
        world.now += timedelta(minutes=1)
        source.write("vm-1", 0, bytes([9 - number]))
        if by == "run":
            reports = world.runner.run(world.job, "store:vm-1", None, lambda _: None, Cancellation())
            assert [report.outcome for report in reports] == ["conflict"]
        else:
            name = snapshot_name("vms", world.now)
            world.endpoints["a"].snapshot(SnapshotRequest((VolumeId("store", "vm-1"),), name))
            tasks = world.runner.tasks.of(world.job, "store:vm-1")
            world.endpoints["a"].prune(source_request(tasks[0], world.runner.surveys.protected(tasks)))
    assert world.snapshots("a")[:2] == [older, newest], "the last that both have, and the one that is held"
    assert len(world.snapshots("a")) == 4
