"""How a run goes on where a part of it does not: a busy volume, a slow target, a request to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import pytest

from replicator import replication
from replicator.cancellation import Cancellation
from replicator.control import RunReport
from replicator.errors import VolumeBusy
from replicator.model import Version
from replicator.runs import WORKERS
from tests.unit.test_unchanged import VOLUMES, World

BUSY = VolumeBusy("dataset is busy", hint="find out what uses it")


def run(
    world: World, listen: Callable[[object], None] = lambda _: None, cancel: Cancellation | None = None
) -> set[str]:
    for endpoint in world.endpoints.values():
        endpoint.calls.clear()
    reports = world.runner.run(world.job, "store:vm-1", None, listen, cancel or Cancellation())
    return {report.outcome for report in reports}


@pytest.mark.parametrize(("node", "call"), [("b", "receive"), ("a", "snapshot")])
def test_a_volume_that_is_busy_for_another_reason_than_a_run_of_it_is_a_failure(
    node: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was brought over, and nobody is about to: it counts, and a command that ran it fails."""

    def refuse(*_: object) -> NoReturn:
        raise BUSY

    monkeypatch.setattr(replication, "PAUSE_BETWEEN_ATTEMPTS", 0.0)
    world = World()
    monkeypatch.setattr(world.endpoints[node], call, refuse, raising=False)
    assert run(world) == {"failed"}
    (task,) = world.runner.tasks.of(world.job, "store:vm-1")
    known = world.tracker.get(task.key)
    assert (known.outcome, known.failures, known.message) == ("failed", 1, "dataset is busy")


def test_a_replica_that_another_run_works_on_is_skipped() -> None:
    world = World()
    (task,) = world.runner.tasks.of(world.job, "store:vm-1")
    with world.runner.turns.take(task, Cancellation()):
        assert run(world) == {"skipped"}
    assert world.tracker.get(task.key).failures == 0
    assert run(world) == {"ok"}


# -- a slow target


def test_a_slow_target_does_not_keep_volumes_from_another() -> None:
    """However many volumes wait for it: here it takes nothing before the other target has everything."""
    world = World(targets='["b:store", "c:store"]')
    number = 2 * WORKERS
    for index in range(number):
        world.memory["a"].create(f"more-{index}", b"x")
    arrived: list[str] = []
    everything = threading.Event()
    slow = world.endpoints["c"]
    receive = slow.receive

    def wait_and_receive(*args: Any) -> Version:
        in_time = everything.wait(20)
        everything.set()
        assert in_time, f"{len(arrived)} volumes have arrived at the other target"
        return receive(*args)

    def listen(told: object) -> None:
        if isinstance(told, RunReport) and told.target == "b:store":
            arrived.append(told.volume)
            if len(arrived) == number + len(VOLUMES):
                everything.set()

    slow.receive = wait_and_receive  # type: ignore[assignment, method-assign]
    reports = world.runner.run(world.job, None, None, listen, Cancellation())
    assert [report.message for report in reports if report.outcome != "ok"] == []
    assert len(reports) == 2 * (number + len(VOLUMES))


# -- a request to stop


def test_a_run_that_is_stopped_neither_asks_nor_prunes_any_more() -> None:
    world = World(rest='keep = {source = "last=1", target = "last=1"}')
    run(world)
    world.memory["a"].write("vm-1", 0, b"!")
    cancel = Cancellation()
    world.endpoints["a"].before["snapshot"] = cancel.cancel
    assert run(world, cancel=cancel) == {"cancelled"}
    asked = world.calls("a") | world.calls("b")
    assert {"prune", "state", "send"}.isdisjoint(asked), asked


def test_a_run_that_is_stopped_reports_what_lacks_nothing() -> None:
    world = World(rest='keep = {source = "last=5", target = "last=5"}')
    for number in range(3):
        world.memory["a"].write("vm-1", 0, bytes([number]))
        world.now += timedelta(minutes=1)
        run(world)
    world.configure(rest='keep = {source = "last=2", target = "last=2"}')
    cancel = Cancellation()
    world.endpoints["b"].before["heads"] = cancel.cancel
    assert run(world, cancel=cancel) == {"ok"}
    assert "prune" not in world.calls("a") | world.calls("b")
    assert len(world.snapshots("a")) == 3
    assert run(world) == {"ok"}
    assert (len(world.snapshots("a")), len(world.snapshots("b"))) == (2, 2), "what was left is done by the next"
