"""Promotions, switch-overs and rejoins that are cut off at every single call, in every way there is: the same command
again finishes the work or undoes it, and a request that arrives long after changes nothing."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest

from backends.memory import MemoryBackend
from replicator import situations, takeover
from replicator.cancellation import Cancellation
from replicator.endpoint import PruneRequest, SnapshotRequest
from replicator.errors import ConflictError, NotAuthorized, ReplicatorError, VolumeBusy, VolumeChanged
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
    rejoin_tag,
    snapshot_name,
    waits_for_rejoin,
)
from replicator.planning import Intermediates, SendPolicy
from replicator.replication import Limits, Options, Pair, Replication
from replicator.role_refusals import Refusal
from replicator.roles import newest_complete
from replicator.transitions import Promotion, Rejoin, plan_promotion, plan_rejoin
from tests.support.blocks import pattern
from tests.support.faults import Crash
from tests.support.versions import at
from tests.support.weather import Fault, Trouble, Weather
from transport import checksum

PAGE = 4096
JOB = "vms"
MOST_CALLS = 40
"""More than any of these operations makes."""


class Impatient(Cancellation):
    """Does not wait between two attempts."""

    def wait(self, seconds: float) -> bool:
        return super().wait(min(seconds, 0.0))


class World:
    """A volume on n1, replicated to n2 (and to n3)."""

    def __init__(self, *nodes: str) -> None:
        self.numbers = itertools.count(1)
        self.now = at(0)
        self.weather = Weather()
        self.memory: dict[str, MemoryBackend] = {}
        for node in nodes or ("n1", "n2"):
            memory = MemoryBackend("store", checksums=checksum, chunk_size=PAGE, clock=lambda: self.now)
            self.memory[node] = memory
            self.weather.nodes[node] = LocalEndpoint(node, {"store": memory})
        self.memory["n1"].create("vm", pattern(4 * PAGE))
        for node in self.memory:
            if node != "n1":
                self.sync("n1", node)

    @staticmethod
    def volume(node: str) -> VolumeId:
        return VolumeId("store", "vm" if node == "n1" else "n1/vm")

    def state(self, node: str) -> VolumeState:
        state = self.memory[node].state(self.volume(node).name)
        assert state is not None
        return state

    def lineage(self, node: str) -> Lineage:
        lineage = self.state(node).lineage
        assert lineage is not None
        return lineage

    def primaries(self) -> list[str]:
        return [node for node in self.memory if self.lineage(node).role is Role.PRIMARY]

    def live(self, node: str) -> bytes:
        return self.memory[node].read(self.volume(node).name)

    def write(self, node: str) -> None:
        page = next(self.numbers) % 4
        self.memory[node].write(self.volume(node).name, page * PAGE, pattern(PAGE, next(self.numbers)))

    def pair(self, source: str, target: str, driver: str) -> Pair:
        return Pair(
            self.weather.link(driver, source),
            self.volume(source),
            self.weather.link(driver, target),
            self.volume(target),
            hold_tag(JOB, max(source, target), "store"),
        )

    def snapshot(self, node: str) -> Version:
        self.now += at(1) - at(0)
        name = snapshot_name(JOB, self.now)
        return self.weather.nodes[node].snapshot(SnapshotRequest((self.volume(node),), name))[0].get()

    def sync(self, source: str, target: str) -> Version:
        at_least = self.snapshot(source)
        return self.replicate(self.pair(source, target, source)) or at_least

    def replicate(self, pair: Pair) -> Version | None:
        options = Options(SendPolicy(Intermediates.NEWEST, JOB), Limits(attempts=1))
        replication = Replication(pair, options, observer=lambda _: None, cancel=Impatient())
        replication.run()
        return replication.outcome.newest

    # -- the commands

    def switchover(self, source: str = "n1", target: str = "n2", driver: str = "n1") -> takeover.Switched:
        pair = self.pair(source, target, driver)

        def bring() -> Version:
            taken = self.snapshot(source)
            return self.replicate(pair) or taken

        takeover.check_not_overtaken(pair, {node: self.weather.link(driver, node) for node in self.memory})
        return takeover.Switchover(pair, bring, draw=lambda _: next(self.numbers), cancel=Impatient()).run()

    def planned(self, node: str, *, force: bool = False, word: bool = False) -> Promotion | Refusal:
        peers = {other: self.weather.link(node, other) for other in self.memory if other != node}
        situation = situations.find_out(self.weather.link(node, node), self.volume(node), peers, map)
        return plan_promotion(situation, draw=next(self.numbers), force=force, primary_is_down=word)

    def promote(self, node: str = "n2", *, force: bool = False, word: bool = True) -> None:
        plan = self.planned(node, force=force, word=word)
        if isinstance(plan, Refusal):
            raise plan.to_error()
        takeover.promote(self.weather.link(node, node), plan, "diverged-1", lambda: None)

    def rejoin(self, node: str = "n1", source: str = "n2") -> takeover.Rejoined:
        pair = self.pair(source, node, node)
        self.snapshot(source)
        plan = plan_rejoin(self.state(node), source, pair.source.state(pair.source_volume))
        if isinstance(plan, Refusal):
            raise plan.to_error()
        assert isinstance(plan, Rejoin)
        options = Options(SendPolicy(Intermediates.NEWEST), Limits(attempts=1))
        return takeover.rejoin(pair, plan, options, "diverged-2", observer=lambda _: None, cancel=Impatient())


TROUBLES = list(Trouble)


def every_way(
    begin: Callable[[], World], act: Callable[[World], object], second: bool = False
) -> Iterator[tuple[World, str, bool]]:
    """The world after an operation that was cut off, at each of its calls and in every way; whether it said that it
    was done. With ``second`` another fault follows the first."""
    for trouble in TROUBLES:
        for more in [None, *(TROUBLES if second else [])]:
            for nth in range(MOST_CALLS):
                world = begin()
                world.weather.faults = [Fault(trouble, nth), *([Fault(more, 0)] if more else [])]
                done = False
                with contextlib.suppress(Crash, ReplicatorError):
                    act(world)
                    done = True
                hit = not world.weather.faults or world.weather.faults[0].trouble is not trouble
                world.weather.faults = []
                yield world, f"{trouble} at call {nth}, then {more}", done
                if not hit:
                    break  # the operation has no more calls


@pytest.mark.parametrize("driver", ["n1", "n2"])
def test_a_switchover_that_is_cut_off_is_finished_or_undone(driver: str, soak: bool) -> None:
    def begin() -> World:
        world = World()
        if driver == "n2":  # it goes the other way: n1 drives, and the primary is far
            world.switchover()
            world.write("n2")
        return world

    source, target = ("n1", "n2") if driver == "n1" else ("n2", "n1")
    cut = 0
    for world, what, done in every_way(begin, lambda world: world.switchover(source, target, "n1"), soak):
        content = world.live(world.primaries()[0]) if world.primaries() else None
        assert len(world.primaries()) <= 1, what
        if done:
            assert world.primaries() == [target], what
        cut += not done
        world.switchover(source, target, "n1") if world.primaries() != [target] else None
        assert world.primaries() == [target], what
        assert content is None or world.live(target) == content, what
        world.write(target)
        world.weather.deliver()
        assert world.primaries() == [target], f"{what}: a request came late"
        world.sync(target, source)
        assert newest_complete(world.state(source)) is not None
        assert world.lineage(source).epoch == world.lineage(target).epoch, what
        assert not any(handover_tag(target) in v.holds for v in world.state(source).versions), what
    assert cut > 20


def test_late_requests_of_one_switchover_do_not_disturb_the_next() -> None:
    for world, what, _ in every_way(World, World.switchover):
        if world.primaries() != ["n2"]:
            with contextlib.suppress(ReplicatorError):
                world.switchover()
        late, world.weather.late = world.weather.late, []
        world.switchover("n2", "n1", "n1")
        world.weather.late = late
        world.weather.deliver()
        assert world.primaries() == ["n1"], what


def test_a_promotion_that_is_cut_off_is_finished() -> None:
    def begin() -> World:
        world = World()
        world.write("n1")
        world.weather.faults = [Fault(Trouble.CUT, 0), Fault(Trouble.CUT, 0)]  # what came forward is tried again
        with contextlib.suppress(ReplicatorError):
            world.sync("n1", "n2")
        assert world.state("n2").resume is not None
        world.weather.off.add("n1")
        return world

    for world, what, _ in every_way(begin, World.promote):
        complete = newest_complete(world.state("n2"))
        assert complete is not None
        world.promote()
        assert world.lineage("n2").role is Role.PRIMARY, what
        assert world.live("n2") == world.memory["n2"].read("n1/vm", complete.ref), what
        assert world.state("n2").resume is None, what
        epoch = world.lineage("n2").epoch
        world.promote()
        assert world.lineage("n2").epoch == epoch, "promoted once"


def test_a_rejoin_that_is_cut_off_is_finished(soak: bool) -> None:
    def begin() -> World:
        world = World()
        world.weather.off.add("n1")
        world.promote()
        world.write("n2")
        world.weather.off.clear()
        world.write("n1")
        world.snapshot("n1")
        world.write("n1")
        return world

    own = begin().live("n1")
    for world, what, _ in every_way(begin, World.rejoin, soak):
        world.rejoin()
        assert world.primaries() == ["n2"], what
        state = world.state("n1")
        newest = newest_complete(state)
        assert newest is not None
        assert world.memory["n1"].read("vm", newest.ref) == world.live("n2"), what
        kept = [world.memory["n1"].read("vm", v.ref) for v in state.snapshots if v.is_diverged]
        assert own in kept, what
        world.weather.deliver()
        world.write("n2")
        world.sync("n2", "n1")
        assert world.primaries() == ["n2"], what


def test_what_the_old_primary_needs_stays_until_it_has_followed() -> None:
    world = World()
    world.weather.off.add("n1")
    world.promote()
    point = newest_complete(world.state("n2"))
    assert point is not None
    own, place = world.weather.nodes["n2"], world.volume("n2")

    def tidied() -> list[str]:
        """What is left once the daemon has released what no job of its node holds, and a policy has pruned."""
        for version in world.state("n2").versions:
            for tag in version.tags:
                if HoldTag.parse(tag) is not None:
                    own.release(place, version.ref, tag)
        own.prune(PruneRequest(place, JOB, "last=1", ()))
        return [version.guid for version in world.state("n2").snapshots]

    for _ in range(3):
        world.write("n2")
        world.snapshot("n2")
    assert point.guid in tidied()
    world.weather.off.clear()
    world.write("n1")
    done = world.rejoin()
    assert 0 < done.done < 4 * PAGE, "only the difference"
    assert len(tidied()) == 1, "and from then on it is pruned as ever"


def test_a_third_copy_can_follow_after_a_switchover() -> None:
    world = World("n1", "n2", "n3")
    world.sync("n1", "n2")
    world.replicate(world.pair("n1", "n3", "n1"))
    world.write("n1")
    world.switchover()
    for number in range(3):
        world.memory["n2"].write("n1/vm", 0, pattern(PAGE, number))
        world.sync("n2", "n1")
        world.weather.nodes["n2"].prune(PruneRequest(world.volume("n2"), JOB, "last=1", ()))
    done = world.rejoin("n3", "n2")
    assert 0 < done.done < 4 * PAGE, "only the difference"
    world.weather.nodes["n2"].prune(PruneRequest(world.volume("n2"), JOB, "last=1", ()))
    assert len(world.state("n2").snapshots) <= 2, "and from then on it is pruned as ever"


def test_an_unfinished_switchover_is_not_finished_once_a_third_copy_was_promoted() -> None:
    world = World("n1", "n2", "n3")
    world.weather.faults = [Fault(Trouble.CRASH_BEFORE, 3, "change_role")]
    with pytest.raises(Crash):
        world.switchover()
    assert world.primaries() == []
    world.promote("n3", force=True)
    with pytest.raises(ConflictError) as caught:
        world.switchover()
    assert caught.value.kind == "superseded"
    assert world.primaries() == ["n3"]


def test_a_switchover_that_was_undone_keeps_nothing_from_being_pruned() -> None:
    world = World()
    world.weather.faults = [Fault(Trouble.LATE, 1, "change_role"), Fault(Trouble.REFUSED, 0, "change_role")]
    with pytest.raises(VolumeBusy):
        world.switchover()
    assert world.primaries() == ["n1"]
    world.weather.deliver()
    assert world.primaries() == ["n1"]
    world.sync("n1", "n2")
    assert not any(waits_for_rejoin(version) for version in world.state("n2").versions)


def meanwhile(act: Callable[[World], object], other: Callable[[World], object]) -> None:
    """Do one thing, and before each of its calls in turn another one. Whatever comes of it, epochs do not fall, and
    what is written to a primary stays for as long as it is one."""
    for nth in range(MOST_CALLS):
        world = World()
        epochs: dict[str, int] = {}
        written: dict[tuple[str, int], bytes] = {}
        done: list[bool] = []

        def interrupt(
            world: World = world,
            epochs: dict[str, int] = epochs,
            written: dict[tuple[str, int], bytes] = written,
            done: list[bool] = done,
        ) -> None:
            done.append(True)
            other(world)
            epochs.update({node: world.lineage(node).epoch for node in world.memory})
            written.update({(node, world.lineage(node).epoch): world.live(node) for node in world.primaries()})

        world.weather.meanwhile = world.weather.calls + nth, interrupt
        with contextlib.suppress(ReplicatorError):
            act(world)
        if not done:  # it makes no more calls
            assert nth > 2
            return
        reigning = {(node, world.lineage(node).epoch) for node in world.primaries()}
        assert len({epoch for _, epoch in reigning}) == len(reigning)
        for node, epoch in epochs.items():
            assert world.lineage(node).epoch >= epoch, f"{node}, before call {nth}"
        for node, epoch in reigning & written.keys():
            assert world.live(node) == written[node, epoch], f"what was written to {node} is lost, before call {nth}"
    raise AssertionError("it makes more calls")


def overtake(world: World) -> None:
    """Somebody promotes the copy and writes to it."""
    world.promote(force=True)
    world.write("n2")


def reign(world: World) -> None:
    """The same, and it is demoted again."""
    overtake(world)
    takeover.step_down(world.weather.nodes["n2"], world.volume("n2"), world.lineage("n2"), world.snapshot("n2"))


@pytest.mark.parametrize("other", [overtake, reign])
def test_a_copy_that_was_promoted_meanwhile_takes_nothing_of_the_old_epoch(other: Callable[[World], object]) -> None:
    meanwhile(lambda world: world.sync("n1", "n2"), other)


@pytest.mark.parametrize("other", [overtake, reign])
def test_a_role_that_was_changed_meanwhile_is_not_changed_again(other: Callable[[World], object]) -> None:
    for act in (World.switchover, lambda world: world.promote(force=True)):
        meanwhile(act, other)


def test_two_cut_off_replicas_that_are_both_forced_differ_in_their_epochs() -> None:
    world = World("n1", "n2", "n3")
    world.weather.off.add("n1")
    world.weather.cut.add(frozenset(("n2", "n3")))
    for node in ("n2", "n3"):
        world.promote(node)
    assert world.lineage("n2").epoch != world.lineage("n3").epoch
    world.weather.clear()
    loser, winner = sorted(("n2", "n3"), key=lambda node: world.lineage(node).epoch)
    for node in (loser, "n1"):
        world.rejoin(node, winner)
    assert world.primaries() == [winner]


def test_a_third_node_is_a_witness() -> None:
    world = World("n1", "n2", "n3")
    world.weather.cut.add(frozenset(("n1", "n2")))
    with pytest.raises(ConflictError) as caught:  # n3 reaches it: only n2 is cut off
        world.promote(word=False)
    assert caught.value.kind == "primary_answers"
    assert "n3 reaches it" in str(caught.value)
    world.weather.off.add("n1")
    plan = world.planned("n2")
    assert isinstance(plan, Promotion)
    assert any("n3 does not reach n1 either" in reason for reason in plan.reasons)
    world.weather.off.add("n3")
    with pytest.raises(ConflictError) as caught:
        world.promote(word=False)
    assert caught.value.kind == "no_witness"
    world.promote(word=True)


def test_a_primary_in_use_or_written_to_is_not_handed_over() -> None:
    world = World()
    world.memory["n1"].attach("vm", "a guest")
    with pytest.raises(VolumeBusy):
        world.switchover()
    assert world.primaries() == ["n1"]
    world.memory["n1"].detach("vm")

    def bring() -> Version:
        taken = world.snapshot("n1")
        world.replicate(world.pair("n1", "n2", "n1"))
        world.write("n1")
        return taken

    pair = world.pair("n1", "n2", "n1")
    with pytest.raises(VolumeChanged):
        takeover.Switchover(pair, bring, draw=lambda _: next(world.numbers), cancel=Impatient()).run()
    assert world.primaries() == ["n1"]
    assert not any(handover_tag("n2") in v.holds for v in world.state("n1").versions)


def test_a_right_that_is_missing_is_an_answer_and_leaves_the_primary(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    hold = world.memory["n2"].hold

    def refuse(volume: str, version: VersionRef, tag: str) -> None:
        if tag == rejoin_tag("n1"):
            raise NotAuthorized("no right to it", hint="")
        hold(volume, version, tag)

    monkeypatch.setattr(world.memory["n2"], "hold", refuse)
    with pytest.raises(NotAuthorized):
        world.switchover()
    assert world.primaries() == ["n1"]
    world.write("n1")
    world.sync("n1", "n2")


def test_a_superseded_primary_is_marked_and_keeps_its_data() -> None:
    world = World()
    world.weather.off.add("n1")
    world.promote()
    world.weather.off.clear()
    world.write("n1")
    content = world.live("n1")
    assert takeover.notice_superseded(world.pair("n1", "n2", "n1"))
    assert world.primaries() == ["n2"]
    assert world.live("n1") == content
    assert takeover.notice_superseded(world.pair("n1", "n2", "n1"))
    kept = world.rejoin().aside
    assert [world.memory["n1"].read("vm", v.ref) for v in world.state("n1").snapshots if v.name in kept] == [content]
    assert not takeover.notice_superseded(world.pair("n2", "n1", "n1"))
