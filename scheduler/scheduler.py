"""The scheduler: runs jobs by their schedules, catches up once after downtime, retries after failures.

What is decided when:

- A run that is due while the same job still runs is skipped and counted; the job runs again when it is next due.
- Runs missed while this program was down, the machine slept, or the job was paused are made up for by exactly one run.
- A failed run is tried again after the back-off or at the schedule, whichever is first (:mod:`scheduler.backoff`).
- Pauses survive restarts (:mod:`scheduler.state`).
- A clock that is set forward is noticed within a second and counts as sleep; one that is set back re-arms all jobs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum

from replicator.errors import Cancelled, ConflictError, ReplicatorError, UsageError
from scheduler.job import Job, JobState, Outcome
from scheduler.state import ScheduleStateStore
from scheduler.timeline import Schedule
from scheduler.timer import Timer

LOG = logging.getLogger(__name__)

DEFAULT_WORKERS = 32  # threads; a job that waits for a place among the transfers occupies one
SAVE_EVERY = 15.0  # seconds between writes of what only catch-up needs; pauses are written at once


class EventKind(StrEnum):
    """What happened to a job."""

    STARTED = "started"
    FINISHED = "finished"
    SKIPPED = "skipped"
    """Due while the run before was still under way."""
    MISSED = "missed"
    """Due while nobody could run it; a later run serves it too."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something happened to a job.

    :ivar scheduled: for when the run was scheduled (aware)
    :ivar lateness: seconds from then to the run's start; 0 for kinds other than started
    :ivar seconds: how long the run took; 0 for kinds other than finished
    :ivar count: how many runs were missed (at most 1000); 1 for other kinds
    """

    kind: EventKind
    job: str
    scheduled: datetime
    lateness: float = 0.0
    seconds: float = 0.0
    outcome: Outcome | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job as it is now.

    :ivar next_run: None: not by itself (paused, or its schedule has ended)
    :ivar running_since: None: no run is under way
    :ivar failures: failed runs in a row
    """

    name: str
    schedule: Schedule
    paused: bool
    next_run: datetime | None
    running_since: datetime | None
    failures: int


class Scheduler:
    """Runs jobs by their schedules. Thread-safe.

    :param store: where pauses and served schedules are kept
    :param observe: told of every event, in the thread where it happens; must not block, and should not raise
    :param workers: how many jobs may run at once
    :param clock: the present moment (aware). Decides what is late, missed and next; when to wake is up to APScheduler,
        which reads the machine's clock.
    """

    def __init__(
        self,
        store: ScheduleStateStore,
        *,
        observe: Callable[[Event], None] = lambda _: None,
        workers: int = DEFAULT_WORKERS,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._observe = observe
        self._clock = clock
        # Taken before APScheduler's own locks, never while one of them is held: see Timer._turned.
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._jobs: dict[str, Job] = {}
        self._running: set[str] = set()
        self._started = False
        self._stopping = threading.Event()
        self._unsaved = False
        self._saving = threading.Lock()
        self._saver: threading.Thread | None = None
        self._timer = Timer(workers, self._run, skipped=self._skipped, set_back=self._clock_set_back)
        self._states = self._load()

    # -- jobs

    def add(self, name: str, schedule: Schedule, function: Callable[[], Outcome]) -> None:
        """Run ``function`` by ``schedule``; its outcome decides when it runs next.

        An exception counts by what it is: ConflictError as conflict, Cancelled as cancelled, any other as failed.
        A job of this name that was paused, or due, before the program was restarted, still is.

        :raises ValueError: there is a job of that name
        """
        with self._lock:
            if name in self._jobs:
                raise ValueError(f"there is a job {name!r} already")
            state = self._states.get(name, JobState())
            if state.served is None:
                state = replace(state, served=self._clock())
            job = Job(name, schedule, function, state)
            self._jobs[name] = job
            self._keep(job)
            if self._started:
                self._arm_first(job)

    def remove(self, name: str) -> None:
        """Do not run it any more; a run under way goes on. Its pause is remembered, should it be added again.

        :raises UsageError: there is no such job
        """
        with self._lock:
            job = self._job(name)
            del self._jobs[name]
            self._timer.arm(name, job.schedule, None)

    def pause(self, name: str) -> None:
        """Do not run it by itself until it is resumed, over restarts too; a run under way goes on.

        :raises UsageError: there is no such job
        :raises ReplicatorError: the pause holds, but could not be saved
        """
        with self._lock:
            job = self._job(name)
            job.state = replace(job.state, paused=True)
            job.asked = False
            self._keep(job)
            self._timer.arm(name, job.schedule, None)
        self._save()

    def resume(self, name: str) -> None:
        """Run it by its schedule again: at once if a run was missed during the pause.

        :raises UsageError: there is no such job
        :raises ReplicatorError: it is resumed, but that could not be saved
        """
        with self._lock:
            job = self._job(name)
            if not job.state.paused:
                return
            job.state = replace(job.state, paused=False)
            self._keep(job)
            if self._started and job.begun is None:
                self._arm_first(job)
        self._save()

    def run_now(self, name: str) -> bool:
        """Run it now, even if it is paused.

        :return: False if a run is under way: another then follows at its end
        :raises UsageError: there is no such job
        """
        with self._lock:
            job = self._job(name)
            job.asked = True
            if job.begun is not None:
                return False
            self._timer.arm(name, job.schedule, self._clock())
            return True

    def paused(self, name: str) -> bool:
        """Whether it is paused; a job that was never added is not."""
        with self._lock:
            job = self._jobs.get(name)
            return job is not None and job.state.paused

    def next_run(self, name: str) -> datetime | None:
        """When it runs next, in UTC; None: not by itself, as a job that was never added."""
        with self._lock:
            job = self._jobs.get(name)
            return None if job is None else self._next_run(job)

    def jobs(self) -> tuple[JobStatus, ...]:
        """All jobs, by name."""
        with self._lock:
            return tuple(
                JobStatus(name, job.schedule, job.state.paused, self._next_run(job), job.begun, job.failures)
                for name, job in sorted(self._jobs.items())
            )

    # -- life

    @property
    def last_tick(self) -> float:
        """When the scheduling thread last came round, as Unix time: the heartbeat. It does so every second."""
        return self._timer.last_turn

    def start(self) -> None:
        """Begin to run jobs; those that were due while nothing ran, once now."""
        with self._lock:
            self._started = True
            self._timer.start()
            for job in self._jobs.values():
                self._arm_first(job)
        self._saver = threading.Thread(target=self._save_regularly, name="schedule-state", daemon=True)
        self._saver.start()

    def stop(self, deadline: float) -> tuple[str, ...]:
        """Begin no more runs, and wait for those under way at most ``deadline`` seconds.

        Whoever wants them to end early tells them so before (:class:`~replicator.cancellation.Cancellation`).

        :return: the names of the jobs that still run
        """
        with self._lock:
            running, self._started = self._started, False
            self._stopping.set()
        if running:
            self._timer.stop()
        with self._idle:
            self._idle.wait_for(lambda: not self._running, deadline)
            left = tuple(sorted(self._running))
        if self._saver is not None:
            self._saver.join(deadline)
        self._save_or_log()
        return left

    # -- runs

    def _run(self, name: str, scheduled: datetime) -> Callable[[], None]:
        """Run a job, in a worker thread; what is returned is to be called when it no longer counts as running."""
        now = self._clock()
        with self._lock:
            job = self._jobs.get(name)
            asked = job is not None and job.asked
            if job is None or self._stopping.is_set():
                return _settled
            if not job.begin(now):
                # Paused after the timer fired, or the run before is over but not settled.
                if job.begun is not None:
                    self._emit(Event(EventKind.SKIPPED, name, scheduled))
                return _settled
            self._running.add(name)
        self._emit(Event(EventKind.STARTED, name, scheduled, lateness=max((now - scheduled).total_seconds(), 0.0)))
        missed = 0 if asked else job.missed(scheduled, now)
        if missed:
            self._emit(Event(EventKind.MISSED, name, scheduled, count=missed))
        began = time.monotonic()
        outcome = self._call(job)
        seconds = time.monotonic() - began
        self._emit(Event(EventKind.FINISHED, name, scheduled, seconds=seconds, outcome=outcome))
        return lambda: self._settle(job, outcome)

    def _call(self, job: Job) -> Outcome:
        try:
            return job.function()
        except Cancelled:
            return Outcome.CANCELLED
        except ConflictError as error:
            LOG.error("job %s: %s (%s)", job.name, error, error.hint)
            return Outcome.CONFLICT
        except ReplicatorError as error:
            LOG.error("job %s: %s (%s)", job.name, error, error.hint)
            return Outcome.FAILED
        except Exception:  # a defect in one job must not end the schedule of any
            LOG.exception("job %s failed unexpectedly", job.name)
            return Outcome.FAILED

    def _settle(self, job: Job, outcome: Outcome) -> None:
        with self._idle:
            following = job.end(outcome, self._clock())
            self._running.discard(job.name)
            self._idle.notify_all()
            if self._jobs.get(job.name) is not job:  # removed meanwhile, or replaced by another of that name
                return
            self._keep(job)
            if not self._stopping.is_set():
                self._timer.arm(job.name, job.schedule, following)

    def _skipped(self, name: str, scheduled: datetime) -> None:
        with self._lock:
            job = self._jobs.get(name)
            if job is None or job.state.paused:
                return
        self._emit(Event(EventKind.SKIPPED, name, scheduled))

    def _arm_first(self, job: Job) -> None:
        now = self._clock()
        first = now if job.asked else job.first_run(now)
        if first is not None and first <= now and not job.asked and job.state.served is not None:
            missed = job.missed(job.state.served, now)
            self._emit(Event(EventKind.MISSED, job.name, job.state.served, count=missed))
        self._timer.arm(job.name, job.schedule, first)

    def _clock_set_back(self) -> None:
        """All jobs are armed for moments that are now too far ahead: a schedule would stand still for that long."""
        LOG.warning("the clock was set back: all jobs are scheduled anew")
        with self._lock:
            for job in self._jobs.values():
                armed = self._timer.armed(job.name)
                if armed is None or self._stopping.is_set():
                    continue
                following = job.following(Outcome.FAILED if job.failures else Outcome.DONE, self._clock())
                if following is not None and following < armed:
                    self._timer.arm(job.name, job.schedule, following)

    def _emit(self, event: Event) -> None:
        try:
            self._observe(event)
        except Exception:  # a defect in what watches must not end what is watched
            LOG.exception("observer of the scheduler failed")

    # -- the jobs' state

    def _job(self, name: str) -> Job:
        job = self._jobs.get(name)
        if job is None:
            known = ", ".join(sorted(self._jobs)) or "none"
            raise UsageError(f"there is no job {name!r}", hint=f"the jobs are: {known}")
        return job

    def _next_run(self, job: Job) -> datetime | None:
        if job.state.paused and not job.asked:
            return None
        if not self._started:
            return job.first_run(self._clock())
        return self._timer.armed(job.name)

    def _keep(self, job: Job) -> None:
        if self._states.get(job.name) != job.state:
            self._states[job.name] = job.state
            self._unsaved = True

    def _load(self) -> dict[str, JobState]:
        try:
            return self._store.load()
        except ReplicatorError as error:
            LOG.error("%s (%s)", error, error.hint)
        except Exception:  # whatever a store raises: schedules run, if without their pauses
            LOG.exception("the state of the schedules cannot be read")
        return {}

    def _save(self) -> None:
        with self._saving:  # one after the other, or an older state could replace a newer one
            with self._lock:
                if not self._unsaved:
                    return
                states = dict(self._states)
                self._unsaved = False
            try:
                self._store.save(states)
            except BaseException:
                self._unsaved = True
                raise

    def _save_or_log(self) -> None:
        try:
            self._save()
        except ReplicatorError as error:
            LOG.error("%s (%s)", error, error.hint)
        except Exception:  # whatever a store raises: it is tried again
            LOG.exception("the state of the schedules cannot be saved")

    def _save_regularly(self) -> None:
        while not self._stopping.wait(SAVE_EVERY):
            self._save_or_log()


def _settled() -> None:
    """Nothing is left to do after a run that did not begin."""
