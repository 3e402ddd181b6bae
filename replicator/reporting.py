"""Tells of runs and of looks at replicas: who asks now, the history and the metrics, and the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Protocol

from replicator import logs
from replicator.control import RunReport
from replicator.errors import Cancelled, ConflictError, ReplicatorError
from replicator.model import Progress, Version
from replicator.tracker import ReplicaKey, Tracker

LOG = logging.getLogger(__name__)


class Recorder(Protocol):
    """Told of what happens; never fails a run."""

    def run_finished(self, report: RunReport, started: datetime, newest: Version | None) -> None:
        """A task ended."""

    def transfer_progress(self, key: ReplicaKey, progress: Progress | None) -> None:
        """A task is under way; None: it is not any more."""

    def replica_seen(self, key: ReplicaKey, newest: Version | None, backlog: int, as_of: datetime | None) -> None:
        """Both sides of a replica were listed; with ``as_of``: it has everything that was written before then."""

    def replicas_gone(self, keys: Iterable[ReplicaKey]) -> None:
        """These are no longer replicated."""

    def event(self, kind: str, subject: str, message: str = "") -> None:
        """Anything else worth remembering."""


class Reporter:
    """Tells the tracker and a recorder the same, and the log how runs end. Thread-safe."""

    def __init__(self, tracker: Tracker, recorder: Recorder, clock: Callable[[], datetime]) -> None:
        self._tracker = tracker
        self._recorder = recorder
        self._clock = clock

    def replicated(self, job: str, keys: frozenset[ReplicaKey]) -> None:
        """These are all replicas of a job; others that were known of it are no longer replicated."""
        self._recorder.replicas_gone(self._tracker.keep_only(job, keys))

    def seen(self, key: ReplicaKey, newest: Version | None, backlog: int, as_of: datetime | None = None) -> None:
        """Both sides were listed.

        :param newest: that the target has complete
        :param backlog: bytes that it lacks, estimated
        :param as_of: it has everything that was written before then; None: nobody looked at live data
        """
        seen = self._tracker.seen(key, newest, backlog, self._clock(), as_of)
        self._recorder.replica_seen(key, newest, backlog, seen.as_of)

    def arrived(self, key: ReplicaKey, newest: Version) -> None:
        """The target has this version complete, as of now; how much more there is was not asked again."""
        self.seen(key, newest, self._tracker.get(key).backlog)

    def problem(self, key: ReplicaKey, error: ReplicatorError) -> None:
        """Something stands in the way, found without a run."""
        self._tracker.problem(key, outcome_of(error), str(error), error.hint)

    def stays_failed(self, key: ReplicaKey, report: RunReport) -> None:
        """What a look after a failed run has found is not shown in its place."""
        self._tracker.problem(key, report.outcome, report.message, report.hint)

    def progress(self, key: ReplicaKey, progress: Progress) -> None:
        """How far a transfer is."""
        self._tracker.progress(key, progress)
        self._recorder.transfer_progress(key, progress)

    def ended(self, key: ReplicaKey) -> None:
        """No transfer is under way any more."""
        self._recorder.transfer_progress(key, None)

    def finished(self, key: ReplicaKey, report: RunReport, started: datetime, newest: Version | None) -> None:
        """A task ended."""
        self._tracker.finished(key, report, self._clock())
        self._recorder.run_finished(report, started, newest)
        level = logging.INFO if report.outcome in ("ok", "skipped", "cancelled") else logging.ERROR
        logs.event(
            LOG,
            level,
            "run finished",
            job=report.job,
            volume=report.volume,
            target=report.target,
            outcome=report.outcome,
            seconds=round(report.seconds, 3),
            done=report.done,
            sent=report.sent,
            **({"error": report.message, "code": report.code} if report.message else {}),
        )


def outcome_of(error: ReplicatorError) -> str:
    """How a run that ends with this error is reported."""
    if isinstance(error, Cancelled):
        return "cancelled"
    conflicts = ("not_a_replica", "stale_epoch")
    return "conflict" if isinstance(error, ConflictError) or error.code in conflicts else "failed"
