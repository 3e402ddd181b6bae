"""How a run goes on where a part of it does not: a busy volume."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import pytest

from replicator import replication
from replicator.cancellation import Cancellation
from replicator.errors import VolumeBusy
from tests.unit.test_unchanged import World

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
