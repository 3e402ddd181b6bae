"""What this node knows of its replicas right now: for ``status`` and for metrics.

Nothing here is the truth. It is filled from what storages list and from how runs end, and a restart begins anew.
Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime

from replicator.control import RunReport
from replicator.model import Progress, Version
from replicator.verification import Mismatch


@dataclass(frozen=True, slots=True, order=True)
class ReplicaKey:
    """A volume of a job (as the job names it) and one target (``NODE:STORAGE``)."""

    job: str
    volume: str
    target: str


@dataclass(frozen=True, slots=True)
class Replica:
    """What is known of one replica.

    :ivar newest: newest version that the target has complete, None when it has none or nobody could look
    :ivar looked: when ``newest`` was seen last
    :ivar as_of: the target has everything that was written before this; None where only ``newest`` says how old it is
    :ivar backlog: bytes of snapshots that are not on the target yet
    :ivar failures: consecutive runs that failed
    :ivar mismatches: what verifications found to differ, in that order, until something ends it (``mismatches.py``); a
        run that succeeds afterwards does not. None: the history was not asked yet
    """

    key: ReplicaKey
    newest: Version | None = None
    looked: datetime | None = None
    backlog: int = 0
    failures: int = 0
    last_sync: datetime | None = None
    last_run: datetime | None = None
    duration: float | None = None
    done: int = 0
    sent: int = 0
    outcome: str = ""
    message: str = ""
    hint: str = ""
    progress: Progress | None = None
    mismatches: tuple[Mismatch, ...] | None = None
    as_of: datetime | None = None

    def lag(self, now: datetime) -> float | None:
        """Seconds of changes that would be lost if the source were gone, at most; None: all."""
        return lag(self.newest, self.as_of, now)


def lag(newest: Version | None, as_of: datetime | None, now: datetime) -> float | None:
    """How far a target is behind, seconds: since its newest snapshot was taken, or since it was last seen that nothing
    had been written after that one. None where it has nothing. (A clock that stepped back shows no negative lag.)"""
    if newest is None:
        return None
    known = newest.created if as_of is None else max(newest.created, as_of)
    return max(0.0, (now - known).total_seconds())


class Tracker:
    """Replicas by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._replicas: dict[ReplicaKey, Replica] = {}

    def get(self, key: ReplicaKey) -> Replica:
        """What is known; an empty record for one never seen."""
        with self._lock:
            return self._replicas.get(key, Replica(key))

    def all(self) -> tuple[Replica, ...]:
        """All of them, sorted by key."""
        with self._lock:
            return tuple(replica for _, replica in sorted(self._replicas.items()))

    def keep_only(self, job: str, keys: frozenset[ReplicaKey]) -> tuple[ReplicaKey, ...]:
        """Forget replicas of ``job`` that its volumes and targets no longer have; which ones were forgotten."""
        with self._lock:
            gone = tuple(key for key in self._replicas if key.job == job and key not in keys)
            for key in gone:
                del self._replicas[key]
        return gone

    def _change(self, key: ReplicaKey, **changes: object) -> Replica:
        with self._lock:
            changed = replace(self._replicas.get(key, Replica(key)), **changes)  # type: ignore[arg-type]
            self._replicas[key] = changed
            return changed

    def seen(
        self, key: ReplicaKey, newest: Version | None, backlog: int, now: datetime, as_of: datetime | None = None
    ) -> Replica:
        """Both sides were listed. What was seen of the same snapshot before stays true."""
        with self._lock:
            before = self._replicas.get(key, Replica(key))
            same = newest is not None and before.newest is not None and newest.guid == before.newest.guid
            since = as_of or (before.as_of if same else None)
            changed = replace(before, newest=newest, backlog=backlog, looked=now, as_of=since)
            self._replicas[key] = changed
            return changed

    def recall(self, key: ReplicaKey, **facts: object) -> None:
        """Fill in what the history remembers of earlier runs; ``facts`` are fields of :class:`Replica`."""
        self._change(key, **facts)

    def problem(self, key: ReplicaKey, outcome: str, message: str, hint: str) -> None:
        """Something stands in the way of this replica, found without a run."""
        self._change(key, outcome=outcome, message=message, hint=hint)

    def failed(self, key: ReplicaKey, message: str, hint: str) -> None:
        """A run failed before this replica's part of it began."""
        with self._lock:
            before = self._replicas.get(key, Replica(key))
            self._replicas[key] = replace(
                before, outcome="failed", message=message, hint=hint, failures=before.failures + 1
            )

    @contextmanager
    def running(self, key: ReplicaKey) -> Iterator[None]:
        """A run is under way while the block lasts."""
        self._change(key, progress=Progress(key.volume, key.target, "starting", 0, None, 0, 0.0))
        try:
            yield
        finally:
            self._change(key, progress=None)

    def progress(self, key: ReplicaKey, progress: Progress) -> None:
        """How far it is."""
        self._change(key, progress=progress)

    def finished(self, key: ReplicaKey, report: RunReport, now: datetime) -> Replica:
        """A run ended."""
        with self._lock:
            before = self._replicas.get(key, Replica(key))
            failed = report.outcome in ("failed", "conflict")
            ok = report.outcome == "ok"
            changed = replace(
                before,
                failures=before.failures + 1 if failed else 0 if ok else before.failures,
                last_run=now,
                last_sync=now if ok else before.last_sync,
                duration=report.seconds if ok else before.duration,
                done=report.done,
                sent=report.sent,
                outcome=report.outcome,
                message=report.message,
                hint=report.hint,
            )
            self._replicas[key] = changed
            return changed
