"""The scheduler with APScheduler under it: real threads, waited for by events with deadlines."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from replicator.errors import Cancelled, ConflictError, DamagedData, StorageUnavailable, UsageError
from scheduler.job import JobState, Outcome
from scheduler.schedule import Interval, Schedule, parse_schedule
from scheduler.scheduler import Event, EventKind, Scheduler
from scheduler.state import FileStateStore, ScheduleStateStore

DEADLINE = 20.0
DAILY = parse_schedule("daily", UTC)
OFTEN = Interval("", UTC, timedelta(milliseconds=20))  # below what can be configured, so that tests need not wait


class MemoryStore:
    """States in memory; fails on demand."""

    def __init__(self, states: Mapping[str, JobState] | None = None) -> None:
        self.states = dict(states or {})
        self.error: Exception | None = None

    def load(self) -> dict[str, JobState]:
        if self.error is not None:
            raise self.error
        return dict(self.states)

    def save(self, states: Mapping[str, JobState]) -> None:
        if self.error is not None:
            raise self.error
        self.states = dict(states)


class Events:
    """Hands out the scheduler's events in the order they came."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Event] = queue.Queue()
        self.seen: list[Event] = []

    def __call__(self, event: Event) -> None:
        self._queue.put(event)

    def wait(self, kind: EventKind, job: str | None = None) -> Event:
        """The next event of a kind; those before it are only remembered."""
        while True:
            event = self._queue.get(timeout=DEADLINE)
            self.seen.append(event)
            if event.kind is kind and job in (None, event.job):
                return event


class Work:
    """A job's function that a test steers."""

    def __init__(self, outcome: Outcome | Exception = Outcome.DONE) -> None:
        self.outcome = outcome
        self.calls = 0
        self.began = threading.Semaphore(0)
        self.may_end = threading.Semaphore(0)

    def __call__(self) -> Outcome:
        self.calls += 1
        self.began.release()
        assert self.may_end.acquire(timeout=DEADLINE)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def wait_began(self) -> None:
        assert self.began.acquire(timeout=DEADLINE)


@dataclass
class Bench:
    """Makes schedulers that are stopped at the end of the test."""

    made: list[tuple[Scheduler, list[Work]]]
    store: MemoryStore
    events: Events

    def scheduler(
        self, store: ScheduleStateStore | None = None, clock: Callable[[], datetime] | None = None
    ) -> Scheduler:
        options = {} if clock is None else {"clock": clock}
        scheduler = Scheduler(store or self.store, observe=self.events, workers=4, **options)
        self.made.append((scheduler, []))
        return scheduler

    def work(self, outcome: Outcome | Exception = Outcome.DONE) -> Work:
        work = Work(outcome)
        self.made[-1][1].append(work)
        return work


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench([], MemoryStore(), Events())
    yield made
    for scheduler, works in made.made:
        for work in works:
            work.may_end.release(100)
        assert scheduler.stop(DEADLINE) == ()


def now() -> datetime:
    return datetime.now(UTC)


def seen(condition: Callable[[], bool]) -> bool:
    """Whether the condition comes true before the deadline."""
    pause = threading.Event()
    return any(condition() or pause.wait(0.005) for _ in range(int(DEADLINE / 0.005)))


def test_runs_by_its_schedule_again_and_again(bench: Bench) -> None:
    scheduler, calls = bench.scheduler(), threading.Semaphore(0)

    def function() -> Outcome:
        calls.release()
        return Outcome.DONE

    scheduler.add("vms", OFTEN, function)
    scheduler.start()
    for _ in range(5):
        assert calls.acquire(timeout=DEADLINE)
    started = bench.events.wait(EventKind.STARTED)
    assert started.job == "vms"
    assert started.lateness >= 0
    assert bench.events.wait(EventKind.FINISHED).outcome is Outcome.DONE
    assert scheduler.jobs()[0].failures == 0


def test_a_job_added_later_runs_and_a_removed_one_does_not(bench: Bench) -> None:
    scheduler = bench.scheduler()
    scheduler.start()
    work = bench.work()
    scheduler.add("vms", OFTEN, work)
    work.wait_began()
    with pytest.raises(ValueError, match="already"):
        scheduler.add("vms", OFTEN, work)
    scheduler.remove("vms")
    work.may_end.release()
    bench.events.wait(EventKind.FINISHED)
    other = bench.work()
    scheduler.add("other", OFTEN, other)
    for _ in range(3):
        other.may_end.release()
        other.wait_began()
    assert work.calls == 1
    assert scheduler.next_run("vms") is None
    for call in (scheduler.remove, scheduler.pause, scheduler.resume, scheduler.run_now):
        with pytest.raises(UsageError, match="no job 'vms'") as caught:
            call("vms")
        assert "other" in caught.value.hint


def test_a_run_due_while_one_is_under_way_is_skipped_and_counted(bench: Bench) -> None:
    scheduler = bench.scheduler()
    work = bench.work()
    scheduler.add("vms", OFTEN, work)
    scheduler.start()
    work.wait_began()
    for _ in range(3):
        assert bench.events.wait(EventKind.SKIPPED).job == "vms"
    assert work.calls == 1
    work.may_end.release()
    work.wait_began()
    assert work.calls == 2


def test_catch_up_exactly_once_after_downtime(bench: Bench) -> None:
    bench.store.states["vms"] = JobState(served=now() - timedelta(days=3, hours=1))
    scheduler = bench.scheduler()
    work = bench.work()
    scheduler.add("vms", DAILY, work)
    scheduler.start()
    assert bench.events.wait(EventKind.MISSED).count == 3
    work.wait_began()
    work.may_end.release()
    bench.events.wait(EventKind.FINISHED)
    following = DAILY.next_after(now())
    assert seen(lambda: scheduler.next_run("vms") == following)
    assert scheduler.stop(DEADLINE) == ()
    assert work.calls == 1
    again = bench.scheduler()
    again.add("vms", DAILY, work)
    again.start()
    assert again.next_run("vms") == following


def test_no_catch_up_where_nothing_was_missed(bench: Bench) -> None:
    bench.store.states["vms"] = JobState(served=now())
    scheduler = bench.scheduler()
    scheduler.add("vms", DAILY, bench.work())
    scheduler.add("new", DAILY, bench.work())
    assert scheduler.next_run("new") == DAILY.next_after(now())
    scheduler.start()
    assert scheduler.next_run("vms") == scheduler.next_run("new") == DAILY.next_after(now())


def test_pause_and_resume_survive_restarts(bench: Bench, tmp_path: Path) -> None:
    store = FileStateStore(tmp_path / "schedule.json")
    first = bench.scheduler(store)
    first.add("vms", DAILY, bench.work())
    first.start()
    first.pause("vms")
    # Nothing is said to the first scheduler any more: as if it had been killed.
    second = bench.scheduler(FileStateStore(store.path))
    second.add("vms", DAILY, bench.work())
    second.start()
    assert second.paused("vms")
    assert second.next_run("vms") is None
    second.resume("vms")
    assert second.next_run("vms") == DAILY.next_after(now())
    third = bench.scheduler(FileStateStore(store.path))
    third.add("vms", DAILY, bench.work())
    assert not third.paused("vms")


def test_a_paused_job_does_not_run(bench: Bench) -> None:
    scheduler = bench.scheduler()
    work, other = bench.work(), bench.work()
    work.may_end.release(100)
    scheduler.add("vms", OFTEN, work)
    scheduler.start()
    bench.events.wait(EventKind.FINISHED)
    scheduler.pause("vms")
    assert seen(lambda: scheduler.jobs()[0].running_since is None)
    calls = work.calls
    scheduler.add("other", OFTEN, other)
    for _ in range(4):
        other.may_end.release()
        other.wait_began()
    assert work.calls == calls
    scheduler.resume("vms")
    assert seen(lambda: work.calls > calls)


def test_resume_makes_up_for_what_the_pause_missed(bench: Bench) -> None:
    bench.store.states["vms"] = JobState(paused=True, served=now() - timedelta(days=2))
    scheduler = bench.scheduler()
    work = bench.work()
    scheduler.add("vms", DAILY, work)
    scheduler.start()
    scheduler.resume("vms")
    work.wait_began()


def test_run_now_even_when_paused(bench: Bench) -> None:
    scheduler = bench.scheduler()
    work = bench.work()
    scheduler.add("vms", DAILY, work)
    scheduler.start()
    scheduler.pause("vms")
    assert scheduler.run_now("vms")
    work.wait_began()
    assert not scheduler.run_now("vms")
    assert not scheduler.run_now("vms")
    work.may_end.release()
    work.wait_began()  # exactly one more
    work.may_end.release()
    bench.events.wait(EventKind.FINISHED)
    bench.events.wait(EventKind.FINISHED)
    assert seen(lambda: scheduler.jobs()[0].running_since is None)
    assert scheduler.paused("vms")
    assert scheduler.next_run("vms") is None
    assert work.calls == 2


def test_run_now_before_start(bench: Bench) -> None:
    scheduler = bench.scheduler()
    work = bench.work()
    scheduler.add("vms", DAILY, work)
    scheduler.run_now("vms")
    scheduler.start()
    work.wait_began()


@pytest.mark.parametrize(
    ("ends", "outcome", "retried"),
    [
        (Outcome.FAILED, Outcome.FAILED, True),
        (StorageUnavailable("gone", hint="mount it"), Outcome.FAILED, True),
        (ZeroDivisionError("defect"), Outcome.FAILED, True),
        (Outcome.CONFLICT, Outcome.CONFLICT, False),
        (ConflictError("diverged", hint="resync"), Outcome.CONFLICT, False),
        (Cancelled("stopped"), Outcome.CANCELLED, False),
    ],
)
def test_what_follows_a_run_that_did_not_end_well(
    bench: Bench, ends: Outcome | Exception, outcome: Outcome, retried: bool, caplog: pytest.LogCaptureFixture
) -> None:
    served = now()
    bench.store.states["vms"] = JobState(served=served)
    scheduler = bench.scheduler()
    work = bench.work(ends)
    monthly = parse_schedule("*-*-1 00:00", UTC)
    scheduler.add("vms", monthly, work)
    scheduler.start()
    scheduler.run_now("vms")
    work.wait_began()
    before = now()
    work.may_end.release()
    assert bench.events.wait(EventKind.FINISHED).outcome is outcome
    assert seen(lambda: scheduler.jobs()[0].running_since is None)
    following = scheduler.next_run("vms")
    assert following is not None
    planned = monthly.next_after(before)
    assert planned is not None
    if retried:
        assert following == planned or before <= following - timedelta(minutes=5) <= now()
    else:
        assert following == planned
    assert scheduler.jobs()[0].failures == (0 if outcome is Outcome.CANCELLED else 1)
    scheduler.stop(DEADLINE)
    assert bench.store.states["vms"].served == served
    if isinstance(ends, ZeroDivisionError):
        assert "failed unexpectedly" in caplog.text


def test_a_job_succeeds_after_its_retry(bench: Bench) -> None:
    scheduler = bench.scheduler()
    work = bench.work(Outcome.FAILED)
    work.may_end.release(3)
    scheduler.add("vms", OFTEN, work)
    scheduler.start()
    for _ in range(3):
        bench.events.wait(EventKind.FINISHED)
    assert seen(lambda: scheduler.jobs()[0].failures == 3)
    work.outcome = Outcome.DONE
    work.may_end.release()
    bench.events.wait(EventKind.FINISHED)
    assert seen(lambda: scheduler.jobs()[0].failures == 0)


def test_stop_waits_to_its_deadline_and_names_what_still_runs(bench: Bench) -> None:
    scheduler = bench.scheduler()
    work = bench.work()
    scheduler.add("vms", OFTEN, work)
    scheduler.start()
    work.wait_began()
    assert scheduler.stop(0.05) == ("vms",)
    work.may_end.release()
    assert seen(lambda: scheduler.jobs()[0].running_since is None)
    assert work.calls == 1


def test_stop_without_start(bench: Bench) -> None:
    assert bench.scheduler().stop(DEADLINE) == ()


def test_served_is_saved_at_stop(bench: Bench) -> None:
    scheduler = bench.scheduler()
    work = bench.work()
    scheduler.add("vms", DAILY, work)
    scheduler.start()
    before = now()
    scheduler.run_now("vms")
    work.wait_began()
    work.may_end.release()
    bench.events.wait(EventKind.FINISHED)
    assert scheduler.stop(DEADLINE) == ()
    served = bench.store.states["vms"].served
    assert served is not None
    assert before <= served <= now()


def test_a_damaged_state_is_logged_and_schedules_run(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    for error in (DamagedData("schedule.json cannot be read", hint="kept aside"), RuntimeError("database is locked")):
        bench.store.error = error
        with caplog.at_level(logging.ERROR):
            scheduler = bench.scheduler()
        bench.store.error = None
        assert str(error) in caplog.text
        work = bench.work()
        scheduler.add("vms", OFTEN, work)
        scheduler.start()
        work.wait_began()
        work.may_end.release(100)


def test_a_pause_that_cannot_be_saved_holds_and_says_so(bench: Bench) -> None:
    scheduler = bench.scheduler()
    scheduler.add("vms", DAILY, bench.work())
    scheduler.start()
    bench.store.error = StorageUnavailable("read-only", hint="remount")
    with pytest.raises(StorageUnavailable):
        scheduler.pause("vms")
    assert scheduler.next_run("vms") is None
    bench.store.error = None
    scheduler.stop(DEADLINE)
    assert bench.store.states["vms"].paused


def test_the_heartbeat_goes_on_while_all_workers_are_busy(bench: Bench) -> None:
    scheduler = bench.scheduler()
    works = [bench.work() for _ in range(6)]
    for number, work in enumerate(works):
        scheduler.add(f"job{number}", OFTEN, work)
    scheduler.start()
    for _ in range(4):
        bench.events.wait(EventKind.STARTED)
    tick = scheduler.last_tick
    assert tick <= time.time()
    assert seen(lambda: scheduler.last_tick > tick)


def test_a_failing_observer_stops_nothing(bench: Bench) -> None:
    def observe(event: Event) -> None:
        raise RuntimeError("defect")

    scheduler = Scheduler(MemoryStore(), observe=observe)
    bench.made.append((scheduler, []))
    work = bench.work()
    scheduler.add("vms", OFTEN, work)
    scheduler.start()
    for _ in range(3):
        work.wait_began()
        work.may_end.release()


class FarOrNear(Schedule):
    """Fires in a year, or once ``near`` is set, at once: as it is when the clock is set back by a year."""

    near = False

    def next_after(self, moment: datetime) -> datetime:
        return moment + (timedelta(milliseconds=20) if self.near else timedelta(days=365))


def test_jobs_armed_before_the_clock_was_set_back_are_armed_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = bench.scheduler()
    work = bench.work()
    schedule = FarOrNear("", UTC)
    scheduler.add("vms", schedule, work)
    scheduler.start()
    armed = scheduler.next_run("vms")
    assert armed is not None
    assert armed > now() + timedelta(days=300)
    # What a clock set back by an hour looks like: the steady clock has gone on, the wall clock less so.
    object.__setattr__(schedule, "near", True)
    steady = time.monotonic
    monkeypatch.setattr("scheduler.timer.time.monotonic", lambda: steady() + 3600)
    work.wait_began()


def test_missed_while_asleep_is_one_run(bench: Bench) -> None:
    """The timer wakes long after the moment it was armed for: one run serves all that were due meanwhile."""

    def clock() -> datetime:
        # Between the timer and the run lies a minute.
        asleep = threading.current_thread().name.startswith("job")
        return now() + timedelta(minutes=1 if asleep else 0)

    scheduler = bench.scheduler(clock=clock)
    work = bench.work()
    scheduler.add("vms", Interval("", UTC, timedelta(milliseconds=200)), work)
    scheduler.start()
    assert bench.events.wait(EventKind.STARTED).lateness >= 59
    assert bench.events.wait(EventKind.MISSED).count >= 290
    work.wait_began()
    work.may_end.release()
    bench.events.wait(EventKind.FINISHED)
    assert work.calls == 1
