"""Metrics: what is told is what is exposed, as the table says."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from replicator.control import State
from replicator.metrics import MAX_REASONS, STATES, Metrics, main
from replicator.metrics_table import METRICS, markdown
from replicator.model import Capability, StorageInfo, StreamKind

NOW = datetime(2026, 11, 20, 8, 0, tzinfo=UTC)
KEY = ("vms", "tank:vm-1", "prox2:backup")
OF_REPLICA = {"job": "vms", "volume": "tank:vm-1", "target": "prox2:backup"}
ROUTE = {"job": "vms", "target": "prox2:backup"}


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


def families(metrics: Metrics) -> dict[str, Family]:
    """By name; a counter's without ``_total``, as the parser has it."""
    return {family.name: family for family in text_string_to_metric_families(metrics.render().decode())}


def value(metrics: Metrics, name: str, labels: dict[str, str] | None = None) -> float | None:
    for family in families(metrics).values():
        for sample in family.samples:
            if sample.name == name and sample.labels == (labels or {}):
                return float(sample.value)
    return None


def state(metrics: Metrics) -> str:
    found = [s for s in STATES if value(metrics, "replicator_replica_state", {**OF_REPLICA, "state": s}) == 1]
    assert len(found) == 1
    return found[0]


def storage(name: str, total: int) -> StorageInfo:
    return StorageInfo(name, "zfs", StreamKind.NATIVE, Capability.NONE, total, total // 4, "")


def filled(clock: Clock | None = None) -> Metrics:
    """Metrics with a series of every kind."""
    metrics = Metrics(clock=clock or Clock())
    metrics.set_replica(
        *KEY, last_snapshot=NOW - timedelta(seconds=90), backlog_bytes=4096, objective=timedelta(minutes=5)
    )
    metrics.run_finished(*KEY, "ok", 2.0, 1000, 400)
    metrics.known_to_differ(*KEY, 64)
    metrics.verified(*KEY, checked_bytes=10_000, mismatched_bytes=64)
    metrics.transfer_progress(*KEY, 1e6)
    metrics.set_next_run("vms", NOW + timedelta(minutes=15))
    metrics.set_paused("vms", False)
    metrics.set_copies([("images:own", True, 1), ("backup:prox2/vm-1", False, 1_000_003)])
    metrics.set_storages([storage("tank", 1000), storage("gone", 0)])
    metrics.peer("prox2", True, 0.001, -0.25)
    metrics.refused("not_authorized")
    metrics.scheduler_tick()
    metrics.scheduler_late(0.02)
    metrics.certificate_expires(NOW + timedelta(days=365))
    return metrics


def test_what_is_exposed_is_what_the_table_says() -> None:
    exposed = {name: family for name, family in families(filled()).items() if name.startswith("replicator_")}
    declared = {metric.name.removesuffix("_total"): metric for metric in METRICS}
    assert set(exposed) == set(declared)
    for name, family in exposed.items():
        metric = declared[name]
        assert (family.type, family.documentation) == (metric.type, metric.help)
        assert family.samples, name
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), sample


def test_names_follow_the_conventions() -> None:
    for metric in METRICS:
        assert metric.name.startswith("replicator_")
        assert (metric.type == "counter") == metric.name.endswith("_total")
        assert metric.help.endswith(".")
        assert not any(word in metric.name for word in ("milli", "percent", "kilo", "mega", "minutes"))
        assert list(metric.buckets) == sorted(metric.buckets)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_lag_grows_while_nothing_runs() -> None:
    clock = Clock()
    metrics = filled(clock)
    assert value(metrics, "replicator_replica_lag_seconds", OF_REPLICA) == 90
    clock.now += timedelta(minutes=10)
    assert value(metrics, "replicator_replica_lag_seconds", OF_REPLICA) == 690
    assert value(metrics, "replicator_replica_last_snapshot_timestamp_seconds", OF_REPLICA) == NOW.timestamp() - 90
    assert value(metrics, "replicator_replica_lag_objective_seconds", OF_REPLICA) == 300
    clock.now -= timedelta(hours=1)
    assert value(metrics, "replicator_replica_lag_seconds", OF_REPLICA) == 0


def test_no_replica_yet_has_no_lag() -> None:
    metrics = Metrics()
    metrics.set_replica(*KEY, last_snapshot=None)
    assert value(metrics, "replicator_replica_lag_seconds", OF_REPLICA) is None
    assert state(metrics) == "never_synced"


def test_states() -> None:
    clock = Clock()
    metrics = filled(clock)
    assert state(metrics) == "running"
    metrics.transfer_progress(*KEY, None)
    assert state(metrics) == "ok"
    clock.now += timedelta(minutes=10)
    assert state(metrics) == "lagging"
    metrics.set_paused("vms", True)
    assert state(metrics) == "paused"
    metrics.run_finished(*KEY, "failed", 1, 0, 0)
    assert state(metrics) == "failed"
    metrics.run_finished(*KEY, "cancelled", 1, 0, 0)
    assert state(metrics) == "failed"
    metrics.run_finished(*KEY, "conflict", 1, 0, 0)
    assert state(metrics) == "conflict"
    metrics.run_finished(*KEY, "ok", 1, 0, 0)
    metrics.set_paused("vms", False)
    assert state(metrics) == "lagging"
    metrics.set_state(*KEY, State.NEVER)
    assert state(metrics) == "never_synced"


def test_runs() -> None:
    clock = Clock()
    metrics = Metrics(clock=clock)
    for outcome, seconds in (("failed", 0.3), ("conflict", 2), ("skipped", 99), ("cancelled", 7), ("strange", 1)):
        metrics.run_finished(*KEY, outcome, seconds, 10, 4)
    failures = "replicator_replica_consecutive_failures"
    assert value(metrics, failures, OF_REPLICA) == 2
    for outcome in ("failed", "conflict", "skipped", "cancelled", "other"):
        assert value(metrics, "replicator_runs_total", {**ROUTE, "outcome": outcome}) == 1
    assert value(metrics, "replicator_replicated_bytes_total", ROUTE) == 50
    assert value(metrics, "replicator_sent_bytes_total", ROUTE) == 20
    buckets = {
        le: value(metrics, "replicator_run_duration_seconds_bucket", {**ROUTE, "le": le})
        for le in ("0.1", "0.5", "1.0", "5.0", "15.0", "+Inf")
    }
    assert buckets == {"0.1": 0, "0.5": 1, "1.0": 2, "5.0": 3, "15.0": 4, "+Inf": 4}
    assert value(metrics, "replicator_run_duration_seconds_count", ROUTE) == 4
    assert value(metrics, "replicator_run_duration_seconds_sum", ROUTE) == pytest.approx(10.3)
    assert value(metrics, "replicator_replica_last_success_timestamp_seconds", OF_REPLICA) is None
    clock.now += timedelta(seconds=5)
    metrics.run_finished(*KEY, "ok", 1, 0, 0)
    assert value(metrics, failures, OF_REPLICA) == 0
    assert value(metrics, "replicator_replica_last_success_timestamp_seconds", OF_REPLICA) == NOW.timestamp() + 5


def test_recall() -> None:
    metrics = Metrics()
    metrics.recall(*KEY, failures=7, last_success=NOW)
    assert value(metrics, "replicator_replica_consecutive_failures", OF_REPLICA) == 7
    assert value(metrics, "replicator_replica_last_success_timestamp_seconds", OF_REPLICA) == NOW.timestamp()


def test_rates_of_a_route_add_up() -> None:
    metrics = Metrics()
    metrics.transfer_progress(*KEY, 1e6)
    metrics.transfer_progress("vms", "tank:vm-2", "prox2:backup", 2e6)
    assert value(metrics, "replicator_transfer_bytes_per_second", ROUTE) == 3e6
    assert value(metrics, "replicator_transfers_active", ROUTE) == 2
    metrics.transfer_progress(*KEY, None)
    metrics.run_finished("vms", "tank:vm-2", "prox2:backup", "ok", 1, 1, 1)
    assert value(metrics, "replicator_transfer_bytes_per_second", ROUTE) == 0
    assert value(metrics, "replicator_transfers_active", ROUTE) == 0


def test_verifications() -> None:
    metrics = filled()
    metrics.verified(*KEY, checked_bytes=10_000, mismatched_bytes=6)
    assert value(metrics, "replicator_verified_bytes_total", ROUTE) == 20_000
    assert value(metrics, "replicator_mismatched_bytes_total", ROUTE) == 70
    assert value(metrics, "replicator_replica_mismatched_bytes", OF_REPLICA) == 64, "whatever that one looked at"
    metrics.known_to_differ(*KEY, 0)
    assert value(metrics, "replicator_replica_mismatched_bytes", OF_REPLICA) == 0


def test_series_of_a_volume_that_is_gone_disappear() -> None:
    metrics = filled()
    assert b"tank:vm-1" in metrics.render()
    metrics.forget(*KEY)
    metrics.transfer_progress(*KEY, None)
    assert b"tank:vm-1" not in metrics.render()
    assert value(metrics, "replicator_replicated_bytes_total", ROUTE) == 1000


def test_peers_and_what_is_not_known_of_them() -> None:
    metrics = filled()
    prox2 = {"peer": "prox2"}
    assert value(metrics, "replicator_peer_clock_difference_seconds", prox2) == -0.25
    metrics.peer("prox2", False, None, None)
    assert value(metrics, "replicator_peer_up", prox2) == 0
    assert value(metrics, "replicator_peer_round_trip_seconds", prox2) is None
    metrics.set_next_run("vms", None)
    assert value(metrics, "replicator_job_next_run_timestamp_seconds", {"job": "vms"}) is None


def test_reasons_are_few_short_words() -> None:
    metrics = Metrics()
    metrics.refused("wrong_ca")
    assert value(metrics, "replicator_connections_refused_total", {"reason": "wrong_ca"}) == 1
    for number in range(1000):
        metrics.refused(f"made up {number}")
    assert value(metrics, "replicator_connections_refused_total", {"reason": "other"}) == 1000
    assert len(families(metrics)["replicator_connections_refused"].samples) == 2
    letters = "abcdefghijklmnopqrstuvwxyz"
    for first in letters:
        for second in letters:
            metrics.refused(first + second)
    assert len(families(metrics)["replicator_connections_refused"].samples) <= MAX_REASONS + 1


def test_odd_names_are_escaped() -> None:
    metrics = Metrics()
    odd = 'tank:a"b\\c\nreplicator_fake 1'
    metrics.set_replica("vms", odd, "prox2:backup", last_snapshot=NOW)
    labels = {**OF_REPLICA, "volume": odd}
    assert value(metrics, "replicator_replica_last_snapshot_timestamp_seconds", labels) == NOW.timestamp()
    assert b"\nreplicator_fake" not in metrics.render()


def test_a_storage_that_is_not_there_has_no_size() -> None:
    metrics = filled()
    assert value(metrics, "replicator_storage_up", {"storage": "tank"}) == 1
    assert value(metrics, "replicator_storage_free_bytes", {"storage": "tank"}) == 250
    assert value(metrics, "replicator_storage_up", {"storage": "gone"}) == 0
    assert value(metrics, "replicator_storage_size_bytes", {"storage": "gone"}) is None
    metrics.set_storages([storage("gone", 8)])
    assert value(metrics, "replicator_storage_size_bytes", {"storage": "gone"}) == 8
    assert value(metrics, "replicator_storage_up", {"storage": "tank"}) is None


def test_a_primary_that_was_refused_is_told_until_a_run_succeeds() -> None:
    metrics = filled()
    assert value(metrics, "replicator_replica_superseded", OF_REPLICA) == 0
    metrics.superseded(*KEY)
    metrics.run_finished(*KEY, "conflict", 1.0, 0, 0)
    assert value(metrics, "replicator_replica_superseded", OF_REPLICA) == 1
    metrics.run_finished(*KEY, "ok", 1.0, 0, 0)
    assert value(metrics, "replicator_replica_superseded", OF_REPLICA) == 0
    metrics.recall(*KEY, failures=1, last_success=None, superseded=True)
    assert value(metrics, "replicator_replica_superseded", OF_REPLICA) == 1


def test_two_of_them_share_nothing() -> None:
    first, second = filled(), Metrics()
    assert value(first, "replicator_peer_up", {"peer": "prox2"}) == 1
    assert value(second, "replicator_peer_up", {"peer": "prox2"}) is None


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--table"]) == 0
    assert capsys.readouterr().out == markdown()
    lines = markdown().splitlines()
    assert len(lines) == len(METRICS) + 2
    assert all(line.count("|") == 5 for line in lines)
    assert main([]) == 2


@pytest.mark.tier("promtool")
def test_promtool_finds_nothing_to_say() -> None:
    text = filled().render()
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_it_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "replicator.metrics", "--table"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == markdown()
