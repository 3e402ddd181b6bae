"""Runs jobs: snapshots the volumes, replicates each to each target, prunes both sides.

One run is a set of independent tasks (volume, target). A task that fails is reported and counted; it never stops the
others. Everything a run needs to know it reads from the storages.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, tzinfo
from typing import Protocol

from replicator import hooks, logs
from replicator.cancellation import Cancellation
from replicator.control import Listener, Note, RunReport
from replicator.endpoint import Endpoint, PruneRequest, SnapshotRequest
from replicator.errors import Cancelled, ConflictError, NoSuchVolume, ReplicatorError, UsageError, VolumeBusy
from replicator.model import (
    Capability,
    Progress,
    Role,
    Version,
    VolumeId,
    VolumeInfo,
    hold_tag,
    replica_volume,
    snapshot_name,
)
from replicator.origins import origins_of
from replicator.planning import Common, Plan, SendPolicy, newest_common, origin_guids, protected_guids
from replicator.replication import Limits, Listed, Options, Pacer, Pair, Replication, Volumes
from replicator.selection import included_storages, select
from replicator.setting_types import Target
from replicator.settings import Job
from replicator.settling import Place, RunListing, heads, heads_of, settled, states_of
from replicator.tidying import Tidying
from replicator.tracker import ReplicaKey, Tracker

LOG = logging.getLogger(__name__)

PATIENCE = 3600.0
"""Seconds that a resync or a verification waits for a run of the same replica to end."""
BUSY_PAUSE = 0.2
WORKERS = 16
"""Threads of a run; how many transfers run at once is for the slots."""


class Slots(Protocol):
    """Bounds what runs at once (see ``scheduler.limits``)."""

    def slot(
        self, volume: str, target: str, node: str, cancel: Cancellation, *, pools: Iterable[str] = ()
    ) -> AbstractContextManager[None]:
        """Have the right to move ``volume`` to ``target`` (through ``node``) while the block runs.

        :param pools: that it reads or writes, as :meth:`Network.pool` calls them

        Waits for the limits of this node and of the peer. :raises VolumeBusy: that volume and target run already
        """


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


class Network(Protocol):
    """This node and the ways to the others."""

    @property
    def node(self) -> str:
        """This node's name."""

    def endpoint(self, node: str, job: Job | None = None) -> Endpoint:
        """A node's endpoint, this one's included, as ``job`` wants it; connections are made when it is used."""

    def pool(self, node: str, storage: str) -> str | None:
        """The pool of this node that a storage is in: what is in one pool shares its disks. None: of another node."""


@dataclass(frozen=True, slots=True)
class Task:
    """One volume of a job and one of its targets.

    :ivar origin: the volume that it is a clone of, if the job has that, too: that one goes first, so that the clone can
        be sent as the difference
    :ivar origins: names of its snapshots that other volumes of the job began as
    """

    job: Job
    key: ReplicaKey
    pair: Pair
    peer: str
    origin: VolumeId | None = None
    origins: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Survey:
    """What listing both sides of a task showed.

    :ivar backlog: estimated bytes of snapshots that the target does not have yet
    :ivar quiet: nothing was written to the volume since its newest snapshot, so a run takes none
    :ivar protect: guids that no policy may destroy, on either side; known where both could be listed, whatever is wrong
    """

    common: Common | None
    plan: Plan | None
    backlog: int
    error: ReplicatorError | None = None
    sizes: tuple[int | None, ...] = ()
    quiet: bool = False
    protect: frozenset[str] = frozenset()


@dataclass(slots=True)
class _VolumeRun:
    """A volume in one run: what came of it, for pruning the source.

    :ivar settled: what each target has that lacks nothing
    """

    volume: VolumeId
    tasks: list[Task] = field(default_factory=list)
    protect: set[str] = field(default_factory=set)
    error: ReplicatorError | None = None
    settled: dict[ReplicaKey, Common] = field(default_factory=dict)

    @property
    def quiet(self) -> bool:
        """Whether it needs no snapshot: what a settled target has is its live data."""
        return bool(self.settled)

    @property
    def done(self) -> bool:
        """Whether there is nothing to do for any target."""
        return len(self.settled) == len(self.tasks)


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
        zone: tzinfo = UTC,
    ) -> None:
        self._network = network
        self.tracker = tracker
        self._recorder = recorder
        self._slots = slots
        self._limits = limits
        self._pacers = pacers
        self._clock = clock
        self._tidying = Tidying(zone)

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
        there = {v.id for v in selected}
        clones = {v.id: v.origin.volume for v in selected if v.origin is not None and v.origin.volume in there}
        begun = origins_of(selected)
        return tuple(
            replace(self.task(job, v, t), origin=clones.get(v), origins=begun.get(v, frozenset()))
            for v in volumes
            for t in targets
        )

    def _full(self, target: str) -> str:
        return target if ":" in target else f"{self._network.node}:{target}"

    def options(self, task: Task) -> Options:
        """How the task's job wants it."""
        return Options(
            _policy(task),
            limits=self._limits,
            pacers=self._pacers(task.job, task.peer),
            origin_first=task.origin is not None,
        )

    # -- looking

    def survey(self, task: Task, *, sizes: bool = True) -> Survey:
        """List both sides and plan, and remember what that shows; changes nothing."""
        return self._survey(task, None, None, sizes)

    def survey_all(self, tasks: Sequence[Task], *, sizes: bool = True) -> dict[ReplicaKey, Survey]:
        """:meth:`survey` of many, with one listing of each storage."""
        asked = self._clock()
        pairs = [task.pair for task in tasks]
        heads, states = heads_of(pairs), states_of(pairs)
        as_of: dict[ReplicaKey, datetime] = {}
        quiet: set[VolumeId] = set()
        for task in tasks:
            source, target = (heads.get(place) for place in _places(task.pair))
            if settled(source, target, _policy(task), task.pair.tag) is not None:
                as_of[task.key] = asked
                if _skips_unchanged(task.job):
                    quiet.add(task.pair.source_volume)
        found = {}
        volumes = Volumes()
        for task in tasks:
            here, there = (states.get(place) for place in _places(task.pair))
            listed = (here, there) if here is not None and there is not None else None
            survey = self._survey(task, listed, as_of.get(task.key), sizes, volumes)
            found[task.key] = replace(survey, quiet=task.pair.source_volume in quiet)
        return found

    def _survey(
        self, task: Task, listed: Listed | None, as_of: datetime | None, sizes: bool, volumes: Volumes | None = None
    ) -> Survey:
        replication = Replication(
            task.pair, self.options(task), observer=_ignore, cancel=Cancellation(), volumes=volumes
        )
        protect: frozenset[str] = frozenset()
        try:
            found, source, target = replication.plan(listed)
            common = newest_common(source, target)
            protect = protected_guids(source, (target,), _policy(task))
            if not isinstance(found, Plan):
                raise found.to_error()
            estimates: list[int | None] = []
            for step in found.steps if sizes else ():
                base = step.base.ref if step.base else None
                size = task.pair.source.estimate(
                    task.pair.source_volume, base, step.to.ref, intermediates=step.intermediates
                )
                estimates.append(size)
        except ReplicatorError as error:
            self.tracker.problem(task.key, _outcome_of(error), str(error), error.hint)
            return Survey(None, None, 0, error, protect=protect)
        backlog = sum(size or 0 for size in estimates)
        self._seen(task.key, common.target if common else None, backlog, as_of)
        return Survey(common, found, backlog, sizes=tuple(estimates), protect=protect)

    def _seen(self, key: ReplicaKey, newest: Version | None, backlog: int, as_of: datetime | None = None) -> None:
        seen = self.tracker.seen(key, newest, backlog, self._clock(), as_of)
        self._recorder.replica_seen(key, newest, backlog, seen.as_of)

    # -- running

    def snapshot(
        self, job: Job, volumes: Sequence[VolumeId], cancel: Cancellation, primaries: Set[VolumeId] = frozenset()
    ) -> dict[VolumeId, ReplicatorError]:
        """Snapshot the volumes under one name, between the job's hooks; which ones failed, and why.

        :param primaries: volumes that are known to be marked as such

        Raises nothing of the storages: one volume that fails does not keep the others from being protected.
        """
        source = self._network.endpoint(job.source.node)
        failed: dict[VolumeId, ReplicatorError] = {}
        ready: dict[str, list[VolumeId]] = {}
        for volume in volumes:
            try:
                if volume not in primaries:
                    source.ensure_primary(volume)
                ready.setdefault(volume.storage, []).append(volume)
            except ReplicatorError as error:
                failed[volume] = error
        if not ready:
            return failed
        name = snapshot_name(job.name, self._clock())
        with self._quiesced(job, volumes):
            for request in self._snapshot_requests(source, ready, name, failed):
                cancel.check()
                try:
                    taken = source.snapshot(request)
                except ReplicatorError as error:
                    failed |= dict.fromkeys(request.volumes, error)
                else:
                    failed |= {each.volume: each.error for each in taken if each.error is not None}
        return failed

    def _quiesced(self, job: Job, volumes: Sequence[VolumeId]) -> AbstractContextManager[None]:
        quiesce = job.quiesce
        if quiesce is None:
            return nullcontext()
        return hooks.quiesced(
            quiesce.before, quiesce.after, quiesce.timeout, job=job.name, volumes=[str(v) for v in volumes]
        )

    def _snapshot_requests(
        self,
        source: Endpoint,
        volumes: dict[str, list[VolumeId]],
        name: str,
        failed: dict[VolumeId, ReplicatorError],
    ) -> list[SnapshotRequest]:
        """What can be of one instant together, whatever its storages, and the rest by itself.

        :param volumes: by storage
        :param failed: gets those of storages that are not there
        """
        together: list[VolumeId] = []
        alone: list[VolumeId] = []
        for storage, group in volumes.items():
            try:
                atomic = Capability.ATOMIC_GROUP in source.storage(storage).capabilities
            except ReplicatorError as error:
                failed |= dict.fromkeys(group, error)
            else:
                (together if atomic else alone).extend(group)
        groups = [(*together,)] if together else []
        return [SnapshotRequest(group, name) for group in (*groups, *((volume,) for volume in alone))]

    def run(
        self, job: Job, volume: str | None, target: str | None, listen: Listener, cancel: Cancellation
    ) -> tuple[RunReport, ...]:
        """Snapshot, replicate, prune. Every failure is in the reports, one a task.

        :raises ReplicatorError: the volumes of the job cannot be listed, or there is no such volume or target
        """
        began = time.monotonic()
        tasks = self.tasks(job, volume, target)
        runs: dict[VolumeId, _VolumeRun] = {}
        for task in tasks:
            entry = runs.setdefault(task.pair.source_volume, _VolumeRun(task.pair.source_volume))
            entry.tasks.append(task)
        as_of = self._clock()
        try:
            self._snapshot_changed(job, runs, cancel)
        except ReplicatorError as error:  # a hook
            for entry in runs.values():
                entry.error = error
        if runs:
            listen(Note(f"job {job.name}: {_counted(runs.values())}"))
        reports: list[RunReport] = []
        for entry in runs.values():
            for task in entry.tasks:
                if task.key in entry.settled:
                    reports.append(self._settle(task, entry, as_of, time.monotonic() - began))
                    listen(reports[-1])
        waiting = [(task, entry) for entry in runs.values() for task in entry.tasks if task.key not in entry.settled]
        listing = RunListing([task.pair for task, entry in waiting if entry.error is None])
        with ThreadPoolExecutor(min(WORKERS, max(1, len(waiting))), thread_name_prefix=f"run-{job.name}") as pool:
            running: dict[Future[RunReport], Task] = {}
            while waiting or running:
                ready = ready_tasks([task for task, _ in waiting], running.values())
                for task, entry in [item for item in waiting if item[0].key in ready]:
                    running[pool.submit(self._run_task, task, entry, listing, listen, cancel)] = task
                waiting = [item for item in waiting if item[0].key not in ready]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    del running[future]
                    report = future.result()
                    listen(report)
                    reports.append(report)
        for entry in runs.values():
            if not entry.done:
                self._prune_source(job, entry)
        self._tidy(job, [entry for entry in runs.values() if entry.done], cancel)
        return tuple(reports)

    def _snapshot_changed(self, job: Job, runs: dict[VolumeId, _VolumeRun], cancel: Cancellation) -> None:
        """Snapshot what has changed; what has not is noted as settled.

        The snapshots of one run are those of one instant. So what was found unchanged before is looked at again once
        the others have theirs: if it is unchanged still, its newest snapshot is its data of that instant as well, and
        if not, all of them are taken again together. (That look finds everything that was written before the
        instant: see :meth:`~replicator.endpoint.Endpoint.heads`.)
        """
        primaries: set[VolumeId] = set()
        if _skips_unchanged(job):
            tasks = [task for entry in runs.values() for task in entry.tasks]
            heads = heads_of([task.pair for task in tasks])
            for task in tasks:
                source, target = (heads.get(place) for place in _places(task.pair))
                common = settled(source, target, _policy(task), task.pair.tag)
                if common is not None:
                    runs[task.pair.source_volume].settled[task.key] = common
                if source is not None and source.lineage is not None and source.lineage.role is Role.PRIMARY:
                    primaries.add(task.pair.source_volume)
        changed = [volume for volume, entry in runs.items() if not entry.quiet]
        failed = self.snapshot(job, changed, cancel, primaries)
        if changed and not self._still_quiet(job, runs):
            for entry in runs.values():
                entry.settled.clear()
            failed = self.snapshot(job, tuple(runs), cancel, primaries)
        for volume, error in failed.items():
            runs[volume].error = error

    def _still_quiet(self, job: Job, runs: dict[VolumeId, _VolumeRun]) -> bool:
        quiet = {volume: next(iter(entry.settled.values())) for volume, entry in runs.items() if entry.quiet}
        if not quiet:
            return True
        again = heads(self._network.endpoint(job.source.node), tuple(quiet))
        return all(
            (head := again.get(volume)) is not None
            and not head.changed
            and head.newest is not None
            and head.newest.guid == common.source.guid
            for volume, common in quiet.items()
        )

    def _settle(self, task: Task, entry: _VolumeRun, as_of: datetime, seconds: float) -> RunReport:
        """The report of a replica that lacked nothing when the run began."""
        common = entry.settled[task.key]
        entry.protect.add(common.source.guid)
        report = RunReport(
            task.job.name, task.key.volume, task.key.target, "ok", seconds, 0, 0, 0, snapshot=common.source.name
        )
        self._finish(task, report, as_of, common.source, as_of)
        return report

    def _run_task(
        self, task: Task, entry: _VolumeRun, listing: RunListing, listen: Listener, cancel: Cancellation
    ) -> RunReport:
        started, began = self._clock(), time.monotonic()
        report = RunReport(task.job.name, task.key.volume, task.key.target, "ok", 0.0, 0, 0, 0)
        replication = Replication(
            task.pair,
            self.options(task),
            observer=self._observer(task, listen),
            cancel=cancel,
            volumes=listing.volumes,
        )
        newest: Version | None = None
        try:
            if entry.error is not None:
                raise entry.error
            with (
                self._slot(task, cancel),
                self.tracker.running(task.key),
            ):
                began = time.monotonic()
                outcome = replication.run(listing.of(task.pair))
                newest = outcome.newest
                if newest is not None:
                    entry.protect |= {newest.guid, *outcome.origins}
                    self._prune_target(task, {newest.guid, *outcome.origins})
        except VolumeBusy as error:
            report = _failure(report, error, "skipped")
        except ReplicatorError as error:
            report = _failure(report, error, _outcome_of(error))
        except Exception as error:  # a defect in one task must not stop the others; it is logged in full
            LOG.exception("task failed unexpectedly")
            report = replace(report, outcome="failed", code="internal", message=f"internal error: {error!r}")
        finally:
            self._recorder.transfer_progress(task.key, None)
        if newest is None and entry.error is None and report.code != "peer_unreachable":
            entry.protect |= _needed(replication, task)
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

    def _finish(
        self,
        task: Task,
        report: RunReport,
        started: datetime,
        newest: Version | None,
        as_of: datetime | None = None,
    ) -> None:
        self.tracker.finished(task.key, report, self._clock())
        if newest is not None:
            self._seen(task.key, newest, 0, as_of)
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

    def _slot(self, task: Task, cancel: Cancellation) -> AbstractContextManager[None]:
        pair = task.pair
        pools = {
            pool for node, volume in _places(pair) if (pool := self._network.pool(node, volume.storage)) is not None
        }
        return self._slots.slot(task.key.volume, task.key.target, task.peer, cancel, pools=pools)

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
                    stack.enter_context(self._slot(task, cancel))
                except VolumeBusy:
                    if time.monotonic() > deadline:
                        raise
                    cancel.wait(BUSY_PAUSE)
                else:
                    break
            with self.tracker.running(task.key):
                yield

    def healed(self, task: Task, *, made_equal: bool) -> None:
        """A resync brought the replica into order: what stopped its runs no longer does.

        :param made_equal: nor does it differ any more, as far as that was known
        """
        self.tracker.recall(task.key, outcome="ok", message="", hint="", failures=0, last_sync=self._clock())
        if made_equal:
            self.tracker.recall(task.key, mismatch=None)

    # -- pruning

    def source_prune_request(self, job: Job, volume: VolumeId, tasks: Sequence[Task], *, dry_run: bool) -> PruneRequest:
        """The request that prunes the source: what every target of the job that answers has newest is protected."""
        protect: set[str] = set()
        for task in tasks:
            protect |= self.survey(task, sizes=False).protect
        return PruneRequest(volume, job.name, job.keep.source, tuple(sorted(protect)), dry_run=dry_run)

    def target_prune_request(self, task: Task, protect: Set[str], *, dry_run: bool) -> PruneRequest:
        """The request that prunes one replica."""
        return PruneRequest(
            task.pair.target_volume,
            task.job.name,
            task.job.keep.target,
            tuple(sorted(protect)),
            dry_run=dry_run,
        )

    def _prune_target(self, task: Task, protect: Set[str]) -> None:
        request = self.target_prune_request(task, protect, dry_run=False)
        self._prune(task.pair.target, request)

    def _prune_source(self, job: Job, entry: _VolumeRun) -> None:
        """Only what is common with a target that was reached now is known; for the others, their holds protect it."""
        if entry.error is not None:
            return
        request = PruneRequest(entry.volume, job.name, job.keep.source, tuple(sorted(entry.protect)))
        self._prune(self._network.endpoint(job.source.node), request)

    def _tidy(self, job: Job, entries: Sequence[_VolumeRun], cancel: Cancellation) -> None:
        """Prune volumes that do not change, now and then: what could not be destroyed when they last did, or what a
        changed policy no longer keeps."""
        requests: dict[Place, PruneRequest] = {}
        endpoints: dict[str, Endpoint] = {}
        for entry in entries:
            for task in entry.tasks:
                pair = task.pair
                theirs = self.target_prune_request(task, {entry.settled[task.key].target.guid}, dry_run=False)
                requests[pair.target.node, pair.target_volume] = theirs
                ours = PruneRequest(entry.volume, job.name, job.keep.source, tuple(sorted(entry.protect)))
                requests[pair.source.node, entry.volume] = ours
                endpoints |= {pair.source.node: pair.source, pair.target.node: pair.target}
        due = self._tidying.due(requests)
        if not due:
            return
        tasks = [task for entry in entries for task in entry.tasks if not due.isdisjoint(_places(task.pair))]
        states = states_of([task.pair for task in tasks])
        for task in tasks:
            source = states.get(_places(task.pair)[0])
            origins = origin_guids(source.state, _policy(task)) if source is not None and source.state else ()
            for place in _places(task.pair) if origins else ():
                protect = {*requests[place].protect, *origins}
                requests[place] = replace(requests[place], protect=tuple(sorted(protect)))
        for place in sorted(due):
            cancel.check()
            listing = states.get(place)
            if listing is not None and self._tidying.has_work(requests[place], listing.state):
                self._prune(endpoints[place[0]], requests[place])

    def _prune(self, endpoint: Endpoint, request: PruneRequest) -> None:
        """Prune after a run: a failure is logged and tried again by a later run, it does not undo the run."""
        self._tidying.done((endpoint.node, request.volume), request)
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


def _needed(replication: Replication, task: Task) -> frozenset[str]:
    """What a target that did not come forward still needs of the source, on both sides, as far as it can be asked: it
    may have lost the version that is held for it, and continue from an older one once somebody has said how."""
    try:
        _, source, target = replication.plan()
    except ReplicatorError:
        return frozenset()
    return protected_guids(source, (target,), _policy(task))


def _policy(task: Task) -> SendPolicy:
    job = task.job
    return SendPolicy(job.intermediates, job.name, job.foreign_snapshots, task.origins)


def _skips_unchanged(job: Job) -> bool:
    """Whether a volume that nobody wrote to gets no snapshot. Where hooks make the data consistent, nobody knows what
    is on the volume before they have run."""
    return job.quiesce is None and job.unchanged == "skip"


def _places(pair: Pair) -> tuple[Place, Place]:
    return (pair.source.node, pair.source_volume), (pair.target.node, pair.target_volume)


def _counted(entries: Iterable[_VolumeRun]) -> str:
    """How many volumes have a new snapshot, and how many need none."""
    quiet = [entry.quiet for entry in entries]
    taken = quiet.count(False)
    text = f"{taken} volume{'' if taken == 1 else 's'} snapshotted"
    return f"{text}, {quiet.count(True)} unchanged" if any(quiet) else text


def _ignore(_: Progress) -> None:
    pass


def _outcome_of(error: ReplicatorError) -> str:
    if isinstance(error, Cancelled):
        return "cancelled"
    conflicts = ("not_a_replica", "stale_epoch")
    return "conflict" if isinstance(error, ConflictError) or error.code in conflicts else "failed"


def _failure(report: RunReport, error: ReplicatorError, outcome: str) -> RunReport:
    return replace(report, outcome=outcome, message=str(error), hint=error.hint, code=error.code)
