"""Promotions, switch-overs and rejoins of one volume on three nodes, in any order and with failures anywhere.

The real code drives real endpoints whose storage is memory; see ``tests/support/weather.py`` for what goes wrong. What
must always hold is checked after every rule, and each promotion at the moment of it, against a model that knows what
was written, acknowledged and pruned:

- never are two copies primary under the same epoch, nor one after the other, and the epoch of a copy never falls
- what a promoted copy begins with is a complete snapshot, byte for byte
- what is written to a primary is in it for as long as it is the primary
- the last version that a copy has in common with the one that it follows is never pruned
- what a promoted copy had in common with another one it has until that one has followed
- what a copy has acknowledged it has, until a policy prunes it
- a switch-over loses nothing, and a switch-over, a rejoin or a late request never makes a second primary
- a primary that was told that it was superseded is none any more
- when failures stop, everything converges: one primary, and the same on all three nodes
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from backends.memory import MemoryBackend
from replicator import situations, takeover
from replicator.cancellation import Cancellation
from replicator.endpoint import PruneRequest, SnapshotRequest
from replicator.errors import ConflictError, ReplicatorError, StaleEpoch
from replicator.local import LocalEndpoint
from replicator.model import (
    HoldTag,
    Lineage,
    Role,
    Version,
    VersionRef,
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
from replicator.transitions import Promotion, Rejoin, plan_promotion, plan_rejoin
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
at_a_change = st.builds(Fault, st.sampled_from(Trouble), st.integers(0, 2), st.just("change_role"))
faults = st.lists(some | at_a_change, max_size=2)
unlucky = st.sampled_from([Trouble.REFUSED, Trouble.LOST, Trouble.LATE, Trouble.CRASH_BEFORE])


class Impatient(Cancellation):
    """Does not wait between two attempts."""

    def wait(self, seconds: float) -> bool:
        return super().wait(min(seconds, 0.0))


class Watched(MemoryBackend):
    """Tells of each promotion before and after it."""

    def __init__(self, clock: Callable[[], datetime], around: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__("store", checksums=checksum, chunk_size=PAGE, clock=clock)
        self._around = around

    def promote(self, volume: str, lineage: Lineage, at: VersionRef) -> None:
        with self._around():
            super().promote(volume, lineage, at)


@dataclass
class Known:
    """What the model knows of a node's copy.

    :ivar acknowledged: guids of versions that it has confirmed
    :ivar follows: the node that it was last brought forward from
    :ivar needs: the node that was promoted last, and the version of it from which this copy can follow it
    :ivar epoch: the highest that it has had
    :ivar live: what guests have written, while it is a primary
    """

    memory: MemoryBackend
    acknowledged: set[str] = field(default_factory=set)
    pruned: set[str] = field(default_factory=set)
    follows: str | None = None
    needs: tuple[str, Version] | None = None
    epoch: int = 0
    live: bytes | None = None


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
        self.disturbed = False

    @initialize(size=st.integers(1, 6), second=st.booleans())
    def start(self, size: int, second: bool) -> None:
        for node in NODES:
            memory = Watched(lambda: self.now, functools.partial(self.promoting, node))
            self.known[node] = Known(memory)
            self.weather.nodes[node] = LocalEndpoint(node, {"store": memory})
        self.known["n1"].memory.create("vm", pattern(size * PAGE))
        self.weather.nodes["n1"].ensure_primary(OWN)
        self.known["n1"].live = self.live("n1")
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
                self.known[node].live = self.live(node)

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
        assert self.disturbed or set(self.primaries()) <= set(before) or len(self.primaries()) <= max(1, len(before))

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
            pair = self.pair(source, to, driver)
            replication = Replication(pair, self.options(), observer=lambda _: None, cancel=Impatient())
            try:
                replication.run()
            except ReplicatorError as error:
                if isinstance(error, StaleEpoch) or (isinstance(error, ConflictError) and error.kind == "stale_epoch"):
                    takeover.notice_superseded(pair)
                    assert self.disturbed or source not in self.primaries(), "it was told that it was superseded"
                raise
            self.followed(to, source, replication.outcome.newest)
        after = self.primaries()
        assert self.disturbed or after.items() <= before.items()
        assert self.disturbed or set(before) - set(after) <= {source}

    def followed(self, node: str, source: str, newest: Version | None) -> None:
        """A copy has confirmed a version."""
        if newest is None:
            return
        known = self.known[node]
        known.acknowledged.add(newest.guid)
        known.follows = source
        known.needs = None
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
        self.promotion(self.pick(data, self.among(Role.REPLICA)), force, word, faults)

    def promotion(self, node: str, force: bool, word: bool, faults: list[Fault]) -> None:
        if self.state(node) is None or node in self.weather.off:
            return
        before, reached = self.primaries(), self.reached_from(node)
        answering = {other for other in reached & set(before) if self.epoch(other) >= self.epoch(node)}
        with self.failing(faults):
            plan = plan_promotion(self.situation(node), draw=self.draw(10**6), force=force, primary_is_down=word)
            if isinstance(plan, Promotion):
                takeover.promote(self.weather.link(node, node), plan, aside_name(self.now), lambda: None)
        if not force and node not in before and not self.disturbed:
            assert node not in self.primaries() or not answering, "beside a primary that answers"

    def reached_from(self, node: str) -> set[str]:
        """The nodes that a node reaches, or a third one that it reaches."""
        first = {other for other in NODES if self.weather.reaches(node, other)}
        return {other for other in NODES for way in first if self.weather.reaches(way, other)}

    @rule(data=st.data(), faults=faults)
    def demote(self, data: st.DataObject, faults: list[Fault]) -> None:
        self.demotion(self.pick(data, self.among(Role.PRIMARY)), faults)

    def demotion(self, node: str, faults: list[Fault]) -> None:
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
        self.handover(source, to, data.draw(st.sampled_from([source, source, to])), faults)

    def handover(self, source: str, to: str, driver: str, faults: list[Fault]) -> None:
        if source == to or self.state(source) is None:
            return
        if driver in self.weather.off or self.state(to) is None:
            return
        before = self.primaries()
        content = self.live(source) if source in before else None
        with self.failing(faults):
            self.switch(self.pair(source, to, driver), driver)
            assert self.disturbed or set(self.primaries()) - set(before) <= {to}
            assert self.disturbed or content in (None, self.live(to)), "a switch-over lost something"
        assert self.disturbed or len(self.primaries()) <= max(1, len(before)), "a switch-over made a second primary"

    @rule(data=st.data(), to=nodes, nth=st.integers(0, 25), back=st.booleans())
    def hand_over_and_back(self, data: st.DataObject, to: str, nth: int, back: bool) -> None:
        """What was asked for in the first half arrives after the second."""
        source = self.pick(data, self.among(Role.PRIMARY))
        if source == to or self.state(to) is None or self.state(source) is None or len(self.primaries()) != 1:
            return
        self.weather.deliver()
        late = [Fault(Trouble.LATE, nth)] if back else [Fault(Trouble.LATE, nth % 2, "change_role")]
        if not back:
            late.append(Fault(data.draw(unlucky), nth // 2 % 2, "change_role"))
        driver = data.draw(st.sampled_from([source, to]))
        with self.failing(late):
            self.switch(self.pair(source, to, driver), driver)
        if back:
            with self.failing([]):
                self.switch(self.pair(to, source, source), source)
        before = set(self.primaries())
        self.late_requests_arrive()
        after = set(self.primaries())
        assert len(after) <= 1
        # Told to step down, with the request on its way, and busy when it was to be barred: it steps down late, and the
        # same command finishes that.
        assert not before or (after == before if back else after <= before)

    def switch(self, pair: Pair, driver: str) -> None:
        def bring() -> Version:
            self.snapshot(pair.source.node)
            replication = Replication(pair, self.options(), observer=lambda _: None, cancel=Impatient())
            replication.run()
            assert replication.outcome.newest is not None
            self.followed(pair.target.node, pair.source.node, replication.outcome.newest)
            return replication.outcome.newest

        takeover.check_not_overtaken(pair, {node: self.weather.link(driver, node) for node in NODES})
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
        assert self.disturbed or set(self.primaries()) <= set(before)

    @rule(
        data=st.data(),
        first=st.sampled_from(["replicate", "replicate", "promote", "promote", "demote", "switchover", "rejoin"]),
        second=st.sampled_from(["reign"] * 3 + ["promote", "demote", "switchover", "time passes", "late requests"]),
        nth=st.integers(0, 6) | st.integers(0, 40),
    )
    def two_at_once(self, data: st.DataObject, first: str, second: str, nth: int) -> None:
        """Between two calls of what is done with a copy somebody does something else with the same one."""
        node = self.pick(data, self.among(Role.PRIMARY if first == "demote" else Role.REPLICA))
        self.disturbed = True
        self.weather.meanwhile = self.weather.calls + nth, lambda: self.do(second, node, data)
        try:
            self.do(first, node, data)
        finally:
            self.disturbed, self.weather.meanwhile = False, None

    def do(self, what: str, node: str, data: st.DataObject) -> None:
        match what:
            case "replicate":
                source = self.pick(data, self.among(Role.PRIMARY))
                self.write(source, 0)
                self.snapshot(source)
                self.sync(source, node, source, [])
            case "reign":  # one that came and went
                self.do("promote", node, data)
                self.demotion(node, [])
            case "promote":
                self.promotion(node, True, True, [])
                self.write(node, 0)
            case "demote":
                self.demotion(node, [])
            case "switchover":
                source = self.pick(data, self.among(Role.PRIMARY))
                self.handover(source, node, source, [])
            case "rejoin":
                self.rejoin(node, data, [])
            case "time passes":
                self.time_passes("last=1", 2)
            case _:
                self.late_requests_arrive()

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
        if own is not None and not self.disturbed:  # what only it had is where the message says
            state = self.state(node)
            assert state is not None
            kept = [self.contents[v.guid] for v in state.snapshots if v.name in done.aside]
            assert own in kept or (plan.common is not None and own == self.contents[plan.common[0].guid])

    # -- what always holds

    @contextlib.contextmanager
    def promoting(self, node: str) -> Iterator[None]:
        """Of every promotion, when it happens: it begins a reign, with a complete snapshot, or changes nothing."""
        before = self.primaries().get(node)
        yield
        state, live = self.state_of(node), self.live(node)
        assert state.lineage is not None
        if before is not None:
            assert live == self.known[node].live, "what was written to a primary is lost"
        if before == state.lineage:
            return
        newest = newest_complete(state)
        assert newest is not None
        assert live == self.contents[newest.guid], "promoted with something incomplete"
        self.known[node].live = live
        for other, known in self.known.items():
            theirs = self.state(other)
            common = newest_common(state, theirs) if theirs is not None and other != node else None
            known.needs = (node, common.source) if common is not None else None

    @invariant()
    def no_two_primaries_share_an_epoch(self) -> None:
        for node, lineage in self.primaries().items():
            assert self.reigns.setdefault(lineage.epoch, node) == node

    @invariant()
    def epochs_do_not_fall(self) -> None:
        for node, known in self.known.items():
            lineage = self.lineage(node)
            assert known.epoch <= (lineage.epoch if lineage is not None else 0)
            known.epoch = lineage.epoch if lineage is not None else 0

    @invariant()
    def what_is_written_to_a_primary_is_there(self) -> None:
        for node in self.primaries():
            assert self.live(node) == self.known[node].live

    @invariant()
    def who_is_to_follow_can(self) -> None:
        for node, known in self.known.items():
            if known.needs is None or known.needs[0] not in self.primaries():
                continue
            primary, needed = known.needs
            state = self.state_of(primary)
            common = newest_common(state, self.state(node))
            assert state.by_guid(needed.guid) is not None or (
                common is not None and common.source.position > needed.position
            )

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
                self.switch(self.pair(source, target, source), source)
            found = self.in_charge()
            if found is not None:
                return found
        there = [node for node in NODES if self.state(node) is not None]
        newest = max(there, key=self.epoch)
        plan = plan_promotion(self.situation(newest), draw=self.draw(10**6))
        assert isinstance(plan, Promotion)
        takeover.promote(self.weather.link(newest, newest), plan, aside_name(self.now), lambda: None)
        return newest


Roles.TestCase.settings = settings(stateful_step_count=30, max_examples=4 * settings().max_examples)
TestRoles = Roles.TestCase
