"""The alerts: when each fires, what it means, what to do. Rules, their tests and the runbook are made from these.

All expressions ask for the label ``node``, which the file of targets adds, so that the rules of several nodes live in
one Prometheus. Labels of metrics (``job`` is one) are kept as they are: scrape with ``honor_labels: true``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from replicator.checks import LOW_SPACE, MAX_CLOCK_DIFFERENCE
from replicator.health import EXPIRY_WARNING, FAILURES, STALLED
from replicator.monitoring.site import Site

SCRAPE_JOB = "replicator"
"""The ``job_name`` under which Prometheus scrapes nodes."""

_VM = {"job": "vms", "volume": "images:vm-100", "target": "prox2:backup"}
_ROW = "{{ $labels.volume }} on {{ $labels.target }}"
_NONE = timedelta(0)
_MINUTE = timedelta(minutes=1)


@dataclass(frozen=True, slots=True)
class Example:
    """Series for which the alert fires, for its test.

    :ivar series: metric, its labels (but node and instance), its value
    :ivar begins: from when on the expression holds, counted from 1970, where the test begins
    :ivar shown: what the summary shows as the value
    :ivar quiet: another value of the first series, with which the alert never fires
    :ivar labels: of the alert, besides ``node``; None: those of the first series
    """

    series: tuple[tuple[str, Mapping[str, str], float], ...]
    quiet: float
    begins: timedelta = _NONE
    shown: str = ""
    labels: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert.

    :ivar summary: a template of Prometheus
    :ivar expression: for a node; "" where there is nothing to watch
    :ivar wait: how long that must hold
    :ivar look, act: what to look at and what to do, a paragraph of Markdown each
    """

    name: str
    severity: Literal["critical", "warning", "info"]
    wait: timedelta
    summary: str
    meaning: str
    look: str
    act: str
    expression: Callable[[Site], str]
    example: Callable[[Site], Example]


def metric(site: Site, name: str, **labels: str) -> str:
    """A selector of one node's series."""
    given = {"node": site.node, **labels}
    return f"replicator_{name}{{{','.join(f'{key}={json.dumps(value)}' for key, value in given.items())}}}"


def _up(site: Site) -> str:
    return f'up{{job="{SCRAPE_JOB}",node="{site.node}"}}'


def _missed(site: Site) -> str:
    late = [
        f"time() - max by (node, job) ({metric(site, 'replica_last_success_timestamp_seconds', job=job)})"
        f" > {patience.total_seconds():g}"
        for job, patience in site.patience.items()
    ]
    paused = f"unless on (node, job) {metric(site, 'job_paused')} == 1"
    under_way = f"unless on (node, job) sum by (node, job) ({metric(site, 'transfers_active')}) > 0"
    return f"({' or '.join(late)}) {paused} {under_way}" if late else ""


def _missed_example(site: Site) -> Example:
    job, patience = next(iter(site.patience.items()))
    begins = (patience // _MINUTE + 1) * _MINUTE
    series = ("replica_last_success_timestamp_seconds", {**_VM, "job": job}, 0.0)
    return Example((series,), 1e9, begins, labels={"job": job})


def _of_replica(name: str, value: float, quiet: float, *, shown: str = "", **labels: str) -> Callable[[Site], Example]:
    return lambda _: Example(((name, {**_VM, **labels}, value),), quiet, shown=shown)


def _plain(name: str, value: float, quiet: float, *, shown: str = "", **labels: str) -> Callable[[Site], Example]:
    return lambda _: Example(((name, labels, value),), quiet, shown=shown)


ALERTS = (
    Alert(
        "ReplicatorDown",
        "critical",
        2 * _MINUTE,
        "Prometheus does not reach the daemon on {{ $labels.node }}.",
        "The daemon does not answer where Prometheus asks it, or Prometheus does not know it any more. All other "
        "alerts of this node are blind as long as this one fires.",
        "`systemctl status replicator` and `journalctl -u replicator -n 50` on the node; `replicator health` there; "
        "`curl http://ADDRESS/metrics` from the machine that Prometheus runs on.",
        "Start the daemon: `systemctl start replicator`. If it runs, correct `[network] http`, the firewall, or the "
        "address in the file of targets. If the node is lost for good: `replicator promote` on the node that has its "
        "replicas.",
        lambda site: f"{_up(site)} == 0 or absent({_up(site)})",
        lambda _: Example((("up", {"job": SCRAPE_JOB}, 0),), 1),
    ),
    Alert(
        "ReplicatorSchedulerStalled",
        "critical",
        _MINUTE,
        "The scheduler of {{ $labels.node }} stands still: nothing runs by itself.",
        "The daemon answers, but the thread that starts runs has not come round for a minute. Or the clocks of the "
        "node and of Prometheus differ by as much.",
        "`replicator health` on the node; its log; `timedatectl` on both machines.",
        "Set the clocks right. If they are, restart the daemon, which loses nothing: `systemctl restart replicator`; "
        "and report it with the log.",
        lambda site: f"time() - {metric(site, 'scheduler_heartbeat_timestamp_seconds')} > {STALLED.total_seconds():g}",
        lambda _: Example((("scheduler_heartbeat_timestamp_seconds", {}, 0),), 1e9, 2 * _MINUTE),
    ),
    Alert(
        "ReplicatorLagging",
        "critical",
        _MINUTE,
        f"{_ROW} is {{{{ $value | humanizeDuration }}}} behind, more than its job allows.",
        "If the source were lost now, more would be lost than `max_lag` allows.",
        "`replicator status`: whether a transfer runs and how far it is, whether runs fail and why, whether the job is "
        "paused. `replicator plan JOB` says how much is to be sent.",
        "If runs fail, do what `status` says. If transfers take longer than the schedule allows: raise `rate_limit`, "
        "`[limits] transfers` or the network's speed, replicate less often, or allow more lag.",
        lambda site: (
            f"{metric(site, 'replica_lag_seconds')} > {metric(site, 'replica_lag_objective_seconds')}"
            if site.objectives
            else ""
        ),
        lambda _: Example(
            (("replica_lag_seconds", _VM, 3000), ("replica_lag_objective_seconds", _VM, 2700)), 2600, shown="50m 0s"
        ),
    ),
    Alert(
        "ReplicatorNeverSynced",
        "warning",
        timedelta(hours=1),
        f"{_ROW} has nothing yet.",
        "The volume belongs to a job, and the target has no complete snapshot of it. It is not protected.",
        "`replicator status` and `replicator plan JOB`; `replicator check`.",
        "A first copy may take long: let it. If none runs: `replicator sync JOB`, and see what it says.",
        lambda site: f"{metric(site, 'replica_state', state='never_synced')} == 1",
        _of_replica("replica_state", 1, 0, state="never_synced"),
    ),
    Alert(
        "ReplicatorRunMissed",
        "warning",
        5 * _MINUTE,
        "Job {{ $labels.job }} of {{ $labels.node }} was due, and none of its volumes was replicated.",
        "No volume of the job was replicated for longer than its schedule leaves between two runs (half as long again, "
        "at least 5 minutes and at most 2 hours more), although it is not paused and no transfer is under way.",
        "`replicator status`, column NEXT; `replicator history`: runs that were skipped or missed are there.",
        "If all its runs fail: see ReplicatorFailing. If none begins: see ReplicatorSchedulerStalled.",
        _missed,
        _missed_example,
    ),
    Alert(
        "ReplicatorFailing",
        "warning",
        _NONE,
        f"{_ROW}: {{{{ $value }}}} runs in a row failed.",
        f"At least {FAILURES} runs in a row failed, or met a conflict. They are tried again by themselves, after 30 "
        "minutes at most.",
        "`replicator status` says what failed and what to do about it.",
        "Do that. `replicator sync JOB` tries at once.",
        lambda site: f"{metric(site, 'replica_consecutive_failures')} >= {FAILURES}",
        _of_replica("replica_consecutive_failures", 3, 2, shown="3"),
    ),
    Alert(
        "ReplicatorConflict",
        "critical",
        _MINUTE,
        f"{_ROW} is in conflict: somebody must decide.",
        "The target cannot be brought up to date without losing something: somebody wrote to the replica, its "
        "snapshots are gone, or it belongs to another volume. Nothing is overwritten, and nothing is replicated.",
        "`replicator status` and `replicator snapshots VOLUME`.",
        "Run the command that `status` names, mostly `replicator resync VOLUME --target TARGET`: what only the replica "
        "has is kept aside first.",
        lambda site: f"{metric(site, 'replica_state', state='conflict')} == 1",
        _of_replica("replica_state", 1, 0, state="conflict"),
    ),
    Alert(
        "ReplicatorSplitBrain",
        "critical",
        _NONE,
        "Another copy of {{ $labels.volume }} was promoted: {{ $labels.target }} refused what {{ $labels.node }} sent.",
        "This node took its copy for the primary, and the target has one of a newer epoch. Two guests may be writing "
        "to two copies. Nothing was overwritten.",
        "Where does the guest run? `replicator status` on both nodes shows roles and epochs.",
        "Stop the guest on the node that was superseded. Then, on that node: `replicator rejoin VOLUME --from NODE`: "
        "what only it has is kept aside, and it follows the new primary.",
        lambda site: f"{metric(site, 'replica_superseded')} == 1",
        _of_replica("replica_superseded", 1, 0),
    ),
    Alert(
        "ReplicatorMismatch",
        "critical",
        _NONE,
        f"{_ROW} differs from its source in {{{{ $value | humanize1024 }}}}B.",
        "A verification read both sides and found blocks that are not equal: a disk, a memory or a program changed one "
        "of them.",
        "`replicator status`, `replicator history`; SMART values, `zpool status`, `ceph status`, the kernel's log on "
        "both nodes.",
        "Find out which side is right; most often it is the source. `replicator verify VOLUME --target TARGET "
        "--repair` sends the blocks that differ; `replicator resync` makes the whole replica right.",
        lambda site: f"{metric(site, 'replica_mismatched_bytes')} > 0",
        _of_replica("replica_mismatched_bytes", 4096, 0, shown="4ki"),
    ),
    Alert(
        "ReplicatorPeerDown",
        "warning",
        5 * _MINUTE,
        "{{ $labels.node }} does not reach its peer {{ $labels.peer }} on the cluster network.",
        "The peer does not answer on the cluster network. What is replicated to it or from it falls behind.",
        "`replicator check` on this node; `ping` on the cluster network; the daemon on the peer.",
        "Start the peer's daemon, mend the network. If the node is lost for good: `replicator promote` on the node "
        "that has its replicas.",
        lambda site: f"{metric(site, 'peer_up')} == 0" if site.peers else "",
        _plain("peer_up", 0, 1, peer="prox2"),
    ),
    Alert(
        "ReplicatorClocksDiffer",
        "warning",
        10 * _MINUTE,
        "The clock of {{ $labels.peer }} is {{ $value | humanizeDuration }} off that of {{ $labels.node }}.",
        "Lag is the age of a snapshot by the source's clock, so it is wrong by as much.",
        "`timedatectl` and `chronyc tracking` on both nodes.",
        "Let both nodes keep time with chrony or systemd-timesyncd.",
        lambda site: (
            f"abs({metric(site, 'peer_clock_difference_seconds')}) > {MAX_CLOCK_DIFFERENCE:g}" if site.peers else ""
        ),
        _plain("peer_clock_difference_seconds", -3, -1, shown="3s", peer="prox2"),
    ),
    Alert(
        "ReplicatorCertificateExpiring",
        "warning",
        timedelta(hours=1),
        "The certificate of {{ $labels.node }} ends within 20 days and was not renewed.",
        "The daemon renews its certificate 30 days before it ends, from the node that made the cluster. It could not. "
        "When it has ended, peers refuse this node.",
        "`replicator cluster nodes`, `replicator check`, the daemon's log.",
        "See that this daemon runs and reaches the node that made the cluster. If that is lost: make a new cluster, "
        "and let the nodes join it.",
        lambda site: (
            f"{metric(site, 'certificate_expiry_timestamp_seconds')} - time() < {EXPIRY_WARNING.total_seconds():g}"
            if site.peers
            else ""
        ),
        _plain("certificate_expiry_timestamp_seconds", 86400, 1e9),
    ),
    Alert(
        "ReplicatorStorageFull",
        "warning",
        10 * _MINUTE,
        "Storage {{ $labels.storage }} of {{ $labels.node }} has {{ $value | humanizePercentage }} left.",
        "Less than a tenth of the storage is free. When it is full, replicas that arrive here fail, and on "
        "copy-on-write storages guests do as well.",
        "`replicator check`; `df`, `zfs list -o space`, `ceph df`.",
        "Make room, add disks, or keep fewer snapshots (`keep`); `replicator prune JOB --dry-run` says what would go.",
        lambda site: f"{metric(site, 'storage_free_bytes')} / {metric(site, 'storage_size_bytes')} < {LOW_SPACE}",
        lambda _: Example(
            (("storage_free_bytes", {"storage": "images"}, 5), ("storage_size_bytes", {"storage": "images"}, 100)),
            10,
            shown="5%",
        ),
    ),
    Alert(
        "ReplicatorStorageMissing",
        "critical",
        5 * _MINUTE,
        "Storage {{ $labels.storage }} of {{ $labels.node }} is not there.",
        "The directory, pool or cluster of the storage cannot be used: not mounted, not imported, not reachable. "
        "Nothing is replicated from it or to it.",
        "`replicator check`; `mount`, `zpool status`, `ceph status`.",
        "Mount or import it, or correct its table in replicator.toml. Never make an empty directory in its place.",
        lambda site: f"{metric(site, 'storage_up')} == 0",
        _plain("storage_up", 0, 1, storage="images"),
    ),
    Alert(
        "ReplicatorJobPaused",
        "info",
        timedelta(days=1),
        "Job {{ $labels.job }} of {{ $labels.node }} is paused, for a day by now.",
        "Somebody paused the job, and it may have been forgotten.",
        "`replicator history` says since when.",
        "`replicator resume JOB`, when it is no longer needed.",
        lambda site: f"{metric(site, 'job_paused')} == 1" if site.patience else "",
        _plain("job_paused", 1, 0, job="vms"),
    ),
)
