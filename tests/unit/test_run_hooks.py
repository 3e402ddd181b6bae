"""Hooks around a run: what a failed ``before`` means, and the command after each run, however it ended."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from replicator.cancellation import Cancellation
from replicator.control import RunReport
from replicator.errors import PeerUnreachable, ReplicatorError, StorageUnavailable
from replicator.run_hooks import MAX_LINES, after_run
from replicator.settings import AfterRun
from tests.support.faults import Fault, Point
from tests.unit.test_unchanged import World

TELLS = "import json, os, sys; open(sys.argv[1], 'a').write(json.dumps(dict(os.environ)) + '\\n')"


def command(*words: object) -> str:
    return json.dumps([str(word) for word in words])


def touch(path: Path) -> str:
    return command("touch", path)


def run(world: World) -> tuple[RunReport, ...]:
    world.now += timedelta(minutes=1)
    return world.runner.run(world.job, None, None, lambda _: None, Cancellation())


def told(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_failed_before_means_no_snapshot(tmp_path: Path) -> None:
    world = World(rest=f'quiesce = {{before = ["false"], after = {touch(tmp_path / "after")}}}')
    assert {report.outcome for report in run(world)} == {"failed"}
    assert not world.snapshots("a")
    assert (tmp_path / "after").exists()
    assert world.events == []


def test_or_one_that_is_crash_consistent_by_setting(tmp_path: Path) -> None:
    """``after`` has thawed by then, and runs once only."""
    after = command(sys.executable, "-c", "import sys; open(sys.argv[1], 'a').write('x')", tmp_path / "after")
    world = World(rest=f'quiesce = {{before = ["false"], after = {after}, on_failure = "snapshot"}}')
    assert {report.outcome for report in run(world)} == {"ok"}
    assert len(world.snapshots("a")) == 1
    assert (tmp_path / "after").read_text() == "x"
    ((kind, subject, message),) = world.events
    assert (kind, subject) == ("snapshots are only crash-consistent", "vms")
    assert "hook 'before' of job vms ended with status 1" in message


def test_a_before_that_cannot_be_started_counts_as_failed() -> None:
    world = World(rest='quiesce = {before = ["/no/such"], after = ["true"], on_failure = "snapshot"}')
    assert {report.outcome for report in run(world)} == {"ok"}
    assert len(world.events) == 1


def test_a_failed_after_is_a_failure_all_the_same() -> None:
    """Something may be frozen still: nobody should take that for a success."""
    world = World(rest='quiesce = {before = ["true"], after = ["false"], on_failure = "snapshot"}')
    assert {report.outcome for report in run(world)} == {"failed"}


def test_the_hook_after_a_run_hears_how_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "told"
    world = World(rest=f"after_run = {{command = {command(sys.executable, '-c', TELLS, path)}}}")
    run(world)
    (well,) = told(path)
    assert well["REPLICATOR_HOOK"] == "after_run"
    assert (well["REPLICATOR_JOB"], well["REPLICATOR_OUTCOME"], well["REPLICATOR_REPLICAS"]) == ("vms", "ok", "3")
    assert (well["REPLICATOR_FAILED"], well["REPLICATOR_ERROR"]) == ("", "")
    world.memory["a"].write("vm-1", 0, b"!")
    world.endpoints["a"].fault = Fault("snapshot", Point.BEFORE, StorageUnavailable("the pool is away", hint=""))
    run(world)
    bad = told(path)[1]
    assert bad["REPLICATOR_OUTCOME"] == "failed"
    assert "store:vm-1 b:store" in bad["REPLICATOR_FAILED"].splitlines()
    assert "the pool is away" in bad["REPLICATOR_ERROR"]


def test_it_runs_when_the_run_could_not_begin(tmp_path: Path) -> None:
    path = tmp_path / "told"
    world = World(rest=f"after_run = {{command = {command(sys.executable, '-c', TELLS, path)}}}")

    def away() -> None:
        raise PeerUnreachable("no route", hint="")

    world.endpoints["a"].before["volumes"] = away
    with pytest.raises(ReplicatorError, match="no route"):
        run(world)
    (bad,) = told(path)
    assert (bad["REPLICATOR_OUTCOME"], bad["REPLICATOR_REPLICAS"], bad["REPLICATOR_ERROR"]) == (
        "failed",
        "0",
        "no route",
    )


def test_a_hook_that_fails_changes_nothing_about_the_run() -> None:
    world = World(rest='after_run = {command = ["false"]}')
    assert {report.outcome for report in run(world)} == {"ok"}
    ((kind, subject, message),) = world.events
    assert (kind, subject) == ("hook failed", "vms")
    assert "after_run" in message


def test_the_worst_counts_and_long_lists_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "told"
    hook = AfterRun.model_validate({"command": [sys.executable, "-c", TELLS, str(path)], "timeout": "30s"})
    world = World()
    report = run(world)[0]
    conflict = replace(report, outcome="conflict", message="x" * 200_000 + "\0")
    after_run(hook, "vms", (report, *(replace(conflict, volume=f"store:{n:0100}") for n in range(3000))))
    (bad,) = told(path)
    assert bad["REPLICATOR_OUTCOME"] == "conflict"
    assert bad["REPLICATOR_REPLICAS"] == "3001"
    assert 100 < len(bad["REPLICATOR_FAILED"].splitlines()) < 3000
    assert len(bad["REPLICATOR_ERROR"]) == MAX_LINES
