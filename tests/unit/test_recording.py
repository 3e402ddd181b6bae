"""What happens reaches the history and the metrics, under the names that ``status`` uses."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from replicator import config
from replicator.cancellation import Cancellation
from replicator.control import PeerStatus, ReplicaStatus, RunReport, State, Status
from replicator.history import History
from replicator.metrics import Metrics
from replicator.model import Progress, Role, Version
from replicator.recording import Recording
from replicator.tracker import Replica, ReplicaKey, Tracker
from replicator.verification import Mismatch, Resync, Verification
from tests.unit.test_unchanged import World

NOW = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
KEY = ReplicaKey("vms", "tank:vm-1", "prox2:backup")
CONFIG = config.parse(
    """
    [node]
    name = "prox1"
    [network]
    cluster = "10.99.0.0/24"
    listen = "10.99.0.1:8571"
    [storage.tank]
    kind = "image"
    path = "/tank"
    [peer.prox2]
    address = "10.99.0.2:8571"
    [job.vms]
    source = "tank:*"
    targets = ["prox2:backup"]
    max_lag = "45min"
    [job.fetch]
    source = {node = "prox2", volumes = "pool:*"}
    targets = ["tank"]
    """
)


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "history.sqlite", clock=lambda: NOW)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(clock=lambda: NOW)


@pytest.fixture
def recording(history: History, metrics: Metrics) -> Recording:
    return Recording(CONFIG, history, metrics, clock=lambda: NOW)


def report(outcome: str, message: str = "") -> RunReport:
    return RunReport(*_parts(KEY), outcome, 3.0, 1, 100, 40, "snap", message, "", "no_space" if message else "")


def _parts(key: ReplicaKey) -> tuple[str, str, str]:
    return key.job, key.volume, key.target


def exposed(metrics: Metrics) -> set[str]:
    return {line for line in metrics.render().decode().splitlines() if line.startswith("replicator_")}


LABELS = '{job="vms",target="prox2:backup",volume="tank:vm-1"}'
NEWEST = Version("snap", "guid-1", NOW - timedelta(seconds=60), 1)


def test_runs(recording: Recording, history: History, metrics: Metrics) -> None:
    recording.transfer_progress(KEY, Progress("tank:vm-1", "prox2:backup", "a", 1, 2, 3, 50.0))
    assert 'replicator_transfer_bytes_per_second{job="vms",target="prox2:backup"} 50.0' in exposed(metrics)
    recording.run_finished(report("ok"), NOW - timedelta(seconds=30), NEWEST)
    recording.replica_seen(KEY, NEWEST, 7, None)
    recording.transfer_progress(KEY, None)
    (run,) = history.runs()
    assert (run.seconds, run.finished, run.snapshot_guid, run.bytes_sent) == (3.0, NOW, "guid-1", 40)
    lines = exposed(metrics)
    assert f"replicator_replica_lag_seconds{LABELS} 60.0" in lines
    assert f"replicator_replica_lag_objective_seconds{LABELS} 2700.0" in lines
    assert f"replicator_replica_backlog_bytes{LABELS} 7.0" in lines
    assert 'replicator_sent_bytes_total{job="vms",target="prox2:backup"} 40.0' in lines
    recording.replicas_gone([KEY])
    assert "tank:vm-1" not in metrics.render().decode()


def test_recall_fits_the_tracker(recording: Recording, metrics: Metrics) -> None:
    assert recording.recall(KEY) == {"mismatches": ()}
    recording.run_finished(report("ok"), NOW, NEWEST)
    recording.run_finished(report("failed", "full"), NOW, None)
    recording.run_finished(report("failed", "full"), NOW, None)
    tracker = Tracker()
    tracker.recall(KEY, **recording.recall(KEY))
    assert tracker.get(KEY) == Replica(
        KEY,
        failures=2,
        last_sync=NOW,
        last_run=NOW,
        duration=3.0,
        done=100,
        sent=40,
        outcome="failed",
        message="full",
        mismatches=(),
    )
    assert f"replicator_replica_consecutive_failures{LABELS} 2.0" in exposed(metrics)


WRONG = Verification("tank:vm-1", "prox2:backup", "snap", 1000, 64, (), 2)
DIFFERS = Mismatch("snap", 64, "guid-1")
ALARM = f"replicator_replica_mismatched_bytes{LABELS}"


def test_verifications_and_resyncs(recording: Recording, history: History, metrics: Metrics) -> None:
    recording.known(KEY, (DIFFERS,))
    recording.verified(WRONG, "vms")
    assert f"{ALARM} 64.0" in exposed(metrics)
    recording.known(KEY, ())
    recording.resynced(Resync("tank:vm-1", "prox2:backup", "snap", 1000, 64, 30, ("diverged-x",)), "vms")
    assert f"{ALARM} 0.0" in exposed(metrics)
    resync, verify = history.checks()
    assert (verify.kind, verify.mismatched_bytes, verify.mismatched_ranges) == ("verify", 64, 2)
    assert (resync.kind, resync.bytes_sent) == ("resync", 30)
    assert "diverged-x" in resync.message


def test_what_is_known_to_differ_outlives_restarts_and_whatever_ended_since(
    recording: Recording, history: History, metrics: Metrics
) -> None:
    first = Mismatch("older", 7, "guid-0", read=False, mended=True)
    recording.known(KEY, (first, replace(DIFFERS, passed=True)))
    recording.verified(WRONG, "vms")
    for _ in range(150):
        recording.verified(replace(WRONG, differing=0), "vms")
        recording.resynced(Resync("tank:vm-1", "prox2:backup", "snap", 0, 0, 30, (), made_equal=False), "vms")
    recording.run_finished(report("ok"), NOW, NEWEST)
    assert recording.recall(KEY)["mismatches"] == (first, replace(DIFFERS, passed=True))
    assert f"{ALARM} 64.0" in exposed(metrics)
    fresh = Metrics(clock=lambda: NOW)
    Recording(CONFIG, history, fresh, clock=lambda: NOW).recall(KEY)
    assert f"{ALARM} 64.0" in exposed(fresh)
    recording.known(KEY, ())
    assert recording.recall(KEY)["mismatches"] == ()
    assert f"{ALARM} 0.0" in exposed(metrics)
    other = replace(KEY, target="prox3:backup")
    recording.known(other, (DIFFERS,))
    recording.known(KEY, ())
    assert recording.recall(other)["mismatches"] == (DIFFERS,)


def test_a_primary_that_was_refused_is_told_apart_from_other_conflicts(
    recording: Recording, history: History, metrics: Metrics
) -> None:
    recording.run_finished(replace(report("conflict", "x"), code="conflict"), NOW, None)
    assert f"replicator_replica_superseded{LABELS} 0.0" in exposed(metrics)
    recording.run_finished(replace(report("conflict", "x"), code="stale_epoch"), NOW, None)
    assert f"replicator_replica_superseded{LABELS} 1.0" in exposed(metrics)
    fresh = Metrics(clock=lambda: NOW)
    Recording(CONFIG, history, fresh, clock=lambda: NOW).recall(KEY)
    assert f"replicator_replica_superseded{LABELS} 1.0" in exposed(fresh)


def test_whichever_side_finds_out_the_run_says_that_it_was_superseded() -> None:
    """Here it is planning, from what the target lists."""
    world = World()
    world.run()
    state = world.memory["b"].state("a/vm-1")
    assert state is not None
    assert state.lineage is not None
    world.memory["b"].set_lineage("a/vm-1", replace(state.lineage, role=Role.PRIMARY, epoch=9))
    world.memory["a"].write("vm-1", 0, b"!")
    reports = world.runner.run(world.job, None, None, lambda _: None, Cancellation())
    assert {report.code for report in reports if report.volume == "store:vm-1"} == {"stale_epoch"}


def test_what_is_known_to_differ_outlives_the_history_of_it(
    tmp_path: Path, recording: Recording, metrics: Metrics
) -> None:
    recording.known(KEY, (DIFFERS,))
    recording.verified(WRONG, "vms")
    later = History(tmp_path / "history.sqlite", clock=lambda: NOW + timedelta(days=400))
    assert later.prune() == 1
    fresh = Metrics(clock=lambda: NOW)
    assert Recording(CONFIG, later, fresh, clock=lambda: NOW).recall(KEY)["mismatches"] == (DIFFERS,)
    assert f"{ALARM} 64.0" in exposed(fresh)


def test_pulled_volumes_have_their_node_in_the_name(recording: Recording, history: History) -> None:
    recording.verified(Verification("pool:vm-9", "prox1:tank", "snap", 10, 0, (), 0), "fetch")
    assert history.checks()[0].volume == "prox2/pool:vm-9"


def test_entries_are_merged_newest_first(history: History, metrics: Metrics) -> None:
    moments = iter(NOW + timedelta(seconds=n) for n in range(10))
    recording = Recording(CONFIG, history, metrics, clock=lambda: next(moments))
    recording.run_finished(report("failed", "full"), NOW, None)
    recording.verified(Verification("tank:vm-1", "prox2:backup", "snap", 1000, 64, (), 2), "vms")
    recording.verified(Verification("tank:vm-1", "prox2:backup", "snap", 1000, 0, (), 0), "vms")
    recording.run_finished(report("ok"), NOW, NEWEST)
    recording.event("paused", "vms", "by hand")
    entries = recording.entries(10)
    assert [(e.kind, e.outcome) for e in entries] == [
        ("run", "ok"),
        ("verify", "equal"),
        ("verify", "differs"),
        ("run", "failed"),
        ("paused", ""),
    ]
    assert entries[2].message == "64 bytes differed"
    assert (entries[3].message, entries[3].seconds) == ("full", 3.0)
    assert len(recording.entries(2)) == 2


def test_what_status_shows_is_what_is_scraped(recording: Recording) -> None:
    row = ReplicaStatus(
        *_parts(KEY), State.NEVER, None, None, None, NOW + timedelta(minutes=1), None, 0, 0, 0, paused=True
    )
    status = Status("prox1", "1", True, NOW, (row,), (PeerStatus("prox2", "10.99.0.2:8571", True, 0.5, None),))
    text = recording.expose(status).decode()
    state = LABELS.replace(",target", ',state="never_synced",target')
    assert f"replicator_replica_state{state} 1.0" in text
    assert 'replicator_job_paused{job="vms"} 1.0' in text
    assert 'replicator_job_next_run_timestamp_seconds{job="vms"} 1.79' in text
    assert 'replicator_peer_round_trip_seconds{peer="prox2"} 0.5' in text
