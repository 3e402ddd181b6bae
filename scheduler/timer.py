"""APScheduler, adapted: our trigger, our job store with a heartbeat, our workers.

Only documented extension points are used (trigger, job store, executor). The rest of the package sees :class:`Timer`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

from apscheduler.events import EVENT_JOB_MAX_INSTANCES
from apscheduler.executors.base import BaseExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.jobstores.memory import MemoryJobStore
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger

from scheduler.timeline import Schedule

TICK = timedelta(seconds=1)
"""The scheduling thread wakes at least that often: to show that it is alive, and to notice that the clock was set."""

_STEP_BACK = -1.0  # seconds by which the clock must have been set back before we act


class _Trigger(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """Fires at the moments of a schedule.

    Moments already past are left out, so that one fire stands for all that were missed, at no cost however many.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def get_next_fire_time(self, previous_fire_time: datetime | None, now: datetime) -> datetime | None:
        after = now if previous_fire_time is None else max(previous_fire_time, now)
        return self._schedule.next_after(after)


class _JobStore(MemoryJobStore):  # type: ignore[misc]
    """Jobs in memory; tells of every turn of the scheduling thread, and has it turn at least every :data:`TICK`."""

    def __init__(self, turned: Callable[[datetime], None]) -> None:
        super().__init__()
        self._turned = turned

    def get_due_jobs(self, now: datetime) -> Any:
        self._turned(now)
        return super().get_due_jobs(now)

    def get_next_run_time(self) -> datetime:
        latest = datetime.now(UTC) + TICK
        due: datetime | None = super().get_next_run_time()
        return latest if due is None else min(due, latest)


class _Workers(BaseExecutor):  # type: ignore[misc]
    """Threads that run jobs. Unlike APScheduler's own it tells the job for when it was scheduled."""

    def __init__(self, size: int, run: Callable[[str, datetime], Callable[[], None]]) -> None:
        super().__init__()
        self._pool = ThreadPoolExecutor(size, thread_name_prefix="job")
        self._run = run

    def _do_submit_job(self, job: Any, run_times: list[datetime]) -> None:
        self._pool.submit(self._work, job.id, run_times[-1])

    def _work(self, name: str, scheduled: datetime) -> None:
        settle = self._run(name, scheduled)
        # First APScheduler learns that the run is over; else a next run at once would count as a second instance.
        self._run_job_success(name, [])
        settle()

    def shutdown(self, wait: bool = True) -> None:
        self._pool.shutdown(wait, cancel_futures=True)


class Timer:
    """Calls ``run(name, scheduled)`` in a worker thread when a job is due; at most one run of a name at once.

    :param run: must not raise; what it returns is called when the run no longer counts as running
    :param skipped: called from the scheduling thread with (name, scheduled) when a run was due while one was under way
    :param set_back: called from a thread of its own when the clock was set back: jobs are then armed too late
    """

    def __init__(
        self,
        workers: int,
        run: Callable[[str, datetime], Callable[[], None]],
        *,
        skipped: Callable[[str, datetime], None],
        set_back: Callable[[], None],
    ) -> None:
        self.last_turn = time.time()
        self._mark: tuple[float, float] | None = None
        self._set_back = set_back
        self._skipped = skipped
        logger = logging.getLogger("scheduler.apscheduler")
        logger.setLevel(logging.ERROR)  # it would warn of every skipped run; those are counted
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            logger=logger,
            jobstores={"default": _JobStore(self._turned)},
            executors={"default": _Workers(workers, run)},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        self._scheduler.add_listener(self._on_skipped, EVENT_JOB_MAX_INSTANCES)

    def start(self) -> None:
        """Start the scheduling thread."""
        self._scheduler.start()

    def stop(self) -> None:
        """Fire nothing any more; runs under way go on, those that had not begun do not begin."""
        self._scheduler.shutdown(wait=False)

    def arm(self, name: str, schedule: Schedule, moment: datetime | None) -> None:
        """Run ``name`` at ``moment`` (at once if that is past) and from then on by its schedule; None: not at all."""
        if moment is None:
            with suppress(JobLookupError):
                self._scheduler.remove_job(name)
            return
        self._scheduler.add_job(
            _nothing, _Trigger(schedule), id=name, name=name, next_run_time=moment, replace_existing=True
        )

    def armed(self, name: str) -> datetime | None:
        """When ``name`` fires next."""
        job = self._scheduler.get_job(name)
        moment: datetime | None = None if job is None else job.next_run_time
        return moment

    def _turned(self, now: datetime) -> None:
        # The job store's lock is held here: nothing may be called that waits for another lock.
        self.last_turn = now.timestamp()
        wall, steady = self.last_turn, time.monotonic()
        if self._mark is not None and (wall - self._mark[0]) - (steady - self._mark[1]) < _STEP_BACK:
            threading.Thread(target=self._set_back, name="clock-set-back", daemon=True).start()
        self._mark = (wall, steady)

    def _on_skipped(self, event: Any) -> None:
        for scheduled in event.scheduled_run_times:
            self._skipped(event.job_id, scheduled)


def _nothing() -> None:
    """What APScheduler believes to call; the workers call ``run`` by the job's name."""
