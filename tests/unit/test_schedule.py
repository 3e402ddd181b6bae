"""Schedule syntax: what each text means, and what is refused with which words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from apscheduler.triggers.cron import CronTrigger

from replicator.errors import ScheduleError
from scheduler.schedule import MAX_TEXT, CalendarEvent, Interval, parse_schedule

BERLIN = ZoneInfo("Europe/Berlin")
SATURDAY = datetime(2026, 2, 28, 12, 7, 30, tzinfo=UTC)


def runs(text: str, count: int, after: datetime = SATURDAY) -> list[str]:
    schedule = parse_schedule(text, UTC)
    found = []
    moment: datetime | None = after
    for _ in range(count):
        assert moment is not None
        moment = schedule.next_after(moment)
        found.append("never" if moment is None else moment.strftime("%a %Y-%m-%d %H:%M:%S"))
        if moment is None:
            break
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # Expected values are of `systemd-analyze calendar --base-time=…` where it knows the form.
        ("*/15", ["Sat 2026-02-28 12:15:00", "Sat 2026-02-28 12:30:00", "Sat 2026-02-28 12:45:00"]),
        ("0/15", ["Sat 2026-02-28 12:15:00", "Sat 2026-02-28 12:30:00"]),
        ("30", ["Sat 2026-02-28 12:30:00", "Sat 2026-02-28 13:30:00"]),
        ("*", ["Sat 2026-02-28 12:08:00", "Sat 2026-02-28 12:09:00"]),
        ("*:0/5", ["Sat 2026-02-28 12:10:00", "Sat 2026-02-28 12:15:00"]),
        ("21:30", ["Sat 2026-02-28 21:30:00", "Sun 2026-03-01 21:30:00"]),
        ("mon..fri 02:00", ["Mon 2026-03-02 02:00:00", "Tue 2026-03-03 02:00:00"]),
        ("monday..friday 2:0", ["Mon 2026-03-02 02:00:00", "Tue 2026-03-03 02:00:00"]),
        ("sat..mon 1:00", ["Sun 2026-03-01 01:00:00", "Mon 2026-03-02 01:00:00", "Sat 2026-03-07 01:00:00"]),
        ("mon,wed,fri *:0/20", ["Mon 2026-03-02 00:00:00", "Mon 2026-03-02 00:20:00"]),
        ("sat,sun", ["Sun 2026-03-01 00:00:00", "Sat 2026-03-07 00:00:00"]),
        ("sat 18:15", ["Sat 2026-02-28 18:15:00", "Sat 2026-03-07 18:15:00"]),
        ("2..8/2:0", [f"Sun 2026-03-01 {hour:02}:00:00" for hour in (2, 4, 6, 8)] + ["Mon 2026-03-02 02:00:00"]),
        ("8..17/9,22:5/50", ["Sat 2026-02-28 17:05:00", "Sat 2026-02-28 17:55:00", "Sat 2026-02-28 22:05:00"]),
        ("12/10:5", ["Sat 2026-02-28 22:05:00", "Sun 2026-03-01 12:05:00"]),
        ("mon..wed 30/10", ["Mon 2026-03-02 00:30:00", "Mon 2026-03-02 00:40:00", "Mon 2026-03-02 00:50:00"]),
        ("*-05", ["Thu 2026-03-05 00:00:00", "Sun 2026-04-05 00:00:00"]),
        ("sat *-1..7 15:00", ["Sat 2026-03-07 15:00:00", "Sat 2026-04-04 15:00:00"]),
        ("*-*-1 03:00", ["Sun 2026-03-01 03:00:00", "Wed 2026-04-01 03:00:00"]),
        ("*-*-31", ["Tue 2026-03-31 00:00:00", "Sun 2026-05-31 00:00:00"]),
        ("2026-12-24 10:00", ["Thu 2026-12-24 10:00:00", "never"]),
        ("2020-01-01", ["never"]),
        ("*/4-2-29", ["Tue 2028-02-29 00:00:00", "Sun 2032-02-29 00:00:00"]),
        ("02-29", ["Tue 2028-02-29 00:00:00", "Sun 2032-02-29 00:00:00"]),
        ("*:*:0/20", ["Sat 2026-02-28 12:07:40", "Sat 2026-02-28 12:08:00"]),
        ("minutely", ["Sat 2026-02-28 12:08:00", "Sat 2026-02-28 12:09:00"]),
        ("hourly", ["Sat 2026-02-28 13:00:00", "Sat 2026-02-28 14:00:00"]),
        ("Daily", ["Sun 2026-03-01 00:00:00", "Mon 2026-03-02 00:00:00"]),
        ("weekly", ["Mon 2026-03-02 00:00:00", "Mon 2026-03-09 00:00:00"]),
        ("monthly", ["Sun 2026-03-01 00:00:00", "Wed 2026-04-01 00:00:00"]),
        ("quarterly", ["Wed 2026-04-01 00:00:00", "Wed 2026-07-01 00:00:00"]),
        ("semi-annually", ["Wed 2026-07-01 00:00:00", "Fri 2027-01-01 00:00:00"]),
        ("yearly", ["Fri 2027-01-01 00:00:00", "Sat 2028-01-01 00:00:00"]),
    ],
)
def test_calendar_events_as_proxmox_reads_them(text: str, expected: list[str]) -> None:
    assert runs(text, len(expected)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("*/20 * * * *", ["Sat 2026-02-28 12:20:00", "Sat 2026-02-28 12:40:00"]),
        ("30 2 * * 0", ["Sun 2026-03-01 02:30:00", "Sun 2026-03-08 02:30:00"]),
        ("30 2 * * 7", ["Sun 2026-03-01 02:30:00", "Sun 2026-03-08 02:30:00"]),
        ("30 2 * * sun", ["Sun 2026-03-01 02:30:00", "Sun 2026-03-08 02:30:00"]),
        ("0 2 * * 1-5", ["Mon 2026-03-02 02:00:00", "Tue 2026-03-03 02:00:00"]),
        ("0 2 * * 5-7", ["Sun 2026-03-01 02:00:00", "Fri 2026-03-06 02:00:00", "Sat 2026-03-07 02:00:00"]),
        ("0 0 13 * fri", ["Fri 2026-03-06 00:00:00", "Fri 2026-03-13 00:00:00", "Fri 2026-03-20 00:00:00"]),
        ("0 0 2 * wed", ["Mon 2026-03-02 00:00:00", "Wed 2026-03-04 00:00:00", "Wed 2026-03-11 00:00:00"]),
        ("0 0 */2 * mon", ["Mon 2026-03-09 00:00:00", "Mon 2026-03-23 00:00:00"]),
        ("0 0 1 jan-mar,7 *", ["Sun 2026-03-01 00:00:00", "Wed 2026-07-01 00:00:00", "Fri 2027-01-01 00:00:00"]),
        ("10-50/20,5 23 * * *", [f"Sat 2026-02-28 23:{minute:02}:00" for minute in (5, 10, 30, 50)]),
    ],
)
def test_cron(text: str, expected: list[str]) -> None:
    assert runs(text, len(expected)) == expected


@pytest.mark.parametrize("text", ["*/7 3-5 * * *", "0,30 */6 1,15 * *", "5/10 1 * 2 *", "59 23 31 12 *"])
def test_cron_agrees_with_apscheduler_where_both_know_the_meaning(text: str) -> None:
    ours, theirs = parse_schedule(text, UTC), CronTrigger.from_crontab(text, timezone=UTC)
    moment = SATURDAY
    for _ in range(50):
        following = ours.next_after(moment)
        assert following is not None
        assert following == theirs.get_next_fire_time(None, moment + timedelta(microseconds=1))
        moment = following


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("5s", 5),
        ("30s", 30),
        ("30 sec", 30),
        ("5min", 300),
        ("2h", 7200),
        ("1h30min", 5400),
        ("1h 30m", 5400),
        ("1d", 86400),
        ("1w2d", 777600),
        ("90 Minutes", 5400),
    ],
)
def test_intervals(text: str, seconds: int) -> None:
    schedule = parse_schedule(text)
    assert isinstance(schedule, Interval)
    assert schedule.every == timedelta(seconds=seconds)
    assert schedule.interval_hint(SATURDAY) == schedule.every


def test_an_interval_does_not_drift_over_restarts() -> None:
    schedule = parse_schedule("7s")
    first = schedule.next_after(SATURDAY)
    assert first is not None
    assert first.timestamp() % 7 == 0
    assert schedule.next_after(first - timedelta(microseconds=1)) == first
    assert schedule.next_after(first) == first + timedelta(seconds=7)


@pytest.mark.parametrize(
    ("text", "part", "said"),
    [
        ("", "", "empty"),
        ("   ", "", "empty"),
        ("*/90", "*/90", "step"),
        ("*/0", "*/0", "step"),
        ("5/", "5/", "step"),
        ("60", "60", "0 to 59"),
        ("24:00", "24", "0 to 23"),
        ("1:2:3:4", "1:2:3:4", "a time is"),
        ("10..5", "10..5", "after its end"),
        ("1,,2", "", "not a minute"),
        ("mon-fri 02:00", "mon-fri", "neither a weekday"),
        ("mond 02:00", "mond", "neither a weekday"),
        ("mon 02:00 03:00", "03:00", "more than"),
        ("02:00 mon", "mon", "more than"),
        ("13-01", "13", "1 to 12"),
        ("0-01", "0", "1 to 12"),
        ("1-2-3-4", "1-2-3-4", "a date is"),
        ("2500-01-01", "2500", "1970 to 2199"),
        ("02-30", "02-30", "never run"),
        ("2026,2027-02-29", "2026,2027-02-29", "never run"),
        ("mon 2026-12-24", "mon 2026-12-24", "never run"),
        ("0 0 30 2 *", "0 0 30 2 *", "never run"),
        ("0 0 * *", "0", ""),
        ("0 0 * * * *", "0 0 * * * *", "5 fields, this has 6"),
        ("0 0 * * 8", "8", "0 to 7"),
        ("0 0 * * mon..fri", "mon..fri", "not a weekday"),
        ("61 0 * * *", "61", "0 to 59"),
        ("3s", "3s", "shorter than 5 s"),
        ("0h", "0h", "shorter than 5 s"),
        ("*:*:*", "*:*:*", "5 s apart"),
        ("*:*:0,58", "*:*:0,58", "5 s apart"),
        ("400d", "400d", "longer than 366 days"),
        ("999999999w", "999999999w", "longer"),
        ("1.5h", "1.5h", "whole number"),
        ("5parsec", "5parsec", "no unit"),
        ("30min1h", "1h", "largest first"),
        ("1h1h", "1h", "once"),
        ("٣:00", "٣", "not a hour"),
        ("utc", "utc", "neither a weekday"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_part_and_examples(text: str, part: str, said: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_schedule(text, UTC)
    assert part in str(caught.value)
    assert said in str(caught.value)
    assert "mon..fri 02:00" in caught.value.hint
    assert "30s" in caught.value.hint


def test_hints_say_what_to_write_instead() -> None:
    for text, hint in [("mon-fri 02:00", "mon..fri"), ("*:0-5", "'..'"), ("1s", '"5s"'), ("1.5h", '"1h30min"')]:
        with pytest.raises(ScheduleError) as caught:
            parse_schedule(text)
        assert hint in caught.value.hint.split("examples:")[0]


def test_length_is_capped_before_anything_is_read() -> None:
    with pytest.raises(ScheduleError, match=f"{MAX_TEXT + 1} characters"):
        parse_schedule("1" * (MAX_TEXT + 1))
    assert parse_schedule(",".join(str(n % 60) for n in range(40)))


def test_seconds_apart_enough_are_accepted() -> None:
    assert runs("*:0/30:0,58", 3) == ["Sat 2026-02-28 12:30:00", "Sat 2026-02-28 12:30:58", "Sat 2026-02-28 13:00:00"]


def test_text_and_equality() -> None:
    schedule = parse_schedule("  Mon..FRI   02:00 ", BERLIN)
    assert str(schedule) == "mon..fri 02:00"
    assert parse_schedule(str(schedule), BERLIN) == schedule
    assert parse_schedule("*/15", BERLIN) == parse_schedule("*:0/15", BERLIN)
    assert parse_schedule("*/15", BERLIN) != parse_schedule("*/15", UTC)
    assert parse_schedule("90min", BERLIN) == parse_schedule("1h30min", UTC)
    assert parse_schedule("mon..fri 2:0", UTC) == parse_schedule("0 2 * * 1-5", UTC)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("*/15", timedelta(minutes=15)),
        ("mon..fri 02:00", timedelta(days=1)),
        ("8..17:0/30", timedelta(minutes=30)),
        ("0,20:00", timedelta(hours=4)),
        ("2026-12-24", None),
    ],
)
def test_interval_hint(text: str, hint: timedelta | None) -> None:
    assert parse_schedule(text, UTC).interval_hint(SATURDAY) == hint


def in_berlin(text: str, start: datetime, count: int) -> list[str]:
    """The next runs by Berlin's clock, after ``start`` in UTC."""
    schedule = parse_schedule(text, BERLIN)
    found = []
    moment: datetime | None = start
    for _ in range(count):
        assert moment is not None
        moment = schedule.next_after(moment)
        assert moment is not None
        found.append(moment.astimezone(BERLIN).strftime("%d. %H:%M %Z"))
    return found


SPRING = datetime(2026, 3, 29, 0, 20, tzinfo=UTC)  # 01:20 CET; at 02:00 CET clocks go to 03:00 CEST
AUTUMN = datetime(2026, 10, 25, 0, 20, tzinfo=UTC)  # 02:20 CEST; at 03:00 CEST clocks go back to 02:00 CET


def test_a_skipped_hour_runs_once_after_the_gap() -> None:
    assert in_berlin("02:30", SPRING, 2) == ["29. 03:00 CEST", "30. 02:30 CEST"]
    assert in_berlin("2..3:0/30", SPRING, 3) == ["29. 03:00 CEST", "29. 03:30 CEST", "30. 02:00 CEST"]
    assert in_berlin("30 2 * * *", SPRING, 2) == ["29. 03:00 CEST", "30. 02:30 CEST"]
    assert in_berlin("30", SPRING, 3) == ["29. 01:30 CET", "29. 03:30 CEST", "29. 04:30 CEST"]


def test_a_repeated_hour_runs_once_for_certain_hours_and_in_real_time_for_every_hour() -> None:
    assert in_berlin("02:30", AUTUMN, 2) == ["25. 02:30 CEST", "26. 02:30 CET"]
    assert in_berlin("02:30", AUTUMN.replace(minute=35), 1) == ["26. 02:30 CET"]
    assert in_berlin("2,3:30", AUTUMN, 3) == ["25. 02:30 CEST", "25. 03:30 CET", "26. 02:30 CET"]
    assert in_berlin("*/20", AUTUMN, 6) == [
        "25. 02:40 CEST",
        "25. 02:00 CET",
        "25. 02:20 CET",
        "25. 02:40 CET",
        "25. 03:00 CET",
        "25. 03:20 CET",
    ]
    assert in_berlin("30 * * * *", AUTUMN, 3) == ["25. 02:30 CEST", "25. 02:30 CET", "25. 03:30 CET"]


def test_a_named_year_with_only_the_repeated_hour_left() -> None:
    schedule = parse_schedule("2026-10-25 *:10", ZoneInfo("America/Havana"))
    assert schedule.next_after(datetime(2026, 10, 27, tzinfo=UTC)) is None
    repeated = parse_schedule("2026-11-01 *:10", ZoneInfo("America/Havana"))  # 01:00 CDT goes back to 00:00 CST
    first = repeated.next_after(datetime(2026, 11, 1, 4, 0, tzinfo=UTC))
    assert first == datetime(2026, 11, 1, 4, 10, tzinfo=UTC)
    assert repeated.next_after(first) == datetime(2026, 11, 1, 5, 10, tzinfo=UTC)


def test_utc_suffix() -> None:
    schedule = parse_schedule("21:30 UTC", BERLIN)
    assert isinstance(schedule, CalendarEvent)
    assert schedule.next_after(SATURDAY) == datetime(2026, 2, 28, 21, 30, tzinfo=UTC)
    assert str(schedule) == "21:30 utc"
    assert parse_schedule("30 utc", BERLIN).next_after(SATURDAY) == datetime(2026, 2, 28, 12, 30, tzinfo=UTC)
    assert parse_schedule("mon *-*-* 2:00 utc", BERLIN).zone == UTC
