"""What Prometheus reads of this node: told by whoever does the work, put together when it is scraped.

:class:`Metrics` has a registry of its own; several can be in one process. What the metrics are called and mean is in
:mod:`replicator.metrics_table`. The lag is computed at the scrape, so it grows while nothing runs: that is when it
matters most. Series of volumes that are not replicated any more disappear with :meth:`Metrics.forget`; labels come
from the configuration, from what storages list, or from fixed sets, never from what an unknown peer says. Thread-safe.
"""

from __future__ import annotations

import platform
import re
import sys
import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from replicator.control import State
from replicator.history import BAD, Outcome
from replicator.metrics_table import METRICS, Metric, markdown
from replicator.model import StorageInfo
from replicator.version import version

STATES = tuple(state.value.replace(" ", "_") for state in State)
"""Values of the label ``state``."""
OTHER = "other"
"""The label value of whatever is not in a fixed set."""
MAX_REASONS = 32
"""Distinct values of the label ``reason``, at most; what would be more is counted as ``other``."""
_REASON = re.compile(r"[a-z][a-z_]{0,39}")

_BY_NAME = {metric.name: metric for metric in METRICS}
_Labels = tuple[str, ...]


@dataclass(slots=True)
class _Histogram:
    counts: list[int]
    total: float = 0.0


@dataclass(slots=True)
class _Replica:
    last_snapshot: datetime | None = None
    as_of: datetime | None = None
    backlog: int | None = None
    objective: float | None = None
    outcome: str = ""
    state: State | None = None
    failures: int = 0
    last_success: datetime | None = None
    rate: float | None = None
    verified: datetime | None = None
    mismatched: int = 0
    superseded: bool = False


@dataclass(slots=True)
class _Store:
    """Values by metric and labels."""

    values: dict[str, dict[_Labels, float]] = field(default_factory=lambda: defaultdict(dict))
    histograms: dict[str, dict[_Labels, _Histogram]] = field(default_factory=lambda: defaultdict(dict))
    replicas: dict[_Labels, _Replica] = field(default_factory=dict)

    def set(self, name: str, labels: _Labels, value: float | None) -> None:
        """Set a gauge; None takes the series away."""
        if value is None:
            self.values[name].pop(labels, None)
        else:
            self.values[name][labels] = value

    def add(self, name: str, labels: _Labels, value: float) -> None:
        """Raise a counter."""
        self.values[name][labels] = self.values[name].get(labels, 0.0) + max(0.0, value)

    def observe(self, name: str, labels: _Labels, value: float) -> None:
        """Count a value in a histogram."""
        buckets = _BY_NAME[name].buckets
        found = self.histograms[name].setdefault(labels, _Histogram([0] * (len(buckets) + 1)))
        found.counts[bisect_left(buckets, value)] += 1
        found.total += value

    def replica(self, job: str, volume: str, target: str) -> _Replica:
        """What is known of a replica."""
        return self.replicas.setdefault((job, volume, target), _Replica())


class Metrics:
    """The metrics of this node.

    :param clock: the present time, UTC
    """

    def __init__(self, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._store = _Store()
        self._reasons: set[str] = set()
        self._registry = CollectorRegistry()
        self._registry.register(_Collector(self._families))
        ProcessCollector(registry=self._registry)
        self._store.set("replicator_build_info", (version(), platform.python_version()), 1)

    def render(self) -> bytes:
        """What ``GET /metrics`` answers, in the text format of ``prometheus_client.CONTENT_TYPE_LATEST``."""
        return generate_latest(self._registry)

    # -- replicas

    def set_replica(
        self,
        job: str,
        volume: str,
        target: str,
        *,
        last_snapshot: datetime | None,
        as_of: datetime | None = None,
        backlog_bytes: int | None = None,
        objective: timedelta | None = None,
        state: State | None = None,
    ) -> None:
        """Both sides of a replica were listed.

        :param last_snapshot: when the newest snapshot that the target has complete was taken; None: it has none
        :param as_of: everything that was written before is there; None: only ``last_snapshot`` says how old it is
        :param backlog_bytes: of snapshots that the target lacks; None: not known
        :param objective: the job's max_lag
        :param state: None: worked out at each scrape from what is known
        """
        with self._lock:
            replica = self._store.replica(job, volume, target)
            replica.last_snapshot = last_snapshot
            replica.as_of = as_of
            replica.backlog = backlog_bytes
            replica.objective = objective.total_seconds() if objective is not None else replica.objective
            replica.state = state

    def set_state(self, job: str, volume: str, target: str, state: State) -> None:
        """The state as somebody else worked it out, until :meth:`set_replica` says otherwise."""
        with self._lock:
            self._store.replica(job, volume, target).state = state

    def recall(
        self,
        job: str,
        volume: str,
        target: str,
        *,
        failures: int,
        last_success: datetime | None,
        superseded: bool = False,
    ) -> None:
        """What the history says of the time before this process."""
        with self._lock:
            replica = self._store.replica(job, volume, target)
            replica.failures = failures
            replica.superseded = superseded
            replica.last_success = last_success

    def recall_verified(self, job: str, volume: str, target: str, verified: datetime, *, mismatched_bytes: int) -> None:
        """What the history says of verifications before this process: an alarm outlives a restart."""
        with self._lock:
            replica = self._store.replica(job, volume, target)
            if replica.verified is None:
                replica.verified, replica.mismatched = verified, mismatched_bytes

    def forget(self, job: str, volume: str, target: str) -> None:
        """The volume is not replicated there any more: its series disappear."""
        with self._lock:
            self._store.replicas.pop((job, volume, target), None)

    def run_finished(
        self, job: str, volume: str, target: str, outcome: str, seconds: float, bytes_done: int, bytes_sent: int
    ) -> None:
        """A run ended.

        :param outcome: one of :class:`~replicator.history.Outcome`
        :param bytes_done: of changes handled on the target; ``bytes_sent``: that crossed the network
        """
        outcome = outcome if outcome in tuple(Outcome) else OTHER
        route = (job, target)
        with self._lock:
            self._store.add("replicator_runs_total", (*route, outcome), 1)
            self._store.add("replicator_replicated_bytes_total", route, bytes_done)
            self._store.add("replicator_sent_bytes_total", route, bytes_sent)
            replica = self._store.replica(job, volume, target)
            replica.rate = None
            if outcome == Outcome.SKIPPED:
                return
            self._store.observe("replicator_run_duration_seconds", route, seconds)
            if outcome == Outcome.OK:
                replica.failures = 0
                replica.superseded = False
                replica.last_success = self._clock()
            elif outcome in BAD:
                replica.failures += 1
            if outcome != Outcome.CANCELLED:
                replica.outcome = outcome

    def transfer_progress(self, job: str, volume: str, target: str, rate: float | None) -> None:
        """A transfer is under way, at ``rate`` bytes of changes per second; None: it is not any more."""
        with self._lock:
            if rate is not None:
                self._store.replica(job, volume, target).rate = rate
            elif (job, volume, target) in self._store.replicas:  # one that was forgotten stays so
                self._store.replicas[job, volume, target].rate = None

    def verified(self, job: str, volume: str, target: str, *, checked_bytes: int, mismatched_bytes: int) -> None:
        """A verification ended."""
        with self._lock:
            self._store.add("replicator_verified_bytes_total", (job, target), checked_bytes)
            self._store.add("replicator_mismatched_bytes_total", (job, target), mismatched_bytes)
            self._store.replica(job, volume, target).verified = self._clock()

    def known_to_differ(self, job: str, volume: str, target: str, mismatched_bytes: int) -> None:
        """So many bytes of the replica are known to differ from now on, whatever the last verification looked at."""
        with self._lock:
            self._store.replica(job, volume, target).mismatched = mismatched_bytes

    def superseded(self, job: str, volume: str, target: str) -> None:
        """The target refused a run: another copy was promoted since. So it stays until a run succeeds."""
        with self._lock:
            self._store.replica(job, volume, target).superseded = True

    # -- the rest of the node

    def set_next_run(self, job: str, moment: datetime | None) -> None:
        """When the job runs next; None: not by itself."""
        with self._lock:
            self._store.set("replicator_job_next_run_timestamp_seconds", (job,), _stamp(moment))

    def set_paused(self, job: str, paused: bool) -> None:
        """Whether the operator paused the job."""
        with self._lock:
            self._store.set("replicator_job_paused", (job,), float(paused))

    def set_copies(self, copies: Iterable[tuple[str, bool, int]]) -> None:
        """All copies of this node: volume, whether it is a primary, epoch. Others have no series any more."""
        found = list(copies)
        with self._lock:
            self._store.values["replicator_copy_primary"] = {(name,): float(primary) for name, primary, _ in found}
            self._store.values["replicator_copy_epoch"] = {(name,): float(epoch) for name, _, epoch in found}

    def set_storages(self, storages: Iterable[StorageInfo]) -> None:
        """All storages of this node, as they are now. One that is not there has neither size nor free bytes."""
        found = list(storages)
        there = [info for info in found if info.total > 0]
        with self._lock:
            values = self._store.values
            values["replicator_storage_up"] = {(info.name,): float(info.total > 0) for info in found}
            values["replicator_storage_free_bytes"] = {(info.name,): float(info.free) for info in there}
            values["replicator_storage_size_bytes"] = {(info.name,): float(info.total) for info in there}

    def peer(self, name: str, up: bool, round_trip: float | None, clock_difference: float | None) -> None:
        """A peer of the configuration was asked.

        :param round_trip, clock_difference: seconds; None: not known
        """
        with self._lock:
            self._store.set("replicator_peer_up", (name,), float(up))
            self._store.set("replicator_peer_round_trip_seconds", (name,), round_trip)
            self._store.set("replicator_peer_clock_difference_seconds", (name,), clock_difference)

    def refused(self, reason: str) -> None:
        """A connection or a request was refused; ``reason`` is a short word such as ``unlisted``."""
        with self._lock:
            if reason not in self._reasons and (len(self._reasons) >= MAX_REASONS or not _REASON.fullmatch(reason)):
                reason = OTHER
            self._reasons.add(reason)
            self._store.add("replicator_connections_refused_total", (reason,), 1)

    def scheduler_tick(self, moment: datetime | None = None) -> None:
        """The scheduler is at work; call it at least every minute."""
        with self._lock:
            self._store.set(
                "replicator_scheduler_heartbeat_timestamp_seconds", (), _stamp(moment if moment else self._clock())
            )

    def scheduler_late(self, seconds: float) -> None:
        """A run was started that long after its time."""
        with self._lock:
            self._store.observe("replicator_scheduler_lateness_seconds", (), max(0.0, seconds))

    def certificate_expires(self, moment: datetime) -> None:
        """When this node's certificate ends."""
        with self._lock:
            self._store.set("replicator_certificate_expiry_timestamp_seconds", (), _stamp(moment))

    # -- putting it together

    def _families(self) -> list[Family]:
        with self._lock:
            computed = self._of_replicas()
            return [_family(metric, self._store, computed) for metric in METRICS]

    def _of_replicas(self) -> dict[str, dict[_Labels, float]]:
        """The metrics that are made of what is known of the replicas now."""
        now = self._clock()
        paused = {labels[0] for labels, value in self._store.values["replicator_job_paused"].items() if value}
        found: dict[str, dict[_Labels, float]] = defaultdict(dict)
        for key, replica in self._store.replicas.items():
            lag = _lag(replica, now)
            state = (replica.state or _state(replica, lag, key[0] in paused)).value.replace(" ", "_")
            for name, value in (
                ("lag_seconds", lag),
                ("lag_objective_seconds", replica.objective),
                ("last_snapshot_timestamp_seconds", _stamp(replica.last_snapshot)),
                ("backlog_bytes", replica.backlog),
                ("consecutive_failures", replica.failures),
                ("last_success_timestamp_seconds", _stamp(replica.last_success)),
                ("last_verification_timestamp_seconds", _stamp(replica.verified)),
                ("mismatched_bytes", None if replica.verified is None else replica.mismatched),
                ("superseded", float(replica.superseded)),
            ):
                if value is not None:
                    found[f"replicator_replica_{name}"][key] = value
            for known in STATES:
                found["replicator_replica_state"][*key, known] = float(known == state)
            route = (key[0], key[2])
            for name, more in (("transfers_active", 1.0), ("transfer_bytes_per_second", replica.rate or 0.0)):
                values = found[f"replicator_{name}"]
                values[route] = values.get(route, 0.0) + (0.0 if replica.rate is None else more)
        return found


class _Collector:
    """What a registry asks; :meth:`describe` keeps it from scraping when it is registered."""

    def __init__(self, families: Callable[[], Iterable[Family]]) -> None:
        self._families = families

    def collect(self) -> Iterator[Family]:
        """All metrics now."""
        yield from self._families()

    def describe(self) -> Iterator[Family]:
        """All metrics without values."""
        for metric in METRICS:
            yield _family(metric, _Store(), {})


def _lag(replica: _Replica, now: datetime) -> float | None:
    """As ``replicator.tracker`` has it. A clock that stepped back must not show a negative one."""
    if replica.last_snapshot is None:
        return None
    known = replica.last_snapshot if replica.as_of is None else max(replica.last_snapshot, replica.as_of)
    return max(0.0, (now - known).total_seconds())


def _state(replica: _Replica, lag: float | None, paused: bool) -> State:
    """As ``status`` shows it."""
    if replica.rate is not None:
        return State.RUNNING
    if replica.outcome == Outcome.CONFLICT:
        return State.CONFLICT
    if replica.outcome == Outcome.FAILED:
        return State.FAILED
    if paused:
        return State.PAUSED
    if lag is None:
        return State.NEVER
    return State.LAGGING if replica.objective is not None and lag > replica.objective else State.OK


def _stamp(moment: datetime | None) -> float | None:
    return None if moment is None else moment.timestamp()


def _family(metric: Metric, store: _Store, computed: dict[str, dict[_Labels, float]]) -> Family:
    if metric.type == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        for labels, found in store.histograms.get(metric.name, {}).items():
            running, buckets = 0, []
            for bound, count in zip((*metric.buckets, float("inf")), found.counts, strict=True):
                running += count
                buckets.append(("+Inf" if bound == float("inf") else repr(float(bound)), running))
            histogram.add_metric(labels, buckets, found.total)
        return histogram
    family: CounterMetricFamily | GaugeMetricFamily
    if metric.type == "counter":
        family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    else:
        family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in {**store.values.get(metric.name, {}), **computed.get(metric.name, {})}.items():
        family.add_metric(labels, value)
    return family


def main(arguments: list[str]) -> int:
    """``python -m replicator.metrics --table`` writes the table of the README."""
    if arguments != ["--table"]:
        sys.stderr.write("usage: python -m replicator.metrics --table\n")
        return 2
    sys.stdout.write(markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
