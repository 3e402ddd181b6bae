"""Runs one task: brings a replica to the newest version of its source, prunes it, and reports what came of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime

from replicator import takeover
from replicator.cancellation import Cancellation
from replicator.control import Listener, RunReport
from replicator.errors import ConflictError, ReplicatorError, StaleEpoch, VolumeBusy
from replicator.model import Progress, Version
from replicator.planning import Common, protected_guids
from replicator.pruning import Pruner, target_request
from replicator.replication import Options, Replication
from replicator.reporting import Reporter, outcome_of
from replicator.settling import RunListing
from replicator.surveys import Surveys
from replicator.tasks import Task
from replicator.turns import Turns

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a task.

    :ivar protect: guids that the target needs of the source, as far as that is known now: for pruning the source, which
        a run that was stopped does not
    """

    report: RunReport
    protect: frozenset[str] = frozenset()


class TaskRuns:
    """Runs tasks, several at once. Nothing is raised: every failure is in the reports."""

    def __init__(
        self,
        turns: Turns,
        surveys: Surveys,
        pruner: Pruner,
        reporter: Reporter,
        *,
        options: Callable[[Task], Options],
        clock: Callable[[], datetime],
    ) -> None:
        self._turns = turns
        self._surveys = surveys
        self._pruner = pruner
        self._reporter = reporter
        self._options = options
        self._clock = clock

    def settled(self, task: Task, common: Common, as_of: datetime, seconds: float) -> Done:
        """Report a replica that lacks nothing.

        :param common: what both sides have; everything that was written before ``as_of`` is in it
        :param seconds: that it took to find out
        """
        report = replace(_begun(task), seconds=seconds, snapshot=common.source.name)
        self._reporter.finished(task.key, report, as_of, common.source)
        self._reporter.seen(task.key, common.source, 0, as_of)
        return Done(report, frozenset({common.source.guid}))

    def failed(self, task: Task, error: ReplicatorError) -> Done:
        """Report a task that cannot begin, as its volume has no snapshot."""
        started = self._clock()
        report = _failure(_begun(task), error, outcome_of(error))
        self._finish(task, report, started, None)
        return Done(report)

    def run(self, task: Task, listing: RunListing, listen: Listener, cancel: Cancellation) -> Done:
        """Replicate, and prune the replica, once it is the task's turn."""
        started, began = self._clock(), time.monotonic()
        report = _begun(task)
        replication = Replication(
            task.pair,
            self._options(task),
            observer=self._observer(task, listen),
            cancel=cancel,
            volumes=listing.volumes,
            arrived=lambda version: self._reporter.arrived(task.key, version),
        )
        newest: Version | None = None
        protect: frozenset[str] = frozenset()
        its_turn = False
        try:
            with self._turns.take(task, cancel):
                its_turn, began = True, time.monotonic()
                outcome = replication.run(listing.of(task.pair))
                newest = outcome.newest
                if newest is not None:
                    protect = outcome.origins | {newest.guid}
                    self._pruner.prune(task.pair.target, target_request(task, protect))
        except ReplicatorError as error:
            # Another run brings it over, and reports that. A storage that is busy otherwise is a failure like any.
            skipped = isinstance(error, VolumeBusy) and not its_turn
            report = _failure(report, error, "skipped" if skipped else outcome_of(error))
            if _says_superseded(error):
                with suppress(ReplicatorError):
                    takeover.notice_superseded(task.pair)
        except Exception as error:  # a defect in one task must not stop the others; it is logged in full
            LOG.exception("task failed unexpectedly")
            report = replace(report, outcome="failed", code="internal", message=f"internal error: {error!r}")
        finally:
            self._reporter.ended(task.key)
        if newest is None and report.code != "peer_unreachable" and not cancel.cancelled:
            protect = _needed(replication, task)
        outcome = replication.outcome
        report = replace(
            report,
            seconds=time.monotonic() - began,
            steps=outcome.steps,
            done=outcome.done,
            sent=outcome.sent,
            attempts=max(1, outcome.attempts),
            snapshot=newest.name if newest else "",
        )
        self._finish(task, report, started, newest)
        return Done(report, protect)

    def _finish(self, task: Task, report: RunReport, started: datetime, newest: Version | None) -> None:
        self._reporter.finished(task.key, report, started, newest)
        if newest is not None:
            self._reporter.seen(task.key, newest, 0)
        elif report.outcome == "failed" and report.code != "peer_unreachable":
            # What the target has now, and how much it lacks; the failure stays what is shown.
            survey = self._surveys.of(task)
            if survey.error is not None:
                self._reporter.stays_failed(task.key, report)

    def _observer(self, task: Task, listen: Listener) -> Callable[[Progress], None]:
        def observe(progress: Progress) -> None:
            shown = replace(progress, volume=task.key.volume)
            self._reporter.progress(task.key, shown)
            listen(shown)

        return observe


def _says_superseded(error: ReplicatorError) -> bool:
    return isinstance(error, StaleEpoch) or (isinstance(error, ConflictError) and error.kind == "stale_epoch")


def _begun(task: Task) -> RunReport:
    return RunReport(task.job.name, task.key.volume, task.key.target, "ok", 0.0, 0, 0, 0)


def _failure(report: RunReport, error: ReplicatorError, outcome: str) -> RunReport:
    code = StaleEpoch.code if _says_superseded(error) else error.code
    return replace(report, outcome=outcome, message=str(error), hint=error.hint, code=code)


def _needed(replication: Replication, task: Task) -> frozenset[str]:
    """What a target that did not come forward still needs of the source, on both sides, as far as it can be asked: it
    may have lost the version that is held for it, and continue from an older one once somebody has said how."""
    try:
        _, source, target = replication.plan()
    except ReplicatorError:
        return frozenset()
    return protected_guids(source, (target,), task.policy)
