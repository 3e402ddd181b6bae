"""Passes on what happens to the history and to the metrics, in the terms of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta

from replicator.config import Config
from replicator.control import HistoryEntry, RunReport, Status
from replicator.errors import StaleEpoch
from replicator.history import Check, Difference, Event, History, Run
from replicator.metrics import Metrics
from replicator.model import Progress, Version
from replicator.tracker import ReplicaKey
from replicator.verification import Method, Mismatch, Resync, Verification

_CHECKS = 100
"""How many verifications and resyncs are looked through for the last verification of a replica."""


class Recording:
    """The :class:`~replicator.reporting.Recorder` and the :class:`~replicator.engine.Memory` of this node.

    Never fails a run: neither the history nor the metrics raise.
    """

    def __init__(
        self,
        config: Config,
        history: History,
        metrics: Metrics,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config = config
        self._history = history
        self._metrics = metrics
        self._clock = clock

    # -- told by runs

    def run_finished(self, report: RunReport, started: datetime, newest: Version | None) -> None:
        """See Recorder. ``started`` may have been followed by a wait for a slot; the run's own time is what counts."""
        finished = max(self._clock(), started)
        self._history.add_run(
            Run(
                report.job,
                report.volume,
                report.target,
                finished - timedelta(seconds=max(0.0, report.seconds)),
                finished,
                report.outcome,
                report.code,
                report.message,
                report.done,
                report.sent,
                newest.guid if newest else "",
                report.snapshot,
                report.attempts,
            )
        )
        self._metrics.run_finished(
            report.job, report.volume, report.target, report.outcome, report.seconds, report.done, report.sent
        )
        if report.code == StaleEpoch.code:
            self._metrics.superseded(report.job, report.volume, report.target)

    def transfer_progress(self, key: ReplicaKey, progress: Progress | None) -> None:
        """See Recorder."""
        self._metrics.transfer_progress(key.job, key.volume, key.target, progress.rate if progress else None)

    def replica_seen(self, key: ReplicaKey, newest: Version | None, backlog: int, as_of: datetime | None) -> None:
        """See Recorder."""
        job = self._config.jobs.get(key.job)
        self._metrics.set_replica(
            key.job,
            key.volume,
            key.target,
            last_snapshot=newest.created if newest else None,
            as_of=as_of,
            backlog_bytes=backlog,
            objective=job.max_lag if job else None,
        )

    def replicas_gone(self, keys: Iterable[ReplicaKey]) -> None:
        """See Recorder."""
        for key in keys:
            self._metrics.forget(key.job, key.volume, key.target)

    # -- asked and told by the engine

    def entries(self, limit: int) -> tuple[HistoryEntry, ...]:
        """See Memory."""
        found = [
            *map(_of_run, self._history.runs(limit=limit)),
            *map(_of_check, self._history.checks(limit=limit)),
            *map(_of_event, self._history.events(limit=limit)),
        ]
        return tuple(sorted(found, key=lambda entry: entry.time, reverse=True)[:limit])

    def recall(self, key: ReplicaKey) -> dict[str, object]:
        """See Memory."""
        route = key.job, key.volume, key.target
        found = self._history.differences(*route)
        known = tuple(_mismatch(each) for each in found)
        checks = self._history.checks(job=key.job, volume=key.volume, target=key.target, limit=_CHECKS)
        moments = [check.finished for check in checks if check.kind != "resync"] + [each.found for each in found]
        if moments:
            bytes_known = known[-1].differing if known else 0
            self._metrics.recall_verified(*route, max(moments), mismatched_bytes=bytes_known)
        summary = self._history.summary(*route)
        if summary is None:
            return {"mismatches": known}
        last, success = summary.last_run, summary.last_success
        last_sync = success.finished if success else None
        superseded = last.code == StaleEpoch.code
        self._metrics.recall(*route, failures=summary.failures, last_success=last_sync, superseded=superseded)
        return {
            "failures": summary.failures,
            "last_sync": last_sync,
            "last_run": last.finished,
            "duration": success.seconds if success else None,
            "done": last.bytes_done,
            "sent": last.bytes_sent,
            "outcome": last.outcome,
            "message": last.message,
            "mismatches": known,
        }

    def verified(self, result: Verification, job: str) -> None:
        """See Memory."""
        volume = self._name(job, result.volume)
        self._history.add_check(
            Check(
                job,
                volume,
                result.target,
                "repair" if result.repaired else "verify",
                self._clock(),
                result.snapshot,
                result.checked,
                result.differing,
                result.range_count,
                result.repaired,
                0,
                _told(result),
            )
        )
        self._metrics.verified(
            job, volume, result.target, checked_bytes=result.checked, mismatched_bytes=result.differing
        )

    def known(self, key: ReplicaKey, differing: tuple[Mismatch, ...]) -> None:
        """See Memory."""
        route = key.job, key.volume, key.target
        before = {(each.snapshot_name, each.snapshot_guid): each.found for each in self._history.differences(*route)}
        now = self._clock()
        self._history.set_differences(
            *route,
            [
                Difference(
                    *route,
                    before.get((each.snapshot, each.guid), now),
                    each.snapshot,
                    each.guid,
                    each.differing,
                    each.read,
                    each.mended,
                    each.passed,
                )
                for each in differing
            ],
        )
        self._metrics.known_to_differ(*route, differing[-1].differing if differing else 0)

    def resynced(self, result: Resync, job: str) -> None:
        """See Memory."""
        volume = self._name(job, result.volume)
        self._history.add_check(
            Check(
                job,
                volume,
                result.target,
                "resync",
                self._clock(),
                result.snapshot,
                result.compared,
                result.changed,
                0,
                result.made_equal,
                result.sent,
                f"the target's own data is kept as {', '.join(result.aside)}" if result.aside else "",
            )
        )

    def event(self, kind: str, subject: str, message: str = "") -> None:
        """Anything else worth remembering: the daemon started, a job was paused."""
        self._history.add_event(kind, subject, message)

    def _name(self, job: str, volume: str) -> str:
        """A volume as status names it: with its node before it when the job pulls it."""
        known = self._config.jobs.get(job)
        pulled = known is not None and not self._config.is_local(known.source.node)
        return f"{known.source.node}/{volume}" if pulled and known is not None else volume

    # -- scraped

    def expose(self, status: Status) -> bytes:
        """The metrics, with the states, peers and next runs that ``status`` shows at this moment."""
        for row in status.replicas:
            self._metrics.set_state(row.job, row.volume, row.target, row.state)
            self._metrics.set_next_run(row.job, row.next_sync)
            self._metrics.set_paused(row.job, row.paused)
        self._metrics.set_copies((copy.volume, copy.role == "primary", copy.epoch) for copy in status.copies)
        for peer in status.peers:
            self._metrics.peer(peer.node, peer.up, peer.round_trip, peer.clock_difference)
        return self._metrics.render()


def _mismatch(found: Difference) -> Mismatch:
    return Mismatch(
        found.snapshot_name, found.differing_bytes, found.snapshot_guid, found.read, found.mended, found.passed
    )


def _told(result: Verification) -> str:
    """What a verification's figures do not say, in a few words."""
    if result.aside:
        return f"replaced data is kept as {result.aside}"
    words = [] if result.method is not Method.SCRUB else ["not read: by identities and scrubs"]
    words += result.problems[:1]
    if result.file_count:
        first = f"first of them {result.files[0].path}" if result.files else ""
        words.append(f"{result.file_count} files and folders differ, {first}")
    return "; ".join(words)


def _of_run(run: Run) -> HistoryEntry:
    return HistoryEntry(
        run.finished,
        "run",
        run.job,
        run.volume,
        run.target,
        run.outcome,
        run.seconds,
        run.bytes_done,
        run.bytes_sent,
        run.message,
    )


def _of_check(check: Check) -> HistoryEntry:
    if check.kind == "resync":
        outcome = "ok"
    elif check.repaired:
        outcome = "repaired"
    else:
        outcome = "differs" if check.mismatched_bytes else "equal"
    return HistoryEntry(
        check.finished,
        check.kind,
        check.job,
        check.volume,
        check.target,
        outcome,
        None,
        check.checked_bytes,
        check.bytes_sent,
        check.message or (f"{check.mismatched_bytes} bytes differed" if check.mismatched_bytes else ""),
    )


def _of_event(event: Event) -> HistoryEntry:
    text = f"{event.subject}: {event.message}" if event.message else event.subject
    return HistoryEntry(event.time, event.kind, "", "", "", "", None, 0, 0, text)
