"""Promotions, switch-overs and rejoins of one volume on three nodes, in any order and with failures anywhere.

The real code drives real endpoints whose storage is memory; see ``tests/support/weather.py`` for what goes wrong. What
must always hold is checked after every rule, against a model that knows what was written, acknowledged and pruned:

- never are two copies primary under the same epoch, nor one after the other
- what a promoted copy begins with is a complete snapshot, byte for byte
- the last version that a copy has in common with the one that it follows is never pruned
- what a copy has acknowledged it has, until a policy prunes it
- a switch-over, a rejoin or a late request never makes a second primary
- when failures stop, everything converges: one primary, and the same on all three nodes
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from backends.memory import MemoryBackend
from replicator import situations, takeover
from replicator.cancellation import Cancellation
from replicator.endpoint import PruneRequest, SnapshotRequest
from replicator.errors import ReplicatorError
from replicator.local import LocalEndpoint
from replicator.model import (
    HoldTag,
    Lineage,
    Role,
    Version,
    VolumeId,
    VolumeState,
    handover_tag,
    hold_tag,
    snapshot_name,
)
from replicator.planning import Intermediates, SendPolicy, newest_common, protected_guids
from replicator.replication import Limits, Options, Pair, Replication
from replicator.roles import newest_complete
from replicator.situations import Situation
from replicator.transitions import Promotion, Rejoin, plan_promotion, plan_rejoin, superseded
from replicator.verification import aside_name
from tests.support.blocks import pattern
from tests.support.faults import Crash
from tests.support.versions import at
from tests.support.weather import Fault, Trouble, Weather
from transport import checksum

PAGE = 4096
JOB = "vms"
NODES = ("n1", "n2", "n3")
OWN = VolumeId("store", "vm")
POLICY = SendPolicy(Intermediates.NEWEST, JOB)

nodes = st.sampled_from(NODES)
some = st.builds(Fault, st.sampled_from(Trouble), st.integers(0, 15))
faults = st.lists(some, max_size=2)


class Impatient(Cancellation):
    """Does not wait between two attempts."""

    def wait(self, seconds: float) -> bool:
        return super().wait(min(seconds, 0.0))


@dataclass
class Known:
    """What the model knows of a node's copy.

    :ivar acknowledged: guids of versions that it has confirmed
    :ivar follows: the node that it was last brought forward from
    """

    memory: MemoryBackend
    acknowledged: set[str] = field(default_factory=set)
    pruned: set[str] = field(default_factory=set)
    follows: str | None = None


class Roles(RuleBasedStateMachine):
    """One volume, three copies."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.now = at(0)
        self.contents: dict[str, bytes] = {}
        self.reigns: dict[int, str] = {}
        self.weather = Weather()
        self.known: dict[str, Known] = {}

    @initialize(size=st.integers(1, 6), second=st.booleans())
    def start(self, size: int, second: bool) -> None:
        for node in NODES:
            memory = MemoryBackend("store", checksums=checksum, chunk_size=PAGE, clock=lambda: self.now)
            self.known[node] = Known(memory)
            self.weather.nodes[node] = LocalEndpoint(node, {"store": memory})
        self.known["n1"].memory.create("vm", pattern(size * PAGE))
        self.weather.nodes["n1"].ensure_primary(OWN)
        self.write("n1", 0)
        self.snapshot("n1")
        self.sync("n1", "n2", "n1", [])
        if second:
            self.sync("n1", "n3", "n1", [])

    # -- looking

    @staticmethod
    def volume(node: str) -> VolumeId:
        return OWN if node == "n1" else VolumeId("store", "n1/vm")

    def state(self, node: str) -> VolumeState | None:
        return self.known[node].memory.state(self.volume(node).name)

    def lineage(self, node: str) -> Lineage | None:
        state = self.state(node)
        return state.lineage if state is not None else None

    def primaries(self) -> dict[str, Lineage]:
        found = {node: self.lineage(node) for node in self.known}
        return {node: line for node, line in found.items() if line is not None and line.role is Role.PRIMARY}

    def in_charge(self) -> str | None:
        """The node whose copy is the primary of the newest epoch; None where that one was demoted."""
        newest = max((node for node in NODES if self.state(node) is not None), key=self.epoch)
        return next((node for node in self.primaries() if self.epoch(node) == self.epoch(newest)), None)

    def pair(self, source: str, target: str, driver: str) -> Pair:
        tag = hold_tag(JOB, target, "store")
        ours, theirs = self.weather.link(driver, source), self.weather.link(driver, target)
        return Pair(ours, self.volume(source), theirs, self.volume(target), tag)

    def live(self, node: str) -> bytes:
        return self.known[node].memory.read(self.volume(node).name)

    @contextlib.contextmanager
    def failing(self, faults: list[Fault]) -> Iterator[None]:
        """Whatever comes of it; what was done by then has been done."""
        self.weather.faults = [*faults]
        try:
            with contextlib.suppress(Crash, ReplicatorError):
                yield
        finally:
            self.weather.faults = []
            self.note_versions()

    def note_versions(self) -> None:
        """Snapshots that only now exist: what was kept aside."""
        for known in self.known.values():
            for name in ("vm", "n1/vm"):
                state = known.memory.state(name)
                for version in state.snapshots if state else ():
                    self.contents.setdefault(version.guid, known.memory.read(name, version.ref))

    # -- what guests, schedules and the weather do

    @rule(node=nodes, page=st.integers(0, 5))
    def write(self, node: str, page: int) -> None:
        """A guest writes to what is a primary, whether or not anybody else knows that."""
        lineage = self.lineage(node)
        if lineage is not None and lineage.role is Role.PRIMARY and node not in self.weather.off:
            size = len(self.live(node))
            if page * PAGE < size:
                self.known[node].memory.write(self.volume(node).name, page * PAGE, pattern(PAGE, next(self.numbers)))

    @rule(node=nodes)
    def snapshot(self, node: str) -> None:
        lineage = self.lineage(node)
        if lineage is None or lineage.role is not Role.PRIMARY or node in self.weather.off:
            return
        self.now += at(1) - at(0)
        name = snapshot_name(JOB, self.now)
        with contextlib.suppress(ReplicatorError):
            version = self.weather.nodes[node].snapshot(SnapshotRequest((self.volume(node),), name))[0].get()
            self.contents[version.guid] = self.known[node].memory.read(self.volume(node).name, version.ref)

    @rule(keep=st.sampled_from(["last=1", "last=2"]), days=st.integers(1, 3))
    def time_passes(self, keep: str, days: int) -> None:
        """Guests write, schedules snapshot, daemons tidy up, and every node prunes by its own hand."""
        for node in NODES * days:
            if self.state(node) is not None:
                self.write(node, 0)
                self.snapshot(node)
                self.tidy(node)
                self.prune(node, keep, False)

    @rule(node=nodes, keep=st.sampled_from(["last=1", "last=2"]), informed=st.booleans())
    def prune(self, node: str, keep: str, informed: bool) -> None:
        """By the node's own hand. Not being told what is common, the holds alone must do."""
        state = self.state(node)
        if state is None or node in self.weather.off:
            return
        protect = protected_guids(state, [self.state(other) for other in NODES if other != node]) if informed else ()
        request = PruneRequest(self.volume(node), JOB, keep, tuple(sorted(protect)))
        for outcome in self.weather.nodes[node].prune(request):
            if not outcome.kept:
                self.known[node].pruned.add(outcome.version.guid)

    @rule(node=nodes)
    def tidy(self, node: str) -> None:
        """The daemon releases what no job of its node holds, as that of a promoted copy's former primary."""
        lineage, state = self.lineage(node), self.state(node)
        if lineage is None or state is None or lineage.role is not Role.PRIMARY or node in self.weather.off:
            return
        for version in state.versions:
            for tag in version.tags:
                parsed = HoldTag.parse(tag)
                if parsed is not None and parsed.node == node:
                    self.weather.nodes[node].release(self.volume(node), version.ref, tag)

    @rule(node=nodes)
    def power_cut(self, node: str) -> None:
        self.weather.off.add(node)

    @rule(one=nodes, other=nodes)
    def cable_cut(self, one: str, other: str) -> None:
        if one != other:
            self.weather.cut.add(frozenset((one, other)))

    @rule(late=st.booleans())
    def all_is_mended(self, late: bool) -> None:
        self.weather.off.clear()
        self.weather.cut.clear()
        if late:
            self.late_requests_arrive()

    @rule()
    def late_requests_arrive(self) -> None:
        before = self.primaries()
        self.weather.deliver()
        self.note_versions()
        assert set(self.primaries()) <= set(before) or len(self.primaries()) <= max(1, len(before))

    # -- replication

    def options(self) -> Options:
        return Options(POLICY, Limits(attempts=1))

    def pick(self, data: st.DataObject, wanted: list[str]) -> str:
        """A node of those that something can come of, or now and then any."""
        return data.draw(st.sampled_from([*wanted * 5, *NODES]))

    def among(self, role: Role) -> list[str]:
        """Nodes that are on and have a copy of that role."""
        found = {node: self.lineage(node) for node in NODES if node not in self.weather.off}
        return [node for node, lineage in found.items() if lineage is not None and lineage.role is role]

    @rule(data=st.data(), to=nodes, faults=faults)
    def replicate(self, data: st.DataObject, to: str, faults: list[Fault]) -> None:
        source = self.pick(data, self.among(Role.PRIMARY))
        self.write(source, 0)
        self.snapshot(source)
        self.sync(source, to, data.draw(st.sampled_from([source, to])), faults)

    @rule(data=st.data(), to=nodes)
    def half_receive(self, data: st.DataObject, to: str) -> None:
        """What came forward once is tried again at once, so it is cut twice."""
        self.replicate_from(self.pick(data, self.among(Role.PRIMARY)), to, [Fault(Trouble.CUT, 0) for _ in range(2)])

    def replicate_from(self, source: str, to: str, faults: list[Fault]) -> None:
        self.write(source, 0)
        self.write(source, 1)
        self.snapshot(source)
        self.sync(source, to, source, faults)

    def sync(self, source: str, to: str, driver: str, faults: list[Fault]) -> None:
        lineage = self.lineage(source)
        if source == to or driver not in (source, to) or driver in self.weather.off or lineage is None:
            return
        before = self.primaries()
        with self.failing(faults):
            replication = Replication(
                self.pair(source, to, driver), self.options(), observer=lambda _: None, cancel=Impatient()
            )
            replication.run()
            self.followed(to, source, replication.outcome.newest)
        assert self.primaries() == before

    def followed(self, node: str, source: str, newest: Version | None) -> None:
        """A copy has confirmed a version."""
        if newest is None:
            return
        known = self.known[node]
        known.acknowledged.add(newest.guid)
        known.follows = source
        for other in self.known.values():  # who follows somebody who follows is on its own until it is told otherwise
            if other.follows == node:
                other.follows = None

    # -- roles

    def situation(self, node: str) -> Situation:
        peers = {other: self.weather.link(node, other) for other in NODES if other != node}
        return situations.find_out(self.weather.link(node, node), self.volume(node), peers, map)

    def draw(self, below: int) -> int:
        return next(self.numbers) % below

    @rule(data=st.data(), force=st.sampled_from([False, False, True]), word=st.booleans(), faults=faults)
    def promote(self, data: st.DataObject, force: bool, word: bool, faults: list[Fault]) -> None:
        node = self.pick(data, self.among(Role.REPLICA))
        if self.state(node) is None or node in self.weather.off:
            return
        before, reached = self.primaries(), self.reached_from(node)
        answering = {other for other in reached & set(before) if self.epoch(other) >= self.epoch(node)}
        with self.failing(faults):
            plan = plan_promotion(self.situation(node), draw=self.draw(10**6), force=force, primary_is_down=word)
            if isinstance(plan, Promotion):
                takeover.promote(self.weather.link(node, node), plan, aside_name(self.now), lambda: None)
        if not force and node not in before:
            assert node not in self.primaries() or not answering, "beside a primary that answers"

    def reached_from(self, node: str) -> set[str]:
        """The nodes that a node reaches, or a third one that it reaches."""
        first = {other for other in NODES if self.weather.reaches(node, other)}
        return {other for other in NODES for way in first if self.weather.reaches(way, other)}

    @rule(data=st.data(), faults=faults)
    def demote(self, data: st.DataObject, faults: list[Fault]) -> None:
        node = self.pick(data, self.among(Role.PRIMARY))
        lineage = self.lineage(node)
        if lineage is None or lineage.role is not Role.PRIMARY or node in self.weather.off:
            return
        self.snapshot(node)
        with self.failing(faults):
            state = self.state(node)
            newest = newest_complete(state) if state is not None else None
            takeover.step_down(self.weather.link(node, node), self.volume(node), lineage, newest)

    @rule(data=st.data(), to=nodes, faults=faults)
    def switchover(self, data: st.DataObject, to: str, faults: list[Fault]) -> None:
        source = self.pick(data, self.among(Role.PRIMARY) or self.among(Role.REPLICA))
        driver = data.draw(st.sampled_from([source, source, to]))
        if source == to or driver not in (source, to) or self.state(source) is None:
            return
        if driver in self.weather.off or self.state(to) is None:
            return
        before = self.primaries()
        with self.failing(faults):
            if superseded(self.situation(driver)) is None:
                self.switch(self.pair(source, to, driver))
                assert set(self.primaries()) - set(before) <= {to}
        assert len(self.primaries()) <= max(1, len(before)), "a switch-over made a second primary"

    @rule(data=st.data(), to=nodes, nth=st.integers(0, 25))
    def hand_over_and_back(self, data: st.DataObject, to: str, nth: int) -> None:
        """What was asked for in the first half arrives after the second."""
        source = self.pick(data, self.among(Role.PRIMARY))
        if source == to or self.state(to) is None or self.state(source) is None or len(self.primaries()) != 1:
            return
        self.weather.deliver()
        pairs = self.pair(source, to, source), self.pair(to, source, source)
        for pair, faults in zip(pairs, ([Fault(Trouble.LATE, nth)], []), strict=True):
            with self.failing(faults):
                self.switch(pair)
        before = set(self.primaries())
        self.late_requests_arrive()
        assert set(self.primaries()) == before

    def switch(self, pair: Pair) -> None:
        def bring() -> Version:
            self.snapshot(pair.source.node)
            replication = Replication(pair, self.options(), observer=lambda _: None, cancel=Impatient())
            replication.run()
            assert replication.outcome.newest is not None
            self.followed(pair.target.node, pair.source.node, replication.outcome.newest)
            return replication.outcome.newest

        takeover.Switchover(pair, bring, draw=self.draw, cancel=Impatient()).run()

    @rule(node=nodes, data=st.data(), faults=faults)
    def rejoin(self, node: str, data: st.DataObject, faults: list[Fault]) -> None:
        source = self.pick(data, self.among(Role.PRIMARY))
        if node == source or node in self.weather.off or self.state(node) is None:
            return
        before = self.primaries()
        if self.weather.reaches(node, source):
            self.snapshot(source)
        with self.failing(faults):
            self.follow(node, source)
        assert set(self.primaries()) <= set(before)

    def follow(self, node: str, source: str) -> None:
        pair = self.pair(source, node, node)
        mine = self.state(node)
        assert mine is not None
        plan = plan_rejoin(mine, source, pair.source.state(pair.source_volume))
        if not isinstance(plan, Rejoin):
            raise plan.to_error()
        own = self.live(node) if mine.lineage and mine.lineage.role is Role.PRIMARY else None
        done = takeover.rejoin(
            pair, plan, self.options(), aside_name(self.now), observer=lambda _: None, cancel=Impatient()
        )
        self.note_versions()
        self.followed(node, source, done.at)
        if own is not None:  # what only it had is where the message says
            state = self.state(node)
            assert state is not None
            kept = [self.contents[v.guid] for v in state.snapshots if v.name in done.aside]
            assert own in kept or (plan.common is not None and own == self.contents[plan.common[0].guid])

    # -- what always holds

    @invariant()
    def no_two_primaries_share_an_epoch(self) -> None:
        """And each begins with a complete snapshot: nobody has written since the rule that promoted it."""
        for node, lineage in self.primaries().items():
            if lineage.epoch not in self.reigns:
                newest = newest_complete(self.state_of(node))
                assert newest is not None
                assert self.live(node) == self.contents[newest.guid], "promoted with something incomplete"
            assert self.reigns.setdefault(lineage.epoch, node) == node

    @invariant()
    def versions_are_complete(self) -> None:
        for node, known in self.known.items():
            state = self.state(node)
            for version in state.snapshots if state else ():
                assert known.memory.read(self.volume(node).name, version.ref) == self.contents[version.guid]

    @invariant()
    def what_was_acknowledged_is_there(self) -> None:
        for node, known in self.known.items():
            state = self.state(node)
            there = {version.guid for version in state.snapshots} if state else set()
            assert known.acknowledged - known.pruned <= there

    @invariant()
    def the_last_common_version_is_never_lost(self) -> None:
        for node, known in self.known.items():
            if known.follows is None:
                continue
            mine, theirs = self.state(node), self.state(known.follows)
            assert mine is not None
            assert theirs is not None
            assert newest_common(theirs, mine) is not None

    def teardown(self) -> None:
        """When failures stop, an operator has everything equal with the commands that the messages name."""
        if not self.known:
            return
        self.weather.clear()
        self.note_versions()
        primary = self.in_charge() or self.recovered()
        self.write(primary, 0)
        for node in NODES:
            if node == primary:
                continue
            self.snapshot(primary)
            if self.state(node) is not None:
                self.follow(node, primary)
            self.sync(primary, node, primary, [])
        newest = newest_complete(self.state_of(primary))
        assert newest is not None
        for node in NODES:
            self.sync(primary, node, node, [])
            state = self.state_of(node)
            assert (last := newest_complete(state)) is not None
            assert last.guid == newest.guid
            assert state.lineage is not None
            assert state.lineage.role is (Role.PRIMARY if node == primary else Role.REPLICA)
            assert state.lineage.epoch == self.epoch(primary)
        assert self.live(primary) == self.contents[newest.guid]

    def epoch(self, node: str) -> int:
        lineage = self.lineage(node)
        assert lineage is not None
        return lineage.epoch

    def state_of(self, node: str) -> VolumeState:
        state = self.state(node)
        assert state is not None
        return state

    def recovered(self) -> str:
        """Nobody is the primary: a switch-over is finished or undone, or somebody is promoted."""
        for source, target in itertools.permutations(NODES, 2):
            state = self.state(source)
            last = newest_complete(state) if state is not None else None
            if last is None or handover_tag(target) not in last.holds:
                continue
            with contextlib.suppress(ReplicatorError):
                self.switch(self.pair(source, target, source))
            found = self.in_charge()
            if found is not None:
                return found
        there = [node for node in NODES if self.state(node) is not None]
        newest = max(there, key=self.epoch)
        plan = plan_promotion(self.situation(newest), draw=self.draw(10**6))
        assert isinstance(plan, Promotion)
        takeover.promote(self.weather.link(newest, newest), plan, aside_name(self.now), lambda: None)
        return newest


Roles.TestCase.settings = settings(stateful_step_count=30)
TestRoles = Roles.TestCase
