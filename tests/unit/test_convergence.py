"""Replication in any order of snapshots, writes, syncs, prunes and failures: nothing complete is ever wrong, the last
common version is never lost, and when failures stop, one run makes everything right.

The state machine drives the real driver over real endpoints whose storage is memory; failures come from a wrapper.
"""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from backends.memory import MemoryBackend
from replicator.cancellation import Cancellation
from replicator.endpoint import PruneRequest, SnapshotRequest
from replicator.errors import ConnectionLost, DeadlineExceeded, ReplicatorError
from replicator.local import LocalEndpoint
from replicator.model import Version, VersionKind, VolumeId, VolumeState, hold_tag, replica_volume, snapshot_name
from replicator.planning import Intermediates, SendPolicy, newest_common, protected_guids
from replicator.replication import Limits, Options, Pair, Replication
from tests.support.blocks import pattern
from tests.support.faults import Crash, Fault, FaultyEndpoint, Point
from tests.support.versions import at
from transport import checksum

PAGE = 4096
SOURCE = VolumeId("tank", "vm")
JOB = "vms"


class Impatient(Cancellation):
    """Does not wait between two attempts."""

    def wait(self, seconds: float) -> bool:
        return super().wait(min(seconds, 0.0))


@dataclass
class Target:
    """A replica, with what is known of it."""

    pair: Pair
    faulty: FaultyEndpoint
    memory: MemoryBackend
    volume: VolumeId
    had_common: bool = False
    settled: bool = False  # the last run ended well and nothing happened since

    def state(self) -> VolumeState | None:
        return self.memory.state(self.volume.name)


errors = st.sampled_from([Crash("kill -9"), ConnectionLost("cut"), DeadlineExceeded("stalled"), OSError("I/O error")])
early = st.sampled_from([0, 0, 0, 1, 2])
cuts = st.builds(Fault, st.just("receive"), st.just(Point.CUT), errors, nth=early, chunks=st.integers(0, 6))
lost = st.builds(Fault, st.just("receive"), st.just(Point.AFTER), errors, nth=early)
others = st.builds(
    Fault,
    st.sampled_from(["hold", "release", "send", "state", "receive", "abort_receive", "ensure_primary"]),
    st.sampled_from([Point.BEFORE, Point.AFTER]),
    errors,
    nth=early,
)
policies = st.sampled_from(["last=1", "last=2", "last=1 hourly=1", "hourly=2"])


class Replicating(RuleBasedStateMachine):
    """One volume, two replicas."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.now = at(0)
        self.contents: dict[str, bytes] = {}

    @initialize(size=st.integers(1, 10), intermediates=st.sampled_from(Intermediates), only_ours=st.booleans())
    def start(self, size: int, intermediates: Intermediates, only_ours: bool) -> None:
        self.policy = SendPolicy(intermediates, JOB if only_ours else None)
        self.memory = self.backend("tank")
        self.memory.create("vm", pattern(size * PAGE))
        self.source = FaultyEndpoint(LocalEndpoint("prox1", {"tank": self.memory}))
        self.targets = [self.target(node) for node in ("prox2", "prox3")]

    def backend(self, name: str) -> MemoryBackend:
        return MemoryBackend(name, checksums=checksum, chunk_size=PAGE, clock=lambda: self.now)

    def target(self, node: str) -> Target:
        memory = self.backend("backup")
        faulty = FaultyEndpoint(LocalEndpoint(node, {"backup": memory}))
        volume = replica_volume("prox1", SOURCE, "backup")
        return Target(Pair(self.source, SOURCE, faulty, volume, hold_tag(JOB, node, "backup")), faulty, memory, volume)

    def source_state(self) -> VolumeState:
        state = self.memory.state("vm")
        assert state is not None
        return state

    # -- what guests, operators and schedules do

    @rule(page=st.integers(0, 9), what=st.sampled_from(["data", "zeros", "byte"]))
    def write(self, page: int, what: str) -> None:
        size = len(self.memory.read("vm"))
        if page * PAGE < size:
            data = {"data": pattern(PAGE, next(self.numbers)), "zeros": bytes(PAGE), "byte": b"!"}[what]
            self.memory.write("vm", page * PAGE, data[: size - page * PAGE])

    @rule(size=st.integers(0, 10 * PAGE))
    def resize(self, size: int) -> None:
        self.memory.resize("vm", size)

    @rule(foreign=st.booleans(), minutes=st.integers(1, 200))
    def snapshot(self, foreign: bool, minutes: int) -> None:
        number = next(self.numbers)
        self.now = self.now.replace(microsecond=0) + (at(minutes) - at(0))
        name = f"by-hand-{number}" if foreign else snapshot_name(JOB, self.now)
        version = self.source.snapshot(SnapshotRequest((SOURCE,), name))[0].get()
        self.contents[version.guid] = self.memory.read("vm", version.ref)
        self.unsettle()

    @rule(keep=policies, informed=st.booleans())
    def prune_source(self, keep: str, informed: bool) -> None:
        """Without being told what is common, the holds alone must do."""
        states = [t.state() for t in self.targets] if informed else []
        protect = tuple(protected_guids(self.source_state(), states))
        self.source.prune(PruneRequest(SOURCE, JOB, keep, protect))
        self.unsettle()

    @rule(which=st.integers(0, 1), keep=policies)
    def prune_target(self, which: int, keep: str) -> None:
        target = self.targets[which]
        if target.state() is not None:
            target.faulty.prune(PruneRequest(target.volume, JOB, keep, ()))

    @rule(which=st.integers(0, 2), data=st.data())
    def rename(self, which: int, data: st.DataObject) -> None:
        memory, name = [(self.memory, "vm"), *((t.memory, t.volume.name) for t in self.targets)][which]
        state = memory.state(name)
        if state is not None and state.snapshots:
            version = data.draw(st.sampled_from(state.snapshots))
            memory.rename_snapshot(name, version.ref, f"renamed-{next(self.numbers)}")
            self.unsettle()

    @rule()
    def rotate(self) -> None:
        """The newest snapshot gets a name that an older one had, as people do with ``latest``."""
        snapshots = self.source_state().snapshots
        for version in snapshots:
            if version.name == "latest":
                self.memory.rename_snapshot("vm", version.ref, f"former-{next(self.numbers)}")
        if snapshots:
            self.memory.rename_snapshot("vm", snapshots[-1].ref, "latest")
            self.unsettle()

    @rule(data=st.data())
    def bookmark_and_destroy(self, data: st.DataObject) -> None:
        """Only the identity of a snapshot remains on the source."""
        state = self.source_state()
        free = [v for v in state.snapshots if not v.holds]
        if free:
            version = data.draw(st.sampled_from(free))
            self.memory.bookmark("vm", version.ref, f"mark-{next(self.numbers)}")
            self.memory.destroy("vm", version.ref)
            self.unsettle()

    @rule(which=st.integers(0, 1))
    def discard(self, which: int) -> None:
        target = self.targets[which]
        target.faulty.fault = None
        target.faulty.abort_receive(target.volume)

    def unsettle(self) -> None:
        for target in self.targets:
            target.settled = False

    # -- replication

    def run(self, target: Target, attempts: int = 1) -> None:
        options = Options(self.policy, Limits(attempts=attempts))
        Replication(target.pair, options, observer=lambda _: None, cancel=Impatient()).run()

    @rule(which=st.integers(0, 1), attempts=st.integers(1, 3))
    def sync(self, which: int, attempts: int) -> None:
        target = self.targets[which]
        self.source.fault = target.faulty.fault = None
        self.run(target, attempts)
        self.check_synced(target)

    @rule(
        which=st.integers(0, 1),
        here=st.none() | others,
        there=cuts | lost | others,
        pages=st.lists(st.integers(0, 9), max_size=5),
        attempts=st.integers(1, 3),
    )
    def sync_with_faults(self, which: int, here: Fault | None, there: Fault, pages: list[int], attempts: int) -> None:
        for page in pages:
            self.write(page, "data")
        self.snapshot(foreign=False, minutes=1)
        target = self.targets[which]
        self.source.fault, target.faulty.fault = here, there
        with contextlib.suppress(Crash, OSError, ReplicatorError):
            self.run(target, attempts)
        self.source.fault = target.faulty.fault = None
        target.settled = False
        target.had_common |= newest_common(self.source_state(), target.state()) is not None

    def check_synced(self, target: Target) -> None:
        """The target has the source's newest version of those to be sent, and holds are where they belong."""
        source, there = self.source_state(), target.state()
        sent = [v for v in source.versions if self.policy.selects(v)]
        common = newest_common(source, there)
        if sent:
            assert common is not None
            assert common.source.position >= sent[-1].position
        if common is None:
            return
        assert there is not None
        assert there.resume is None
        target.had_common = target.settled = True
        tag = target.pair.tag
        for state in (source, there):
            held = [v.guid for v in state.versions if tag in v.holds]
            is_bookmark = state is source and common.source.kind is VersionKind.BOOKMARK
            assert held == ([] if is_bookmark else [common.source.guid])

    # -- what always holds

    @invariant()
    def complete_versions_are_right(self) -> None:
        for target in getattr(self, "targets", []):
            state = target.state()
            for version in state.snapshots if state else ():
                assert target.memory.read(target.volume.name, version.ref) == self.contents[version.guid]

    @invariant()
    def the_last_common_version_is_never_lost(self) -> None:
        for target in getattr(self, "targets", []):
            if target.had_common:
                assert newest_common(self.source_state(), target.state()) is not None

    @invariant()
    def nothing_is_sent_that_is_not_to_be_sent(self) -> None:
        for target in getattr(self, "targets", []):
            state = target.state()
            versions: tuple[Version, ...] = state.versions if state else ()
            guids = [v.guid for v in versions]
            assert len(guids) == len(set(guids))
            assert len({v.name for v in versions}) == len(versions)

    @precondition(lambda self: any(t.settled for t in self.targets))
    @rule()
    def a_second_run_does_nothing(self) -> None:
        for target in self.targets:
            if target.settled:
                before = target.state(), self.source_state()
                target.faulty.fault = self.source.fault = None
                self.run(target)
                assert (target.state(), self.source_state()) == before

    def teardown(self) -> None:
        """When failures stop, one run makes everything right."""
        for target in getattr(self, "targets", []):
            self.source.fault = target.faulty.fault = None
            self.run(target)
            self.check_synced(target)


Replicating.TestCase.settings = settings(stateful_step_count=40)
TestReplicating = Replicating.TestCase
