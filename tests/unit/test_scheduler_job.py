"""When a job runs next: the back-off and the rules of one job, by a clock that stands still."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.backoff import retry_delay
from scheduler.job import Job, JobState, Outcome
from scheduler.schedule import parse_schedule

NOW = datetime(2026, 2, 28, 12, 7, 30, tzinfo=UTC)


def minutes(count: float) -> timedelta:
    return timedelta(minutes=count)


def job(schedule: str = "*/15", **state: object) -> Job:
    return Job("vms", parse_schedule(schedule, UTC), lambda: Outcome.DONE, JobState(**state))  # type: ignore[arg-type]


def at(hour: int, minute: int, second: int = 0) -> datetime:
    return NOW.replace(hour=hour, minute=minute, second=second)


@pytest.mark.parametrize(
    ("failures", "interval", "expected"),
    [
        (1, None, minutes(5)),
        (2, timedelta(days=1), minutes(10)),
        (3, timedelta(hours=1), minutes(15)),
        (4, timedelta(hours=1), minutes(30)),
        (400, timedelta(hours=1), minutes(30)),
        (3, minutes(12), minutes(12)),
        (1, timedelta(seconds=30), timedelta(seconds=30)),
    ],
)
def test_back_off(failures: int, interval: timedelta | None, expected: timedelta) -> None:
    assert retry_delay(failures, interval) == expected


def test_no_back_off_without_a_failure() -> None:
    with pytest.raises(ValueError, match="after a failure"):
        retry_delay(0, None)


@given(st.integers(1, 10**6), st.one_of(st.none(), st.timedeltas(timedelta(seconds=5), timedelta(days=400))))
def test_back_off_is_bounded_and_never_shrinks(failures: int, interval: timedelta | None) -> None:
    delay = retry_delay(failures, interval)
    assert timedelta() < delay <= (interval or minutes(30))
    assert delay <= retry_delay(failures + 1, interval)


def test_first_run_without_downtime_is_the_next_of_the_schedule() -> None:
    assert job(served=at(12, 0)).first_run(NOW) == at(12, 15)
    assert job().first_run(NOW) == at(12, 15)


def test_a_run_missed_while_down_is_made_up_for_once() -> None:
    missed = job(served=at(9, 0))
    assert missed.first_run(NOW) == NOW
    assert missed.begin(NOW)
    assert missed.end(Outcome.DONE, NOW + minutes(1)) == at(12, 15)
    assert missed.state.served == NOW
    assert missed.first_run(NOW + minutes(2)) == at(12, 15)


def test_an_interrupted_or_failed_run_is_made_up_for_after_a_restart() -> None:
    daily = job("02:00", served=at(2, 0) - timedelta(days=1))
    assert daily.begin(at(2, 0))
    daily.end(Outcome.FAILED, at(2, 1))
    assert daily.first_run(NOW) == NOW


def test_a_clock_that_was_ahead_does_not_hold_the_schedule_up() -> None:
    assert job(served=NOW + timedelta(days=30)).first_run(NOW) == at(12, 15)


def test_failures_back_off_within_the_schedule() -> None:
    daily = job("02:00", served=NOW)
    now = NOW
    for expected in (5, 10, 15, 30, 30):
        assert daily.begin(now)
        following = daily.end(Outcome.FAILED, now)
        assert following == now + minutes(expected)
        now = following
    assert daily.begin(now)
    assert daily.end(Outcome.DONE, now) == at(2, 0) + timedelta(days=1)
    assert daily.failures == 0


def test_a_retry_is_never_later_than_the_schedule() -> None:
    quick = job("30s")
    assert quick.begin(NOW)
    assert quick.end(Outcome.FAILED, NOW) == NOW + timedelta(seconds=30)
    quarter = job("*/15")
    assert quarter.begin(NOW)
    assert quarter.end(Outcome.FAILED, at(12, 12)) == at(12, 15)


def test_a_conflict_waits_for_the_schedule_and_counts_as_failure() -> None:
    daily = job("02:00", served=NOW)
    assert daily.begin(NOW)
    assert daily.end(Outcome.CONFLICT, NOW) == at(2, 0) + timedelta(days=1)
    assert daily.failures == 1
    assert daily.state.served == NOW


def test_cancelled_is_neither_done_nor_a_failure() -> None:
    daily = job("02:00", served=at(2, 0) - timedelta(days=1))
    assert daily.begin(NOW)
    daily.end(Outcome.CANCELLED, NOW)
    assert daily.failures == 0
    assert daily.first_run(NOW) == NOW


def test_paused_runs_only_if_asked() -> None:
    paused = job(paused=True, served=at(9, 0))
    assert paused.first_run(NOW) is None
    assert not paused.begin(NOW)
    paused.asked = True
    assert paused.begin(NOW)
    assert paused.end(Outcome.FAILED, NOW) is None


def test_asked_while_running_follows_at_the_end() -> None:
    running = job()
    assert running.begin(NOW)
    assert not running.begin(NOW)
    running.asked = True
    assert running.end(Outcome.DONE, NOW + minutes(1)) == NOW + minutes(1)
    assert running.begin(NOW + minutes(1))
    assert running.end(Outcome.DONE, NOW + minutes(2)) == at(12, 15)


def test_a_schedule_that_has_ended() -> None:
    once = job("2026-02-28 12:00", served=at(11, 0))
    assert once.first_run(NOW) == NOW
    assert once.begin(NOW)
    assert once.end(Outcome.FAILED, NOW) == NOW + minutes(5)
    assert once.begin(NOW)
    assert once.end(Outcome.DONE, NOW) is None
    assert once.first_run(NOW) is None


def test_missed_runs_are_counted_to_a_cap() -> None:
    assert job().missed(at(12, 0), NOW) == 0
    assert job().missed(at(10, 0), NOW) == 8
    assert job("5s").missed(NOW - timedelta(days=300), NOW) == 1000
