"""Runs jobs: snapshots the volumes, replicates each to each target, prunes both sides.

One run is a set of independent tasks (volume, target). A task that fails is reported and counted; it never stops the
others. Everything a run needs to know it reads from the storages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from replicator import hooks, logs
from replicator.cancellation import Cancellation
from replicator.control import Listener, Note, RunReport
from replicator.endpoint import Endpoint, PruneRequest, SnapshotRequest
from replicator.errors import Cancelled, ConflictError, NoSuchVolume, ReplicatorError, UsageError, VolumeBusy
from replicator.model import (
    Capability,
    Progress,
    Version,
    VolumeId,
    VolumeInfo,
    hold_tag,
    replica_volume,
    snapshot_name,
)
from replicator.planning import Common, Plan, SendPolicy, newest_common
from replicator.replication import Limits, Options, Pacer, Pair, Replication
from replicator.selection import included_storages, select
from replicator.setting_types import Target
from replicator.settings import Job
from replicator.tracker import ReplicaKey, Tracker

LOG = logging.getLogger(__name__)

PATIENCE = 3600.0
"""Seconds that a resync or a verification waits for a run of the same replica to end."""
BUSY_PAUSE = 0.2


class Slots(Protocol):
    """Bounds what runs at once (see ``scheduler.limits``)."""

    def slot(self, volume: str, target: str, node: str, cancel: Cancellation) -> AbstractContextManager[None]:
        """Have the right to move ``volume`` to ``target`` (through ``node``) while the block runs.

        Waits for the limits of this node and of the peer. :raises VolumeBusy: that volume and target run already
        """


class Recorder(Protocol):
    """Told of what happens; never fails a run."""

    def run_finished(self, report: RunReport, started: datetime, newest: Version | None) -> None:
        """A task ended."""

    def transfer_progress(self, key: ReplicaKey, progress: Progress | None) -> None:
        """A task is under way; None: it is not any more."""

    def replica_seen(self, key: ReplicaKey, newest: Version | None, backlog: int) -> None:
        """Both sides of a replica were listed."""

    def replicas_gone(self, keys: Iterable[ReplicaKey]) -> None:
        """These are no longer replicated."""


class Network(Protocol):
    """This node and the ways to the others."""

    @property
    def node(self) -> str:
        """This node's name."""

    def endpoint(self, node: str, job: Job | None = None) -> Endpoint:
        """A node's endpoint, this one's included, as ``job`` wants it; connections are made when it is used."""


@dataclass(frozen=True, slots=True)
class Task:
    """One volume of a job and one of its targets.

    :ivar origin: the volume that it is a clone of: that one goes first, so that the clone can be sent as the difference
    """

    job: Job
    key: ReplicaKey
    pair: Pair
    peer: str
    origin: VolumeId | None = None


@dataclass(frozen=True, slots=True)
class Survey:
    """What listing both sides of a task showed.

    :ivar backlog: estimated bytes of snapshots that the target does not have yet
    """

    common: Common | None
    plan: Plan | None
    backlog: int
    error: ReplicatorError | None = None
    sizes: tuple[int | None, ...] = ()


@dataclass(slots=True)
class _VolumeRun:
    """A volume in one run: what came of it, for pruning the source."""

    volume: VolumeId
    tasks: list[Task] = field(default_factory=list)
    protect: set[str] = field(default_factory=set)
    error: ReplicatorError | None = None


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Runner:
    """Runs the jobs of this node."""

    def __init__(
        self,
        network: Network,
        tracker: Tracker,
        recorder: Recorder,
        slots: Slots,
        *,
        limits: Limits,
        pacers: Callable[[Job, str], tuple[Pacer, ...]],
        clock: Callable[[], datetime] = _utc_now,
        workers: int = 16,
    ) -> None:
        self._network = network
        self.tracker = tracker
        self._recorder = recorder
        self._slots = slots
        self._limits = limits
        self._pacers = pacers
        self._clock = clock
        self._workers = workers

    # -- what a job means now

    def volumes(self, job: Job) -> tuple[VolumeId, ...]:
        """The volumes that the job's source selects now."""
        return tuple(volume.id for volume in self._selected(job))

    def _selected(self, job: Job) -> list[VolumeInfo]:
        source = self._network.endpoint(job.source.node)
        found: dict[VolumeId, VolumeInfo] = {}
        for storage in included_storages(job.source.volumes):
            found.update((volume.id, volume) for volume in select(job.source.volumes, source.volumes(storage)))
        return [found[volume] for volume in sorted(found)]

    def name_of(self, job: Job, volume: VolumeId) -> str:
        """A volume as people name it: with its node before it when it is pulled from there."""
        return str(volume) if job.source.node == self._network.node else f"{job.source.node}/{volume}"

    def task(self, job: Job, volume: VolumeId, target: Target) -> Task:
        """The task for one volume and target."""
        pair = Pair(
            self._network.endpoint(job.source.node, job),
            volume,
            self._network.endpoint(target.node, job),
            replica_volume(job.source.node, volume, target.storage, same_path=job.replica_path == "same"),
            hold_tag(job.name, target.node, target.storage),
        )
        peer = target.node if job.source.node == self._network.node else job.source.node
        return Task(job, ReplicaKey(job.name, self.name_of(job, volume), str(target)), pair, peer)

    def tasks(self, job: Job, volume: str | None = None, target: str | None = None) -> tuple[Task, ...]:
        """The tasks of a job, narrowed to one volume and one target where given.

        :raises UsageError: the job has no such target
        :raises NoSuchVolume: the job selects no such volume
        """
        targets = [t for t in job.targets if target is None or str(t) == self._full(target)]
        if not targets:
            known = ", ".join(str(t) for t in job.targets)
            raise UsageError(f"job {job.name} has no target {target}", hint=f"its targets are: {known}")
        selected = self._selected(job)
        volumes = [v.id for v in selected if volume is None or volume in (str(v.id), self.name_of(job, v.id))]
        if volume is not None and not volumes:
            raise NoSuchVolume(
                f"job {job.name} replicates no volume {volume}", hint=f"`replicator plan {job.name}` lists its volumes"
            )
        if volume is None and target is None:
            keys = frozenset(self.task(job, v, t).key for v in volumes for t in targets)
            self._recorder.replicas_gone(self.tracker.keep_only(job.name, keys))
        origins = {v.id: v.origin.volume for v in selected if v.origin is not None}
        return tuple(replace(self.task(job, v, t), origin=origins.get(v)) for v in volumes for t in targets)

    def _full(self, target: str) -> str:
        return target if ":" in target else f"{self._network.node}:{target}"

    def options(self, task: Task) -> Options:
        """How the task's job wants it."""
        job = task.job
        return Options(
            SendPolicy(job.intermediates, job.name, job.foreign_snapshots),
            limits=self._limits,
            pacers=self._pacers(job, task.peer),
        )

    # -- looking

    def survey(self, task: Task, *, sizes: bool = True) -> Survey:
        """List both sides and plan, and remember what that shows; changes nothing."""
        replication = Replication(task.pair, self.options(task), observer=_ignore, cancel=Cancellation())
        try:
            found, source, target = replication.plan()
            common = newest_common(source, target)
            if not isinstance(found, Plan):
                raise found.to_error()
            estimates: list[int | None] = []
            for step in found.steps if sizes else ():
                base = step.base.ref if step.base else None
                estimates.append(task.pair.source.estimate(task.pair.source_volume, base, step.to.ref))
        except ReplicatorError as error:
            self.tracker.problem(task.key, _outcome_of(error), str(error), error.hint)
            return Survey(None, None, 0, error)
        backlog = sum(size or 0 for size in estimates)
        self._seen(task.key, common.target if common else None, backlog)
        return Survey(common, found, backlog, sizes=tuple(estimates))

    def _seen(self, key: ReplicaKey, newest: Version | None, backlog: int) -> None:
        self.tracker.seen(key, newest, backlog, self._clock())
        self._recorder.replica_seen(key, newest, backlog)

    # -- running

    def snapshot(self, job: Job, volumes: Sequence[VolumeId], cancel: Cancellation) -> dict[VolumeId, ReplicatorError]:
        """Snapshot the volumes under one name, between the job's hooks; which ones failed, and why.

        Raises nothing of the storages: where volumes of one storage cannot be snapshotted at one instant anyway, one
        that fails does not keep the others from being protected.
        """
        source = self._network.endpoint(job.source.node)
        failed: dict[VolumeId, ReplicatorError] = {}
        by_storage: dict[str, list[VolumeId]] = {}
        for volume in volumes:
            try:
                source.ensure_primary(volume)
                by_storage.setdefault(volume.storage, []).append(volume)
            except ReplicatorError as error:
                failed[volume] = error
        if not by_storage:
            return failed
        name = snapshot_name(job.name, self._clock())
        with self._quiesced(job, volumes):
            for storage, group in by_storage.items():
                cancel.check()
                failed.update(self._snapshot_group(source, storage, group, name))
        return failed

    def _quiesced(self, job: Job, volumes: Sequence[VolumeId]) -> AbstractContextManager[None]:
        quiesce = job.quiesce
        if quiesce is None:
            return nullcontext()
        return hooks.quiesced(
            quiesce.before, quiesce.after, quiesce.timeout, job=job.name, volumes=[str(v) for v in volumes]
        )

    def _snapshot_group(
        self, source: Endpoint, storage: str, group: list[VolumeId], name: str
    ) -> dict[VolumeId, ReplicatorError]:
        try:
            atomic = Capability.ATOMIC_GROUP in source.storage(storage).capabilities
            if atomic or len(group) == 1:
                source.snapshot(SnapshotRequest(tuple(group), name))
                return {}
        except ReplicatorError as error:
            return dict.fromkeys(group, error)
        failed = {}
        for volume in group:
            try:
                source.snapshot(SnapshotRequest((volume,), name))
            except ReplicatorError as error:
                failed[volume] = error
        return failed

    def run(
        self, job: Job, volume: str | None, target: str | None, listen: Listener, cancel: Cancellation
    ) -> tuple[RunReport, ...]:
        """Snapshot, replicate, prune. Every failure is in the reports, one a task.

        :raises ReplicatorError: the volumes of the job cannot be listed, or there is no such volume or target
        """
        tasks = self.tasks(job, volume, target)
        runs: dict[VolumeId, _VolumeRun] = {}
        for task in tasks:
            entry = runs.setdefault(task.pair.source_volume, _VolumeRun(task.pair.source_volume))
            entry.tasks.append(task)
        try:
            for failed, error in self.snapshot(job, tuple(runs), cancel).items():
                runs[failed].error = error
        except ReplicatorError as error:  # a hook
            for entry in runs.values():
                entry.error = error
        if runs:
            plural = "" if len(runs) == 1 else "s"
            listen(Note(f"job {job.name}: {len(runs)} volume{plural} snapshotted"))
        reports: list[RunReport] = []
        with ThreadPoolExecutor(min(self._workers, max(1, len(tasks))), thread_name_prefix=f"run-{job.name}") as pool:
            waiting = [(task, entry) for entry in runs.values() for task in entry.tasks]
            running: dict[Future[RunReport], Task] = {}
            while waiting or running:
                ready = ready_tasks([task for task, _ in waiting], running.values())
                for task, entry in [item for item in waiting if item[0].key in ready]:
                    running[pool.submit(self._run_task, task, entry, listen, cancel)] = task
                waiting = [item for item in waiting if item[0].key not in ready]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    report = future.result()
                    listen(report)
                    reports.append(report)
        for entry in runs.values():
            self._prune_source(job, entry)
        return tuple(reports)

    def _run_task(self, task: Task, entry: _VolumeRun, listen: Listener, cancel: Cancellation) -> RunReport:
        started, began = self._clock(), time.monotonic()
        report = RunReport(task.job.name, task.key.volume, task.key.target, "ok", 0.0, 0, 0, 0)
        replication = Replication(task.pair, self.options(task), observer=self._observer(task, listen), cancel=cancel)
        newest: Version | None = None
        try:
            if entry.error is not None:
                raise entry.error
            with (
                self._slots.slot(task.key.volume, task.key.target, task.peer, cancel),
                self.tracker.running(task.key),
            ):
                began = time.monotonic()
                newest = replication.run().newest
                if newest is not None:
                    entry.protect.add(newest.guid)
                    self._prune_target(task, newest)
        except VolumeBusy as error:
            report = _failure(report, error, "skipped")
        except ReplicatorError as error:
            report = _failure(report, error, _outcome_of(error))
        except Exception as error:  # a defect in one task must not stop the others; it is logged in full
            LOG.exception("task failed unexpectedly")
            report = replace(report, outcome="failed", code="internal", message=f"internal error: {error!r}")
        finally:
            self._recorder.transfer_progress(task.key, None)
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
        return report

    def _finish(self, task: Task, report: RunReport, started: datetime, newest: Version | None) -> None:
        self.tracker.finished(task.key, report, self._clock())
        if newest is not None:
            self._seen(task.key, newest, 0)
        elif report.outcome == "failed" and report.code != "peer_unreachable":
            self._look_again(task, report)
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

    def _look_again(self, task: Task, report: RunReport) -> None:
        """After a failure: what the target has now, and how much it lacks; the failure stays what is shown."""
        survey = self.survey(task)
        if survey.error is not None:
            self.tracker.problem(task.key, report.outcome, report.message, report.hint)

    def _observer(self, task: Task, listen: Listener) -> Callable[[Progress], None]:
        def observe(progress: Progress) -> None:
            shown = replace(progress, volume=task.key.volume)
            self.tracker.progress(task.key, shown)
            self._recorder.transfer_progress(task.key, shown)
            listen(shown)

        return observe

    @contextmanager
    def exclusive(self, task: Task, cancel: Cancellation) -> Iterator[None]:
        """Have a replica to oneself, within the limits, and shown as running; waits until a run under way has ended.

        :raises VolumeBusy: that took longer than ``PATIENCE``
        """
        deadline = time.monotonic() + PATIENCE
        with ExitStack() as stack:
            while True:
                cancel.check()
                try:
                    stack.enter_context(self._slots.slot(task.key.volume, task.key.target, task.peer, cancel))
                except VolumeBusy:
                    if time.monotonic() > deadline:
                        raise
                    cancel.wait(BUSY_PAUSE)
                else:
                    break
            with self.tracker.running(task.key):
                yield

    def healed(self, task: Task) -> None:
        """A resync or repair brought the replica into order: what was wrong with it no longer is."""
        self.tracker.recall(
            task.key, outcome="ok", message="", hint="", mismatch="", failures=0, last_sync=self._clock()
        )

    # -- pruning

    def source_prune_request(self, job: Job, volume: VolumeId, tasks: Sequence[Task], *, dry_run: bool) -> PruneRequest:
        """The request that prunes the source: what every target of the job that answers has newest is protected."""
        protect = set()
        for task in tasks:
            common = self.survey(task, sizes=False).common
            if common is not None:
                protect.add(common.source.guid)
        return PruneRequest(volume, job.name, job.keep.source, tuple(sorted(protect)), dry_run=dry_run)

    def target_prune_request(self, task: Task, protect: str | None, *, dry_run: bool) -> PruneRequest:
        """The request that prunes one replica."""
        return PruneRequest(
            task.pair.target_volume,
            task.job.name,
            task.job.keep.target,
            (protect,) if protect else (),
            dry_run=dry_run,
        )

    def _prune_target(self, task: Task, newest: Version) -> None:
        request = self.target_prune_request(task, newest.guid, dry_run=False)
        self._prune(task.pair.target, request)

    def _prune_source(self, job: Job, entry: _VolumeRun) -> None:
        """Only what is common with a target that was reached now is known; for the others, their holds protect it."""
        if entry.error is not None:
            return
        request = PruneRequest(entry.volume, job.name, job.keep.source, tuple(sorted(entry.protect)))
        self._prune(self._network.endpoint(job.source.node), request)

    def _prune(self, endpoint: Endpoint, request: PruneRequest) -> None:
        """Prune after a run: a failure is logged and tried again by the next run, it does not undo the run."""
        try:
            outcomes = endpoint.prune(request)
        except ReplicatorError as error:
            logs.event(LOG, logging.WARNING, "prune failed", volume=request.volume, node=endpoint.node, error=error)
            return
        for outcome in outcomes:
            if outcome.error:
                logs.event(
                    LOG,
                    logging.WARNING,
                    "snapshot could not be destroyed",
                    volume=request.volume,
                    node=endpoint.node,
                    snapshot=outcome.version.name,
                    error=outcome.error,
                )


def ready_tasks(waiting: Sequence[Task], running: Iterable[Task]) -> frozenset[ReplicaKey]:
    """Those that may begin: a clone goes after what it is a clone of, target by target."""
    running = tuple(running)
    unfinished = {(str(task.pair.source_volume), task.key.target) for task in (*waiting, *running)}
    ready = frozenset(task.key for task in waiting if (str(task.origin), task.key.target) not in unfinished)
    if ready or running:
        return ready
    return frozenset(task.key for task in waiting)  # origins in a circle: no storage has that, a peer may say so


def _ignore(_: Progress) -> None:
    pass


def _outcome_of(error: ReplicatorError) -> str:
    if isinstance(error, Cancelled):
        return "cancelled"
    conflicts = ("not_a_replica", "stale_epoch")
    return "conflict" if isinstance(error, ConflictError) or error.code in conflicts else "failed"


def _failure(report: RunReport, error: ReplicatorError, outcome: str) -> RunReport:
    return replace(report, outcome=outcome, message=str(error), hint=error.hint, code=error.code)
