"""The engine: :class:`~replicator.control.Control` in the process that does the work.

The daemon has one for as long as it runs; the command line makes one for a single command where no daemon runs. It
adds nothing to what :mod:`replicator.runs`, :mod:`replicator.verification` and the endpoints can do: it finds the
tasks that a request means, calls them, and says what came of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from typing import Protocol

from replicator import leftovers, logs, mismatches
from replicator.cancellation import Cancellation
from replicator.config import Config
from replicator.control import (
    CopyStatus,
    Finding,
    HistoryEntry,
    Listener,
    Orphan,
    OrphanReport,
    PeerStatus,
    PlannedReplica,
    PlannedStep,
    PruneReport,
    ReplicaStatus,
    Restored,
    ResyncPreview,
    RoleOrder,
    RolePreview,
    RoleReport,
    RunReport,
    SideSnapshots,
    State,
    Status,
)
from replicator.endpoint import Endpoint, PruneOutcome, PruneRequest
from replicator.errors import NoSuchVolume, ReplicatorError, UsageError
from replicator.mending import Mender, Results
from replicator.model import (
    Progress,
    VolumeId,
    VolumeInfo,
    snapshot_name,
)
from replicator.orphans import examine, find_orphans, remove
from replicator.pruning import source_request, target_request
from replicator.restoring import Place, Restores, restore
from replicator.role_changes import RoleChanger
from replicator.runs import Runner
from replicator.settings import Job
from replicator.surveys import Survey
from replicator.tasks import Network, Task
from replicator.tracker import Replica, ReplicaKey
from replicator.verification import Resync, Verification
from replicator.version import version

LOG = logging.getLogger(__name__)


class Timetable(Protocol):
    """What runs by itself, and when (see ``scheduler``)."""

    def next_run(self, job: str) -> datetime | None:
        """When the job runs next; None: not by itself."""

    def paused(self, job: str) -> bool:
        """Whether the operator paused it."""

    def pause(self, job: str) -> None:
        """Not by itself any more, durably."""

    def resume(self, job: str) -> None:
        """By itself again, durably."""


class Nodes(Network, Protocol):
    """The network, and what is known of the peers."""

    @property
    def role_changes(self) -> int:
        """How often the role of a copy on this node was changed, whoever asked for it."""

    def peers(self, *, probe: bool) -> tuple[PeerStatus, ...]:
        """Every configured peer; with ``probe`` each is asked now."""


class Memory(Results, Protocol):
    """What happened (see ``replicator.history``)."""

    def entries(self, limit: int) -> tuple[HistoryEntry, ...]:
        """Newest first."""

    def event(self, kind: str, subject: str, message: str = "") -> None:
        """Something worth remembering."""

    def recall(self, key: ReplicaKey) -> dict[str, object]:
        """Fields of :class:`~replicator.tracker.Replica` as the history has them."""


class Engine:
    """See :class:`~replicator.control.Control` for every method's contract."""

    def __init__(
        self,
        config: Config,
        nodes: Nodes,
        runner: Runner,
        timetable: Timetable,
        memory: Memory,
        *,
        daemon: bool,
        check: Callable[[], tuple[Finding, ...]],
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._config = config
        self._nodes = nodes
        self._runner = runner
        self._tracker = runner.tracker
        self._timetable = timetable
        self._memory = memory
        self._mender = Mender(runner, memory)
        self._daemon = daemon
        self._check = check
        self._clock = clock
        self._roles = RoleChanger(config, nodes, runner, memory, clock=clock)
        self._copies: tuple[int, tuple[CopyStatus, ...]] = (0, ())
        self._orphans: dict[str, tuple[Orphan, ...]] = {}
        self.restores = Restores()

    # -- finding what a request means

    def _job(self, name: str) -> Job:
        job = self._config.jobs.get(name)
        if job is None:
            known = ", ".join(sorted(self._config.jobs))
            hint = f"its jobs are: {known}" if known else "it has none: add a [job.NAME]"
            raise UsageError(f"there is no job {name!r} in {self._config.path}", hint=hint)
        return job

    def _jobs(self, name: str | None = None) -> tuple[Job, ...]:
        return (self._job(name),) if name is not None else tuple(self._config.jobs.values())

    def _tasks_of(self, volume: str, target: str | None) -> tuple[Task, ...]:
        """The tasks of every job that replicates ``volume`` (to ``target``)."""
        found: list[Task] = []
        for job in self._jobs():
            with suppress(NoSuchVolume, UsageError):
                found.extend(self._runner.tasks.of(job, volume, target))
        if not found:
            where = f" to {target}" if target else ""
            raise NoSuchVolume(
                f"no job replicates a volume {volume}{where}",
                hint="`replicator status` lists volumes and targets; add the volume to a job's source",
            )
        return tuple(found)

    # -- status

    def refresh(self) -> None:
        """List all volumes and replicas anew. A job whose source does not answer keeps what was known."""
        self._look_at_roles()
        for job in self._jobs():
            try:
                tasks = self._runner.tasks.of(job)
            except ReplicatorError as error:
                LOG.warning("job %s: %s", job.name, error)
                for replica in self._tracker.all():
                    if replica.key.job == job.name:
                        self._tracker.problem(replica.key, "failed", str(error), error.hint)
                continue
            self._look_for_orphans(job, tasks)
            for task in tasks:
                self._remember(task)
            self._runner.surveys.of_all(tasks)

    def _remember(self, task: Task) -> None:
        """Fill in what the history knows of a replica that this process has not seen a run of; and in any case what
        was found to differ in it."""
        replica = self._tracker.get(task.key)
        if replica.last_run and replica.mismatches is not None:
            return
        facts = self._memory.recall(task.key)
        if replica.mismatches is not None:  # what this process found since, even where it could not be written
            facts.pop("mismatches", None)
        if replica.last_run:
            facts = {name: fact for name, fact in facts.items() if name == "mismatches"}
        self._tracker.recall(task.key, **facts)

    def _look_for_orphans(self, job: Job, tasks: Sequence[Task]) -> None:
        """Replicas whose sources are gone. Of a target that does not answer, what was known stays."""
        present = frozenset(task.volume for task in tasks)
        known = self._orphans.get(job.name, ())
        found: list[Orphan] = []
        for target in job.targets:
            try:
                listed = self._nodes.endpoint(target.node, job).volumes(target.storage)
            except ReplicatorError:
                found += [orphan for orphan in known if orphan.target == str(target)]
            else:
                found += find_orphans(job, target, present, listed)
        self._orphans[job.name] = tuple(found)

    def _look_at_roles(self) -> None:
        """The copies that this node has. A storage that is not there has none."""
        as_of = self._nodes.role_changes
        own = self._nodes.endpoint(self._nodes.node)
        found: list[CopyStatus] = []
        for storage in self._config.storages:
            with suppress(ReplicatorError):
                found += [_copy(volume) for volume in own.volumes(storage) if volume.lineage is not None]
        self._copies = as_of, tuple(found)

    def preview_role(self, order: RoleOrder) -> RolePreview:
        """See Control."""
        return self._roles.preview(order)

    def change_role(self, order: RoleOrder, listen: Listener, cancel: Cancellation) -> RoleReport:
        """See Control."""
        return self._roles.change(order, listen, cancel)

    def status(self) -> Status:
        """See Control."""
        if not self._daemon:
            self.refresh()
        elif self._copies[0] != self._nodes.role_changes:
            self._look_at_roles()
        return Status(
            self._config.node.name,
            version(),
            self._daemon,
            self._clock(),
            tuple(self._row(replica) for replica in self._tracker.all()),
            self._nodes.peers(probe=False),
            tuple(orphan for name in sorted(self._orphans) for orphan in self._orphans[name]),
            self._copies[1],
        )

    def _row(self, replica: Replica) -> ReplicaStatus:
        job = self._config.jobs.get(replica.key.job)
        now = self._clock()
        newest = replica.newest
        lag = replica.lag(now)
        objective = job.max_lag.total_seconds() if job is not None and job.max_lag else None
        paused = self._timetable.paused(replica.key.job)
        return ReplicaStatus(
            replica.key.job,
            replica.key.volume,
            replica.key.target,
            _state(replica, lag, objective, paused),
            lag,
            objective,
            replica.last_sync,
            self._timetable.next_run(replica.key.job),
            replica.duration,
            replica.done,
            replica.sent,
            replica.failures,
            paused=paused,
            snapshot=newest.name if newest else "",
            message=replica.message or mismatches.told(replica.mismatches or ()),
            hint=replica.hint
            if replica.message or not replica.mismatches
            else mismatches.ways_out(replica.key.volume, replica.key.target, replica.mismatches),
            progress=replica.progress,
            differing=replica.mismatches[-1].differing if replica.mismatches else 0,
        )

    # -- planning

    def plan(self, job: str | None) -> tuple[PlannedReplica, ...]:
        """See Control."""
        found: list[PlannedReplica] = []
        for item in self._jobs(job):
            tasks = self._runner.tasks.of(item)
            surveys = self._runner.surveys.of_all(tasks)
            protect: dict[VolumeId, frozenset[str]] = {}
            for task in tasks:
                volume = task.pair.source_volume
                protect[volume] = protect.get(volume, frozenset()) | (surveys[task.key].protect or frozenset())
            for task in tasks:
                planned = self._planned(task, surveys[task.key])
                mine = protect.pop(task.pair.source_volume, None) if not planned.conflict else None
                if mine is not None:  # of all targets together, with the first that can be replicated to
                    planned = replace(planned, source_prunes=self._source_prunes(task, mine))
                found.append(planned)
        return tuple(found)

    def _planned(self, task: Task, survey: Survey) -> PlannedReplica:
        key = task.key
        name = snapshot_name(key.job, self._clock()).rpartition("_")[0]
        first = (
            "takes no snapshot: nothing was written since the newest"
            if survey.quiet
            else f"first takes the snapshot {name}_<now>"
        )
        notes: tuple[str, ...] = (first,)
        if survey.error is not None or survey.plan is None:
            error = survey.error
            kind = getattr(error, "kind", "") or (error.code if error else "")
            return PlannedReplica(
                key.job,
                key.volume,
                key.target,
                (),
                conflict=str(error),
                conflict_kind=kind,
                hint=error.hint if error else "",
            )
        notes = (*notes, *survey.plan.notes)
        if survey.plan.stale_resume is not None:
            notes = (*notes, survey.plan.stale_resume.message)
        steps = tuple(
            PlannedStep(
                step.base.name if step.base else None,
                step.to.name,
                size,
                step.resume.offset if step.resume else None,
            )
            for step, size in zip(survey.plan.steps, survey.sizes, strict=True)
        )
        return PlannedReplica(key.job, key.volume, key.target, steps, (), self._target_prunes(task, survey), notes)

    def _source_prunes(self, task: Task, protect: frozenset[str]) -> tuple[PruneOutcome, ...]:
        ours = source_request(task, protect, dry_run=True)
        return tuple(outcome for outcome in task.pair.source.prune(ours) if not outcome.kept)

    def _target_prunes(self, task: Task, survey: Survey) -> tuple[PruneOutcome, ...]:
        if survey.common is None or survey.protect is None:
            return ()
        theirs = target_request(task, survey.protect, dry_run=True)
        if survey.plan is not None and survey.plan.renamed is not None:
            theirs = replace(theirs, volume=survey.plan.renamed)  # it has its new name only once a run has begun
        return tuple(outcome for outcome in task.pair.target.prune(theirs) if not outcome.kept)

    # -- running

    def sync(
        self, job: str, volume: str | None, target: str | None, listen: Listener, cancel: Cancellation
    ) -> tuple[RunReport, ...]:
        """See Control."""
        item = self._job(job)
        before = {replica.key for replica in self._tracker.all() if replica.key.job == job}
        reports = self._runner.run(item, volume, target, listen, cancel)
        if self._orphans.get(job) or before - {replica.key for replica in self._tracker.all()}:
            with suppress(ReplicatorError):
                self._look_for_orphans(item, self._runner.tasks.of(item))
        return reports

    def job_failed(self, job: str, error: ReplicatorError) -> None:
        """A whole run failed before its tasks were known: every replica of the job is shown as failed."""
        for replica in self._tracker.all():
            if replica.key.job == job:
                self._tracker.failed(replica.key, str(error), error.hint)

    def preview_resync(self, volume: str, target: str | None, full: bool) -> tuple[ResyncPreview, ...]:
        """See Control."""
        previews = []
        for task in self._tasks_of(volume, target):
            self._remember(task)
            effects = tuple(self._mender.effects(task, full))
            previews.append(ResyncPreview(task.key.volume, task.key.target, effects))
        return tuple(previews)

    def resync(
        self, volume: str, target: str | None, full: bool, listen: Listener, cancel: Cancellation
    ) -> tuple[Resync, ...]:
        """See Control."""
        results = []
        for task in self._tasks_of(volume, target):
            self._remember(task)
            results.append(self._mender.resync(task, full, listen, cancel))
        return tuple(results)

    def verify(
        self,
        volume: str,
        target: str | None,
        snapshot: str | None,
        repair: bool,
        scrub: bool,
        listen: Listener,
        cancel: Cancellation,
    ) -> tuple[Verification, ...]:
        """See Control."""
        results = []
        for task in self._tasks_of(volume, target):
            self._remember(task)
            results.append(self._mender.verify(task, snapshot, repair, listen, cancel, scrub=scrub))
        return tuple(results)

    def verify_job(self, job: str, cancel: Cancellation) -> tuple[Verification, ...]:
        """Verify all replicas of a job, as its ``verify`` schedule wants; a failure of one does not stop the others."""
        results = []
        for task in self._runner.tasks.of(self._job(job)):
            self._remember(task)
            try:
                results.append(self._mender.verify(task, None, False, lambda _: None, cancel))
            except ReplicatorError as error:
                LOG.warning("verification of %s on %s failed: %s", task.key.volume, task.key.target, error)
                self._tracker.problem(task.key, "failed", f"verification failed: {error}", error.hint)
        return tuple(results)

    # -- snapshots

    def snapshots(self, volume: str) -> tuple[SideSnapshots, ...]:
        """See Control."""
        places: dict[tuple[str, VolumeId], Endpoint] = {}
        with suppress(NoSuchVolume):
            for task in self._tasks_of(volume, None):
                pair = task.pair
                places.setdefault((pair.source.node, pair.source_volume), pair.source)
                places.setdefault((pair.target.node, pair.target_volume), pair.target)
        if not places:
            own = self._nodes.endpoint(self._nodes.node)
            places[own.node, VolumeId.parse(volume)] = own
        sides = tuple(self._side(endpoint, where) for (_, where), endpoint in places.items())
        if all(side.versions is None and not side.message for side in sides):
            raise NoSuchVolume(f"there is no volume {volume}", hint="`replicator status` lists the volumes of each job")
        return sides

    def _side(self, endpoint: Endpoint, volume: VolumeId) -> SideSnapshots:
        try:
            state = endpoint.state(volume)
        except ReplicatorError as error:
            return SideSnapshots(endpoint.node, str(volume), "", None, None, message=str(error))
        if state is None:
            return SideSnapshots(endpoint.node, str(volume), "", None, None)
        partial = f"{state.resume.to_name} at byte {state.resume.offset}" if state.resume else ""
        lineage = state.lineage
        own = leftovers.find(state, self._config) if endpoint.node == self._config.node.name else ()
        return SideSnapshots(
            endpoint.node,
            str(volume),
            str(lineage.role) if lineage else "",
            lineage.epoch if lineage else None,
            state.versions,
            partial,
            "somebody wrote to it: it has live data that no snapshot has" if state.head_changed else "",
            tuple(f"{found.version.name} is protected for nothing by {found.tag}: {found.why}" for found in own),
        )

    def prune(self, job: str, dry_run: bool) -> tuple[PruneReport, ...]:
        """See Control."""
        item = self._job(job)
        by_volume: dict[VolumeId, list[Task]] = {}
        for task in self._runner.tasks.of(item):
            by_volume.setdefault(task.pair.source_volume, []).append(task)
        reports = []
        for tasks in by_volume.values():
            request = source_request(tasks[0], self._runner.surveys.protected(tasks), dry_run=dry_run)
            reports.append(_pruned(tasks[0].pair.source, request))
            for task in tasks:
                try:
                    survey = self._runner.surveys.of(task, sizes=False)
                    if survey.protect is None and survey.error is not None:
                        raise survey.error  # what the target needs is not known
                    theirs = target_request(task, survey.protect or frozenset(), dry_run=dry_run)
                    if task.pair.target.state(task.pair.target_volume) is None:
                        continue
                except ReplicatorError as error:
                    where = task.pair
                    reports.append(PruneReport(where.target.node, str(where.target_volume), (), str(error)))
                    continue
                reports.append(_pruned(task.pair.target, theirs))
        return tuple(reports)

    def orphans(self, job: str) -> tuple[OrphanReport, ...]:
        """See Control."""
        item = self._job(job)
        self._look_for_orphans(item, self._runner.tasks.of(item))
        source = self._nodes.endpoint(item.source.node, item)
        found = self._orphans[item.name]
        return tuple(examine(each, source, self._orphan_at(item, each)) for each in found)

    def remove_orphans(self, job: str, wanted: tuple[OrphanReport, ...]) -> tuple[OrphanReport, ...]:
        """See Control."""
        item = self._job(job)
        tasks = self._runner.tasks.of(item)
        self._look_for_orphans(item, tasks)
        source = self._nodes.endpoint(item.source.node, item)
        reports = []
        for each in wanted:
            if each.orphan not in self._orphans[item.name]:
                reports.append(replace(each, kept="it is no orphan of this job (any more)"))
                continue
            reports.append(remove(each, source, self._orphan_at(item, each.orphan)))
            fields = {"job": job, "replica": each.orphan.replica, "target": each.orphan.target}
            logs.event(LOG, "info", "orphan removed" if reports[-1].gone else "orphan kept", **fields)
        self._look_for_orphans(item, tasks)
        return tuple(reports)

    def _orphan_at(self, job: Job, orphan: Orphan) -> Endpoint:
        return self._nodes.endpoint(orphan.target.partition(":")[0], job)

    def restore(self, snapshot: str, to: str, listen: Listener, cancel: Cancellation) -> Restored:
        """See Control."""
        text, at, name = snapshot.rpartition("@")
        if not at:
            raise UsageError(f"{snapshot!r} names no snapshot", hint="write it as STORAGE:NAME@SNAPSHOT")
        new = VolumeId.parse(to)
        own = self._nodes.endpoint(self._nodes.node)
        places: list[Place] = []
        with suppress(UsageError, ReplicatorError):
            places.append(Place(own, VolumeId.parse(text)))
        for job in self._jobs():
            places += [Place(*copy) for copy in self._runner.tasks.copies(job, text)]

        def observe(progress: Progress) -> None:
            listen(progress)

        with self.restores.under_way():
            return restore(tuple(dict.fromkeys(places)), name, own, new, observer=observe, cancel=cancel)

    # -- the rest

    def history(self, limit: int) -> tuple[HistoryEntry, ...]:
        """See Control."""
        return self._memory.entries(limit)

    def pause(self, job: str) -> None:
        """See Control."""
        self._timetable.pause(self._job(job).name)

    def resume(self, job: str) -> None:
        """See Control."""
        self._timetable.resume(self._job(job).name)

    def check(self) -> tuple[Finding, ...]:
        """See Control."""
        return self._check()


def _copy(volume: VolumeInfo) -> CopyStatus:
    if volume.lineage is None:
        raise AssertionError  # only copies are asked for
    return CopyStatus(str(volume.id), str(volume.lineage.role), volume.lineage.epoch)


def _pruned(endpoint: Endpoint, request: PruneRequest) -> PruneReport:
    try:
        return PruneReport(endpoint.node, str(request.volume), endpoint.prune(request))
    except ReplicatorError as error:
        return PruneReport(endpoint.node, str(request.volume), (), str(error))


def _state(replica: Replica, lag: float | None, objective: float | None, paused: bool) -> State:
    if replica.progress is not None:
        return State.RUNNING
    if replica.outcome == "conflict":
        return State.CONFLICT
    if replica.outcome == "failed" or replica.mismatches:
        return State.FAILED
    if paused:
        return State.PAUSED
    if replica.newest is None:
        return State.NEVER
    if objective is not None and lag is not None and lag > objective:
        return State.LAGGING
    return State.OK
