"""What clones began as goes to their targets whoever made it, stays there, and goes first."""

from __future__ import annotations

from dataclasses import replace

import pytest

from replicator.errors import StorageError
from replicator.model import Origin, Role, VolumeId, VolumeInfo, VolumeState
from replicator.origins import origins_of
from replicator.planning import Intermediates, Plan, SendPolicy, origin_guids, plan, protected_guids
from replicator.replication import Options, Replication
from tests.support.versions import ROUTE, snap, source_state, target_state
from tests.unit.test_following import CLONE, COPY, REPLICA, TEMPLATE, Side, cloned, replica
from tests.unit.test_unchanged import World

BASE = snap(2, name="__base__")
NEWEST = SendPolicy(Intermediates.NEWEST, "vms", origins=frozenset({"__base__"}))


def sent(policy: SendPolicy, *there: int, batches: bool = False) -> list[str]:
    source = source_state(snap(1), BASE, snap(3), snap(4))
    target = target_state(*[snap(n) for n in there]) if there else None
    found = plan(source, target, policy, replace(ROUTE, batches=batches))
    assert isinstance(found, Plan)
    return [step.to.guid for step in found.steps]


def test_the_snapshot_that_a_clone_began_as_is_sent_whoever_made_it() -> None:
    assert sent(replace(NEWEST, origins=frozenset()), 1) == ["guid4"]
    assert sent(NEWEST, 1) == ["guid2", "guid4"]
    assert sent(NEWEST) == ["guid2", "guid4"]
    assert sent(replace(NEWEST, intermediates=Intermediates.ALL), 1) == ["guid2", "guid3", "guid4"]
    assert sent(replace(NEWEST, intermediates=Intermediates.ALL), 1, batches=True) == ["guid4"]
    own = replace(NEWEST, origins=frozenset({snap(3).name}))
    assert sent(own, 1) == ["guid3", "guid4"], "one of the job's own that is not the newest"
    other = replace(NEWEST, origins=frozenset({snap(2, job="other").name}))
    assert other.selects(snap(2, job="other")), "or one of another job"
    assert sent(NEWEST, 1, 3) == ["guid4"], "older than what is there: it cannot go"


def test_it_is_protected_on_both_sides() -> None:
    source = source_state(snap(1), BASE, snap(3))
    assert origin_guids(source, NEWEST) == {"guid2"}
    assert protected_guids(source, [target_state(snap(1), BASE, snap(3))], NEWEST) == {"guid2", "guid3"}


def test_the_origins_of_a_selection() -> None:
    one, two = (Origin(TEMPLATE, name) for name in ("one", "two"))
    listed = [VolumeInfo(VolumeId("tank", f"c{i}"), None, None, o) for i, o in enumerate((one, two, one, None))]
    assert origins_of(listed) == {TEMPLATE: {"one", "two"}}


# -- the clone itself


def waiting(*there: VolumeState, first: bool = True) -> tuple[Side, Replication]:
    """The replication of a clone of ``base``, whose job has what it is a clone of as well (or not)."""
    _, target, replication = cloned(*there)
    options = Options(SendPolicy(Intermediates.NEWEST, "vms"), origin_first=first)
    return target, Replication(replication._pair, options, observer=lambda _: None, cancel=replication._cancel)


@pytest.mark.parametrize("there", [(), (replace(replica(), versions=()),)])
def test_a_clone_waits_for_its_origin(there: tuple[VolumeState, ...]) -> None:
    """A plan shows what the run will do; a run whose origin did not arrive keeps the clone from going in full."""
    target, replication = waiting(*there)
    state = replication._pair.source.state(CLONE)
    assert state is not None
    fresh = plan(replace(state, versions=()), None, NEWEST, ROUTE)
    assert isinstance(fresh, Plan)
    assert "sent in full" in fresh.notes[0], "also where the first snapshot is still to be taken"
    found, _, _ = replication.plan()
    assert isinstance(found, Plan)
    assert found.steps[0].base == snap(1, name="base")
    assert "which goes to the target first: only the difference" in found.notes[0]
    with pytest.raises(StorageError, match="clone of tank:template@base, which goes to prox2:backup first") as error:
        replication.run()
    assert not error.value.retryable
    assert target.received == []
    target.states[REPLICA] = replica(snap(1, name="base"), snap(2))
    replication.run()
    assert [(request.origin, request.to.guid) for request in target.received] == [(REPLICA, "guid4")]
    assert COPY in target.states


def test_a_clone_does_not_wait_for_what_cannot_come() -> None:
    _, replication = waiting(replica(snap(2)))
    found, _, _ = replication.plan()
    assert isinstance(found, Plan)
    assert found.waits_for is None
    assert "has newer ones of tank:template and not that: it is sent in full" in found.notes[0]
    for there in ((), (replica(snap(9)),), (replica(snap(2), role=Role.PRIMARY),)):
        _, replication = waiting(*there, first=bool(there))
        found, _, _ = replication.plan()
        assert isinstance(found, Plan)
        assert (found.waits_for, found.steps[0].base) == (None, None)
        assert "which the target does not have: it is sent in full" in found.notes[0]


def test_what_a_plan_brings() -> None:
    source, there = source_state(snap(0), BASE, snap(3)), target_state(snap(0))
    batch = plan(source, there, replace(NEWEST, intermediates=Intermediates.ALL), replace(ROUTE, batches=True))
    assert isinstance(batch, Plan)
    assert [step.to for step in batch.steps] == [snap(3)]
    assert [batch.brings(version) for version in source.versions] == [None, BASE, snap(3)]


# -- whole runs


def test_runs_keep_what_clones_began_as(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(rest='keep = {source = "last=1", target = "last=1"}')
    memory = world.memory["a"]
    (base,) = memory.snapshot(("vm-1",), "__base__")
    world.run()
    assert world.snapshots("b") == world.snapshots("a")[1:], "no clone, so it is not the job's to send"
    own = world.snapshots("a")[-1]
    listed = memory.volumes

    def with_clones() -> tuple[VolumeInfo, ...]:
        origins = {"vm-2": Origin(VolumeId("store", "vm-1"), own), "vm-3": Origin(VolumeId("store", "gone"), "x")}
        return tuple(replace(volume, origin=origins.get(volume.id.name)) for volume in listed())

    monkeypatch.setattr(memory, "volumes", with_clones)
    tasks = {task.pair.source_volume.name: task for task in world.runner.tasks.of(world.job, "store:vm-1")}
    assert (tasks["vm-1"].origin, set(tasks["vm-1"].origins)) == (None, {own}), "also where only that volume is run"
    tasks = {task.pair.source_volume.name: task for task in world.runner.tasks.of(world.job)}
    assert tasks["vm-2"].origin == VolumeId("store", "vm-1")
    assert tasks["vm-3"].origin is None, "not in the job: nobody waits for it"
    for number in range(3):
        memory.write("vm-1", 0, bytes([number]))
        world.run()
    assert world.snapshots("a")[:2] == [base.name, own]
    assert world.snapshots("b")[0] == own
    assert (len(world.snapshots("a")), len(world.snapshots("b"))) == (3, 2), (
        "and nothing else that last=1 does not keep"
    )
    world.configure(rest='keep = {source = "last=1", target = "last=2"}')
    world.run()
    world.configure(rest='keep = {source = "last=1", target = "last=1"}')
    world.run()
    assert world.snapshots("b")[0] == own, "nor when volumes that stand still are pruned"
