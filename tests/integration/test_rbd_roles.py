"""A replica on another Ceph cluster takes over: promoted when its primary is lost, brought back, switched over and back
again; what is where is compared byte for byte at each step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest

from replicator import situations, takeover
from replicator.cancellation import Cancellation
from replicator.endpoint import SnapshotRequest
from replicator.errors import ConflictError, VolumeBusy
from replicator.local import LocalEndpoint
from replicator.model import Lineage, Role, Version, VolumeId, VolumeState, hold_tag
from replicator.planning import Intermediates, SendPolicy
from replicator.replication import Limits, Options, Pair, Replication
from replicator.transitions import Promotion, Rejoin, plan_promotion, plan_rejoin
from tests.lab.ceph import Cluster
from tests.support.blocks import pattern
from tests.support.faults import Crash, Fault, FaultyEndpoint, Point
from tests.support.rbd_case import RbdCase

pytestmark = [pytest.mark.tier("ceph"), pytest.mark.timeout(600)]

MIB = 1 << 20
SIZE = 12 * MIB
VOLUMES = {"one": VolumeId("store", "vm"), "two": VolumeId("backup", "one/vm")}


class World:
    """Two nodes with a storage each, a volume on ``one`` and its replica on ``two``."""

    def __init__(self, one: RbdCase, two: RbdCase) -> None:
        self.cases = {"one": one, "two": two}
        self.nodes = {
            "one": LocalEndpoint("one", {"store": one.backend}),
            "two": LocalEndpoint("two", {"backup": two.backend}),
        }
        self._numbers = itertools.count(1)
        one.create("vm", pattern(SIZE))
        self.sync("one", "two")

    def state(self, node: str) -> VolumeState:
        state = self.nodes[node].state(VOLUMES[node])
        assert state is not None
        return state

    def lineage(self, node: str) -> Lineage:
        lineage = self.state(node).lineage
        assert lineage is not None
        return lineage

    def roles(self) -> dict[str, Role]:
        return {node: self.lineage(node).role for node in self.nodes}

    def live(self, node: str) -> bytes:
        return self.cases[node].read(VOLUMES[node].name)

    def write(self, node: str) -> None:
        """As a guest does: some bytes across the ends of objects, a hole, and the size may change."""
        number = next(self._numbers)
        name = VOLUMES[node].name
        self.cases[node].write(name, number % 3 * 4 * MIB + 12345, pattern(100_000, number))
        with self.cases[node].image(name) as image:
            image.discard((number + 1) % 3 * 4 * MIB, MIB)

    def pair(self, source: str, target: str) -> Pair:
        tag = hold_tag("vms", "two", "backup")
        return Pair(self.nodes[source], VOLUMES[source], self.nodes[target], VOLUMES[target], tag)

    def snapshot(self, node: str) -> Version:
        name = f"s{next(self._numbers)}"
        return self.nodes[node].snapshot(SnapshotRequest((VOLUMES[node],), name))[0].get()

    def replicate(self, pair: Pair) -> Version | None:
        options = Options(SendPolicy(Intermediates.NEWEST), Limits(attempts=1))
        replication = Replication(pair, options, observer=lambda _: None, cancel=Cancellation())
        replication.run()
        return replication.outcome.newest

    def sync(self, source: str, target: str) -> Version:
        pair = self.pair(source, target)
        pair.source.ensure_primary(pair.source_volume)
        taken = self.snapshot(source)
        self.replicate(pair)
        self.check_equal()
        return taken

    def check_equal(self) -> None:
        """Every snapshot that both have is the same on both."""
        one, two = self.state("one"), self.state("two")
        common = [(version, two.by_guid(version.guid)) for version in one.versions]
        assert any(theirs is not None for _, theirs in common)
        for mine, theirs in common:
            if theirs is not None:
                left = self.cases["one"].read_snapshot(VOLUMES["one"].name, mine)
                assert left == self.cases["two"].read_snapshot(VOLUMES["two"].name, theirs), mine.name

    def promote(self, node: str) -> Promotion:
        others = {name: endpoint for name, endpoint in self.nodes.items() if name != node}
        situation = situations.find_out(self.nodes[node], VOLUMES[node], others, map)
        plan = plan_promotion(situation, draw=next(self._numbers), force=True)
        assert isinstance(plan, Promotion)
        takeover.promote(self.nodes[node], plan, "diverged-1", lambda: None)
        return plan

    def rejoin(self, node: str, source: str) -> takeover.Rejoined:
        pair = self.pair(source, node)
        self.snapshot(source)
        plan = plan_rejoin(self.state(node), source, pair.source.state(pair.source_volume))
        assert isinstance(plan, Rejoin)
        options = Options(SendPolicy(Intermediates.NEWEST), Limits(attempts=1))
        return takeover.rejoin(pair, plan, options, "diverged-2", observer=lambda _: None, cancel=Cancellation())

    def switchover(self, source: str, target: str) -> takeover.Switched:
        pair = self.pair(source, target)

        def bring() -> Version:
            taken = self.snapshot(source)
            return self.replicate(pair) or taken

        return takeover.Switchover(pair, bring, draw=lambda _: next(self._numbers), cancel=Cancellation()).run()


@pytest.fixture
def world(ceph: Cluster, other_ceph: Cluster) -> Iterator[World]:
    one, two = RbdCase(ceph.conf), RbdCase(other_ceph.conf, name="backup")
    yield World(one, two)
    one.close()
    two.close()


def test_a_replica_takes_over_and_the_old_primary_rejoins(world: World) -> None:
    replicated = world.live("one")
    world.write("one")
    diverged = world.live("one")
    plan = world.promote("two")
    assert world.live("two") == replicated
    world.write("two")
    newer = world.live("two")
    with pytest.raises(ConflictError, match="superseded"):
        world.replicate(world.pair("one", "two"))
    with world.cases["one"].in_use(VOLUMES["one"].name):  # its guest still runs
        assert takeover.notice_superseded(world.pair("one", "two"))
    assert world.roles() == {"one": Role.REPLICA, "two": Role.PRIMARY}
    assert world.live("one") == diverged

    done = world.rejoin("one", "two")
    assert done.lineage == Lineage(plan.lineage.uuid, Role.REPLICA, plan.lineage.epoch)
    assert done.done < SIZE // 2, "only the difference is sent"
    kept = {version.name: version for version in world.state("one").versions}
    assert [world.cases["one"].read_snapshot("vm", kept[name]) for name in done.aside] == [diverged]
    assert world.live("one") == newer
    world.check_equal()

    world.write("two")
    world.sync("two", "one")
    world.switchover("two", "one")  # and back to where it was
    assert world.roles() == {"one": Role.PRIMARY, "two": Role.REPLICA}
    assert world.live("one") == world.live("two")
    world.write("one")
    world.sync("one", "two")


def test_a_switchover_and_back_loses_nothing(world: World) -> None:
    for source, target in (("one", "two"), ("two", "one"), ("one", "two")):
        world.write(source)
        content = world.live(source)
        world.switchover(source, target)
        assert world.roles() == {source: Role.REPLICA, target: Role.PRIMARY}
        assert world.live(target) == content
        world.write(target)
        world.sync(target, source)


def test_a_primary_that_is_in_use_stays_the_primary(world: World) -> None:
    with world.cases["one"].in_use("vm"), pytest.raises(VolumeBusy):
        world.switchover("one", "two")
    assert world.roles() == {"one": Role.PRIMARY, "two": Role.REPLICA}
    world.write("one")
    world.sync("one", "two")


def test_a_half_received_snapshot_is_discarded(world: World) -> None:
    replicated = world.live("one")
    world.write("one")
    taken = world.snapshot("one")
    pair = world.pair("one", "two")
    cut = FaultyEndpoint(pair.target, Fault("receive", Point.CUT, Crash(), chunks=1))
    with pytest.raises(Crash):
        world.replicate(replace(pair, target=cut))
    assert world.state("two").resume is not None
    assert world.state("two").by_guid(taken.guid) is None
    world.promote("two")
    assert world.live("two") == replicated
    state = world.state("two")
    assert (state.resume, state.head_changed) == (None, False)
