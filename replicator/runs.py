"""Runs jobs: snapshots the volumes, replicates each to each target, prunes both sides.

One run is a set of independent tasks (volume, target). A task that fails is reported and counted; it never stops the
others. Everything a run needs to know it reads from the storages. What happens in a run, in the order of its data::

    job ── tasks ── snapshotting ──┬─ settled: reported as they are ─────────────┬─ pruning of sources
                                   ├─ failed:  reported as failed                │  (tidying of what is settled)
                                   └─ the rest: task_runs, each when its turn is ┘
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from datetime import UTC, datetime, tzinfo

from replicator import logs
from replicator.cancellation import Cancellation
from replicator.control import Listener, Note, RunReport
from replicator.errors import HookFailed, ReplicatorError
from replicator.model import VolumeId
from replicator.planning import Common
from replicator.pruning import Pruner, source_request
from replicator.replication import Limits, Options, Pacer
from replicator.reporting import Recorder, Reporter
from replicator.run_hooks import after_run
from replicator.settings import Job
from replicator.settling import RunListing
from replicator.snapshotting import Snapshots, Snapshotted
from replicator.surveys import Surveys
from replicator.task_runs import Done, TaskRuns
from replicator.tasks import Network, Task, Tasks
from replicator.tracker import ReplicaKey, Tracker
from replicator.turns import Slots, Turns

LOG = logging.getLogger(__name__)

WORKERS = 16
"""Threads of a run for each target; how many transfers run at once is for the slots. Those that wait for a slow target
take none of another's."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


class Runner:
    """Runs the jobs of this node.

    :ivar tasks, surveys, snapshots, turns, tracker: what a run is made of, for those who do a part of it by themselves
    """

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
        reporter = Reporter(tracker, recorder, clock)
        self.tracker = tracker
        self.tasks = Tasks(network, reporter)
        self.surveys = Surveys(reporter, clock)
        self.snapshots = Snapshots(network, clock, recorder.event)
        self.turns = Turns(network, slots, tracker)
        self._network = network
        self._recorder = recorder
        self._limits = limits
        self._pacers = pacers
        self._clock = clock
        self._pruner = Pruner(zone)
        self._task_runs = TaskRuns(self.turns, self.surveys, self._pruner, reporter, options=self.options, clock=clock)

    def options(self, task: Task) -> Options:
        """How the task's job wants it, within this node's limits."""
        return task.options(self._limits, self._pacers(task.job, task.peer))

    def run(
        self, job: Job, volume: str | None, target: str | None, listen: Listener, cancel: Cancellation
    ) -> tuple[RunReport, ...]:
        """Snapshot, replicate, prune, and run the job's hook. Every failure is in the reports, one a task.

        :raises ReplicatorError: the volumes of the job cannot be listed, or there is no such volume or target
        """
        try:
            reports = self._run(job, volume, target, listen, cancel)
        except ReplicatorError as error:
            self._after_run(job, (), error)
            raise
        self._after_run(job, reports, None)
        return reports

    def _after_run(self, job: Job, reports: Sequence[RunReport], error: ReplicatorError | None) -> None:
        if job.after_run is None:
            return
        try:
            after_run(job.after_run, job.name, reports, error)
        except HookFailed as failure:
            logs.event(LOG, "error", "hook failed", job=job.name, hook="after_run", error=failure)
            self._recorder.event("hook failed", job.name, str(failure))

    def _run(
        self, job: Job, volume: str | None, target: str | None, listen: Listener, cancel: Cancellation
    ) -> tuple[RunReport, ...]:
        began = time.monotonic()
        tasks = self.tasks.of(job, volume, target)
        as_of = self._clock()
        taken = self.snapshots.take_changed(job, tasks, cancel)
        if tasks:
            listen(Note(f"job {job.name}: {_counted(tasks, taken)}"))
        done: dict[ReplicaKey, Done] = {}
        for task in tasks:
            if task.key in taken.settled:
                common = taken.settled[task.key]
                done[task.key] = self._task_runs.settled(task, common, as_of, time.monotonic() - began)
                listen(done[task.key].report)
        done |= self._run_others(job, tasks, taken, listen, cancel)
        self._prune(tasks, taken, done, cancel)
        return tuple(each.report for each in done.values())

    def _run_others(
        self, job: Job, tasks: Sequence[Task], taken: Snapshotted, listen: Listener, cancel: Cancellation
    ) -> dict[ReplicaKey, Done]:
        """Run the tasks that are not settled, those at once that may be; what came of each, as they ended."""
        done: dict[ReplicaKey, Done] = {}
        waiting = [task for task in tasks if task.key not in taken.settled]
        listing = RunListing([task.pair for task in waiting if task.pair.source_volume not in taken.failed])

        def run(task: Task) -> Done:
            error = taken.failed.get(task.pair.source_volume)
            if error is not None:
                return self._task_runs.failed(task, error)
            return self._task_runs.run(task, listing, listen, cancel)

        with ExitStack() as stack:
            pools = {
                target: stack.enter_context(ThreadPoolExecutor(min(WORKERS, number), f"run-{job.name}"))
                for target, number in Counter(task.key.target for task in waiting).items()
            }
            running: dict[Future[Done], Task] = {}
            while waiting or running:
                ready = ready_tasks(waiting, running.values())
                running |= {pools[task.key.target].submit(run, task): task for task in waiting if task.key in ready}
                waiting = [task for task in waiting if task.key not in ready]
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    done[task.key] = future.result()
                    listen(done[task.key].report)
        return done

    def _prune(
        self,
        tasks: Sequence[Task],
        taken: Snapshotted,
        done: Mapping[ReplicaKey, Done],
        cancel: Cancellation,
    ) -> None:
        """Prune the volumes of which something was to be brought over, and tidy up those that stand still.

        Only what is common with a target that was reached now is known; for the others, their holds protect it. Where
        the run was stopped, not even that was asked for, and the next run prunes.
        """
        settled: list[tuple[Task, Common]] = []
        for volume, of_it in _by_volume(tasks).items():
            if cancel.cancelled:
                return
            if all(task.key in taken.settled for task in of_it):
                settled += [(task, taken.settled[task.key]) for task in of_it]
            elif volume not in taken.failed:
                protect = frozenset[str]().union(*(done[task.key].protect for task in of_it))
                self._pruner.prune(of_it[0].pair.source, source_request(of_it[0], protect))
        self._pruner.tidy(settled, cancel)

    def healed(self, task: Task, *, made_equal: bool) -> None:
        """A resync brought the replica into order: what stopped its runs no longer does.

        :param made_equal: nor does it differ any more, as far as that was known
        """
        self.tracker.recall(task.key, outcome="ok", message="", hint="", failures=0, last_sync=self._clock())
        if made_equal:
            self.tracker.recall(task.key, mismatches=())


def ready_tasks(waiting: Sequence[Task], running: Iterable[Task]) -> frozenset[ReplicaKey]:
    """Those that may begin: a clone goes after what it is a clone of, target by target."""
    running = tuple(running)
    unfinished = {(str(task.pair.source_volume), task.key.target) for task in (*waiting, *running)}
    ready = frozenset(task.key for task in waiting if (str(task.origin), task.key.target) not in unfinished)
    if ready or running:
        return ready
    return frozenset(task.key for task in waiting)  # origins in a circle: no storage has that, a peer may say so


def _by_volume(tasks: Iterable[Task]) -> Mapping[VolumeId, Sequence[Task]]:
    found: dict[VolumeId, list[Task]] = {}
    for task in tasks:
        found.setdefault(task.pair.source_volume, []).append(task)
    return found


def _counted(tasks: Iterable[Task], taken: Snapshotted) -> str:
    """How many volumes have a new snapshot, and how many need none."""
    volumes = {task.pair.source_volume for task in tasks}
    quiet = {task.pair.source_volume for task in tasks if task.key in taken.settled}
    number = len(volumes - quiet)
    text = f"{number} volume{'' if number == 1 else 's'} snapshotted"
    return f"{text}, {len(quiet)} unchanged" if quiet else text
