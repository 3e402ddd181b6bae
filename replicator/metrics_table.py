"""The metrics of the daemon as a table: what each is called, means and is counted by.

The one place where a metric is declared: what is served is made from it, and so is the table of the README
(``python -m replicator.metrics --table``). Names follow
https://prometheus.io/docs/practices/naming/: a prefix, base units, ``_total`` for counters, ``_info`` for facts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

REPLICA = ("job", "volume", "target")
"""Labels of one replica: the volume as the job names it, the target as NODE:STORAGE."""
ROUTE = ("job", "target")


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    :ivar buckets: upper bounds of a histogram's buckets, without +Inf
    """

    name: str
    type: Literal["gauge", "counter", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


METRICS = (
    Metric(
        "replicator_replica_lag_seconds",
        "gauge",
        REPLICA,
        "Age of the newest source snapshot that the target has complete, or of the last look that showed that nothing "
        "was written since: what a failover now would lose, at most.",
    ),
    Metric(
        "replicator_replica_lag_objective_seconds",
        "gauge",
        REPLICA,
        "The job's max_lag; absent where it has none.",
    ),
    Metric(
        "replicator_replica_last_snapshot_timestamp_seconds",
        "gauge",
        REPLICA,
        "When the newest snapshot that the target has complete was taken.",
    ),
    Metric(
        "replicator_replica_backlog_bytes",
        "gauge",
        REPLICA,
        "Estimated bytes of snapshots of the source that the target does not have yet.",
    ),
    Metric(
        "replicator_replica_state",
        "gauge",
        (*REPLICA, "state"),
        "1 for the state that the replica is in, 0 for the others.",
    ),
    Metric(
        "replicator_replica_consecutive_failures",
        "gauge",
        REPLICA,
        "Runs that failed, or met a conflict, since the last success.",
    ),
    Metric(
        "replicator_replica_last_success_timestamp_seconds",
        "gauge",
        REPLICA,
        "When the last successful run ended.",
    ),
    Metric(
        "replicator_replica_last_verification_timestamp_seconds",
        "gauge",
        REPLICA,
        "When the last verification ended.",
    ),
    Metric(
        "replicator_replica_mismatched_bytes",
        "gauge",
        REPLICA,
        "Bytes in blocks that are known to differ from the source, in the snapshot in which that was found last.",
    ),
    Metric(
        "replicator_replica_superseded",
        "gauge",
        REPLICA,
        "1 if the target refused a run because another copy was promoted since, until a run succeeds again.",
    ),
    Metric("replicator_runs_total", "counter", (*ROUTE, "outcome"), "Runs by outcome, one for each volume."),
    Metric(
        "replicator_run_duration_seconds",
        "histogram",
        ROUTE,
        "How long runs took that were not skipped.",
        (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400),
    ),
    Metric(
        "replicator_replicated_bytes_total",
        "counter",
        ROUTE,
        "Bytes of changes that were written or zeroed on the target.",
    ),
    Metric("replicator_sent_bytes_total", "counter", ROUTE, "Bytes that crossed the network, after compression."),
    Metric("replicator_transfers_active", "gauge", ROUTE, "Transfers that are under way."),
    Metric(
        "replicator_transfer_bytes_per_second",
        "gauge",
        ROUTE,
        "Present rate of the transfers that are under way, in bytes of changes.",
    ),
    Metric("replicator_verified_bytes_total", "counter", ROUTE, "Bytes that were compared with the source."),
    Metric(
        "replicator_mismatched_bytes_total",
        "counter",
        ROUTE,
        "Bytes in blocks that verifications found to differ; each finding counts again.",
    ),
    Metric("replicator_job_next_run_timestamp_seconds", "gauge", ("job",), "When the job runs next by itself."),
    Metric("replicator_job_paused", "gauge", ("job",), "1 if the operator paused the job."),
    Metric(
        "replicator_copy_primary",
        "gauge",
        ("volume",),
        "1 if this node's copy is the primary of its family, 0 if it is a replica.",
    ),
    Metric(
        "replicator_copy_epoch",
        "gauge",
        ("volume",),
        "The epoch of this node's copy, raised by each promotion: alert if a primary has another than its replicas.",
    ),
    Metric("replicator_storage_up", "gauge", ("storage",), "1 if this node's storage is there, 0 if it is not."),
    Metric("replicator_storage_free_bytes", "gauge", ("storage",), "Free bytes of a storage, as targets can use them."),
    Metric("replicator_storage_size_bytes", "gauge", ("storage",), "Size of a storage."),
    Metric("replicator_peer_up", "gauge", ("peer",), "1 if the peer answered lately."),
    Metric("replicator_peer_round_trip_seconds", "gauge", ("peer",), "Round-trip time of the last heartbeat."),
    Metric(
        "replicator_peer_clock_difference_seconds",
        "gauge",
        ("peer",),
        "How far the peer's clock is ahead of this node's (negative: behind).",
    ),
    Metric(
        "replicator_connections_refused_total", "counter", ("reason",), "Connections and requests that were refused."
    ),
    Metric(
        "replicator_scheduler_heartbeat_timestamp_seconds",
        "gauge",
        (),
        "When the scheduler was last seen at work: alert if it is old.",
    ),
    Metric(
        "replicator_scheduler_lateness_seconds",
        "histogram",
        (),
        "How long after their time runs were started.",
        (0.01, 0.05, 0.1, 0.5, 1, 5, 30, 60, 300),
    ),
    Metric("replicator_certificate_expiry_timestamp_seconds", "gauge", (), "When this node's certificate expires."),
    Metric("replicator_build_info", "gauge", ("version", "python_version"), "1; the versions are in the labels."),
)


def markdown() -> str:
    """The table of the README."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.type} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"
