"""Schedules against a brute-force walk over the clock, minute by minute."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.errors import ScheduleError
from scheduler.schedule import MAX_TEXT, Interval, parse_schedule

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
MINUTE = timedelta(minutes=1)
WINDOW = timedelta(days=3)


@dataclass(frozen=True)
class Part:
    """A list of numbers: how it is written, and which numbers it means, worked out apart from the reader."""

    text: str
    numbers: frozenset[int]


def star(lowest: int, highest: int) -> Part:
    return Part("*", frozenset(range(lowest, highest + 1)))


@st.composite
def parts(draw: st.DrawFn, lowest: int, highest: int) -> Part:
    if draw(st.booleans()):
        return star(lowest, highest)
    if draw(st.integers(0, 4)) == 0:
        step = draw(st.integers(1, highest))
        return Part(f"*/{step}", frozenset(n for n in range(lowest, highest + 1) if (n - lowest) % step == 0))
    items: list[str] = []
    numbers: set[int] = set()
    for _ in range(draw(st.integers(1, 2))):
        first = draw(st.integers(lowest, highest))
        last = draw(st.integers(first, highest))
        step = draw(st.integers(1, highest))
        kind = draw(st.sampled_from(("one", "range", "step", "both")))
        written, meant = {
            "one": (f"{first:02}", {first}),
            "range": (f"{first}..{last}", set(range(first, last + 1))),
            "step": (f"{first}/{step}", {n for n in range(first, highest + 1) if (n - first) % step == 0}),
            "both": (f"{first}..{last}/{step}", {n for n in range(first, last + 1) if (n - first) % step == 0}),
        }[kind]
        items.append(written)
        numbers |= meant
    return Part(",".join(items), frozenset(numbers))


@dataclass(frozen=True)
class Event:
    text: str
    weekdays: frozenset[int]
    days: frozenset[int]
    hours: frozenset[int]
    minutes: frozenset[int]

    def shows(self, wall: datetime) -> bool:
        return (
            wall.weekday() in self.weekdays
            and wall.day in self.days
            and wall.hour in self.hours
            and wall.minute in self.minutes
        )


@st.composite
def events(draw: st.DrawFn) -> Event:
    weekdays = draw(st.one_of(st.none(), st.sets(st.integers(0, 6), min_size=1)))
    days = draw(st.one_of(st.none(), st.none(), parts(1, 31)))
    hours, minutes = draw(parts(0, 23)), draw(parts(0, 59))
    text = " ".join(
        [
            *([",".join(DAYS[day] for day in sorted(weekdays))] if weekdays is not None else []),
            *([f"*-{days.text}"] if days else []),
            minutes.text if hours.text == "*" and draw(st.booleans()) else f"{hours.text}:{minutes.text}",
        ]
    )
    return Event(
        text,
        frozenset(range(7)) if weekdays is None else frozenset(weekdays),
        days.numbers if days else star(1, 31).numbers,
        hours.numbers,
        minutes.numbers,
    )


CLOCK_CHANGES = (
    ("Europe/Berlin", "2026-03-29T01:00+00:00"),
    ("Europe/Berlin", "2026-10-25T01:00+00:00"),
    ("America/Havana", "2026-03-08T05:00+00:00"),
    ("America/Havana", "2026-11-01T05:00+00:00"),
    ("Australia/Lord_Howe", "2026-04-04T15:00+00:00"),  # by half an hour
    ("Australia/Lord_Howe", "2026-10-03T15:30+00:00"),
)
ZONES = st.sampled_from(("UTC", *sorted({zone for zone, _ in CLOCK_CHANGES})))
ANY_TIME = st.builds(lambda second: datetime.fromtimestamp(second, UTC), st.integers(1_700_000_000, 1_900_000_000))


@st.composite
def around_clock_changes(draw: st.DrawFn) -> tuple[Event, str, datetime]:
    """An event of every day, of few minutes, and a start shortly before or after clocks change."""
    zone, change = draw(st.sampled_from(CLOCK_CHANGES))
    start = datetime.fromisoformat(change) + timedelta(minutes=draw(st.integers(-80, 70)))
    hours = draw(
        st.sampled_from((star(0, 23), star(0, 23), Part("1..3", frozenset((1, 2, 3))), Part("0,2", frozenset((0, 2)))))
    )
    minutes = draw(st.sets(st.integers(0, 59), min_size=1, max_size=3))
    text = f"{hours.text}:{','.join(map(str, sorted(minutes)))}"
    event = Event(text, frozenset(range(7)), star(1, 31).numbers, hours.numbers, frozenset(minutes))
    return event, zone, start


def first_by_walking(event: Event, zone: ZoneInfo, start: datetime) -> datetime | None:
    """The first minute after ``start`` at which the event fires, by the rules as the documentation tells them."""
    every_hour = len(event.hours) == 24
    moment = start.replace(second=0, microsecond=0)
    shown = moment.astimezone(zone)
    while moment < start + WINDOW:
        before, moment = shown, moment + MINUTE
        shown = moment.astimezone(zone)
        skipped = before.replace(tzinfo=None) + MINUTE
        if not every_hour:
            while skipped < shown.replace(tzinfo=None):
                if event.shows(skipped):
                    return moment
                skipped += MINUTE
        if event.shows(shown.replace(tzinfo=None)) and (every_hour or not shown.fold):
            return moment
    return None


@settings(max_examples=300, deadline=None)
@given(events(), ZONES, ANY_TIME)
def test_next_after_is_the_first_moment_a_walk_finds(event: Event, zone_name: str, start: datetime) -> None:
    zone = ZoneInfo(zone_name)
    schedule = parse_schedule(event.text, zone)
    found = schedule.next_after(start)
    assert found is None or found > start
    walked = first_by_walking(event, zone, start)
    if walked is None:
        assert found is None or found >= start + WINDOW
    else:
        assert found == walked


@settings(max_examples=400, deadline=None)
@given(around_clock_changes())
def test_next_after_where_clocks_change(case: tuple[Event, str, datetime]) -> None:
    event, zone_name, start = case
    zone = ZoneInfo(zone_name)
    assert parse_schedule(event.text, zone).next_after(start) == first_by_walking(event, zone, start)


@settings(max_examples=200, deadline=None)
@given(events(), ZONES)
def test_text_round_trip(event: Event, zone_name: str) -> None:
    schedule = parse_schedule(event.text, ZoneInfo(zone_name))
    assert parse_schedule(str(schedule), ZoneInfo(zone_name)) == schedule


@given(st.integers(5, 366 * 86400), ANY_TIME)
def test_intervals_are_multiples_since_the_epoch(seconds: int, start: datetime) -> None:
    schedule = parse_schedule(f"{seconds}s")
    assert isinstance(schedule, Interval)
    found = schedule.next_after(start)
    assert start < found <= start + timedelta(seconds=seconds)
    assert (found - datetime(1970, 1, 1, tzinfo=UTC)) % timedelta(seconds=seconds) == timedelta()


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(max_size=MAX_TEXT + 5), st.text("0123456789*/.,:- utcmonhsd", max_size=40)))
def test_any_text_is_either_read_or_refused(text: str) -> None:
    try:
        schedule = parse_schedule(text, UTC)
    except ScheduleError as error:
        assert error.hint
    else:
        start = datetime(2026, 2, 28, tzinfo=UTC)
        found = schedule.next_after(start)
        assert found is None or found > start
