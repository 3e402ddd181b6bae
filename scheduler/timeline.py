"""What a schedule is once it has been read: the moments at which it fires.

All moments returned are in UTC. Two aware datetimes of one zone are compared by their wall clocks, so in the hour that
a zone repeats in autumn the earlier may look like the later; moments in UTC have no such trap.

Daylight saving: an event of certain hours (``02:30``) whose hour is skipped in spring fires once, at the first moment
after the gap; whose hour is repeated in autumn, once, in the first pass. An event of every hour (``*/15``) follows real
time: nothing is added after the gap, and it fires in both passes, so that no hour goes without a run. Debian's cron(8)
does the same.
"""

from __future__ import annotations

import calendar
from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from itertools import pairwise

MIN_INTERVAL = timedelta(seconds=5)
MAX_INTERVAL = timedelta(days=366)
FIRST_YEAR = 1970
LAST_YEAR = 2199  # the last year that systemd's and Proxmox's calendar events know

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = timedelta(seconds=1)
_DAY = timedelta(days=1)
_HINT_RUNS = 24  # how many coming runs interval_hint looks at: a day of hourly ones


@dataclass(frozen=True)
class Schedule(ABC):
    """When something happens again and again.

    ``str()`` is the text it was read from, with white space and case made even; reading that text in the same zone
    gives an equal schedule. Schedules are equal that mean the same: ``*/15`` and ``0/15``.
    """

    text: str = field(compare=False)
    zone: tzinfo

    def __str__(self) -> str:
        return self.text

    @abstractmethod
    def next_after(self, moment: datetime) -> datetime | None:
        """The first moment strictly later than ``moment`` at which this fires, in UTC.

        :param moment: an aware datetime of any zone
        :return: None if it never fires again: only an event that names its years ends
        """

    def interval_hint(self, near: datetime) -> timedelta | None:
        """The shortest distance of two consecutive runs among the next ones after ``near``.

        :return: None if fewer than two runs follow
        """
        runs: list[datetime] = []
        following = self.next_after(near)
        while following is not None and len(runs) < _HINT_RUNS:
            runs.append(following)
            following = self.next_after(following)
        return min((later - earlier for earlier, later in pairwise(runs)), default=None)


@dataclass(frozen=True)
class Interval(Schedule):
    """Every ``every``, counted from 1970-01-01 00:00 UTC, so that a restart shifts nothing.

    ``1d`` hence fires at midnight UTC, whatever the zone; for a time of day take a calendar event.
    """

    every: timedelta

    def next_after(self, moment: datetime) -> datetime:
        return _EPOCH + ((moment - _EPOCH) // self.every + 1) * self.every

    def interval_hint(self, near: datetime) -> timedelta:  # noqa: ARG002 - the same at all times
        return self.every


@dataclass(frozen=True)
class CalendarEvent(Schedule):
    """Certain seconds of certain minutes of certain hours of certain days, by the clock of ``zone``.

    Each tuple is sorted and without repeats. ``weekdays`` counts from Monday = 0. ``years`` is empty for every year.
    ``either_day``: a day need match only one of ``days`` and ``weekdays``, as in cron with both given.
    """

    hours: tuple[int, ...]
    minutes: tuple[int, ...]
    seconds: tuple[int, ...] = (0,)
    weekdays: tuple[int, ...] = tuple(range(7))
    days: tuple[int, ...] = tuple(range(1, 32))
    months: tuple[int, ...] = tuple(range(1, 13))
    years: tuple[int, ...] = ()
    either_day: bool = False

    @property
    def every_hour(self) -> bool:
        """Whether it fires in all hours of a day, and so follows real time when clocks change."""
        return len(self.hours) == 24

    def matches(self, local: datetime) -> bool:
        """Whether the wall clock time ``local`` (naive, whole seconds) is one of this event's."""
        return (
            self._day_matches(local.date())
            and local.hour in self.hours
            and local.minute in self.minutes
            and local.second in self.seconds
        )

    def ever_fires(self) -> bool:
        """Whether any day of the calendar matches; ``02-30`` has none."""
        return self._day_from(date(FIRST_YEAR, 1, 1)) is not None

    def closest(self) -> timedelta:
        """A lower bound of the distance of two consecutive runs; exact below a minute."""
        distances = [later - earlier for earlier, later in pairwise(self.seconds)]
        if any((minute + 1) % 60 in self.minutes for minute in self.minutes):
            distances.append(60 - self.seconds[-1] + self.seconds[0])
        return timedelta(seconds=min(distances, default=60))

    def next_after(self, moment: datetime) -> datetime | None:
        after = moment.astimezone(UTC)
        wall = after.astimezone(self.zone).replace(tzinfo=None, microsecond=0)
        if self.every_hour:
            # Shortly before clocks are put back, wall clock times already past will come a second time.
            ahead = (after + _DAY).astimezone(self.zone).utcoffset() or timedelta()
            now = after.astimezone(self.zone).utcoffset() or timedelta()
            wall -= max(now - ahead, timedelta())
        second_pass: datetime | None = None
        local = self._local_from(wall)
        while local is not None:
            first, second, resume = self._instants(local)
            if first is not None and first > after:
                return first if second_pass is None else min(first, second_pass)
            if second is not None and second > after and second_pass is None:
                second_pass = second
            local = self._local_from(resume)
        return second_pass

    def _instants(self, local: datetime) -> tuple[datetime | None, datetime | None, datetime]:
        """The moments at which the wall clock shows ``local``: in the first and the second pass; and where to go on."""
        first = local.replace(tzinfo=self.zone, fold=0)
        second = local.replace(tzinfo=self.zone, fold=1)
        before, after = first.utcoffset() or timedelta(), second.utcoffset() or timedelta()
        if before == after:
            return first.astimezone(UTC), None, local + _SECOND
        if before > after:  # clocks are put back: this time comes twice
            return first.astimezone(UTC), second.astimezone(UTC) if self.every_hour else None, local + _SECOND
        # Clocks are put forward: this time never comes. PEP 495 puts fold=1 before the transition, fold=0 after it.
        transition = self._transition(second.astimezone(UTC), first.astimezone(UTC))
        resume = transition.astimezone(self.zone).replace(tzinfo=None)
        return None if self.every_hour else transition, None, max(resume, local + _SECOND)

    def _transition(self, before: datetime, after: datetime) -> datetime:
        """The first second in (``before``, ``after``] that has the UTC offset of ``after``."""
        offset = after.astimezone(self.zone).utcoffset()
        while after - before > _SECOND:
            middle = before + (after - before) // 2
            middle = middle.replace(microsecond=0)
            if middle.astimezone(self.zone).utcoffset() == offset:
                after = middle
            else:
                before = middle
        return after

    def _local_from(self, wall: datetime) -> datetime | None:
        """The first matching wall clock time not before ``wall`` (naive, whole seconds)."""
        day = self._day_from(wall.date())
        if day is None:
            return None
        if day > wall.date():
            return datetime.combine(day, self._first_time())
        at = self._time_from(wall.time())
        if at is not None:
            return datetime.combine(day, at)
        following = self._day_from(day + _DAY)
        return None if following is None else datetime.combine(following, self._first_time())

    def _first_time(self) -> time:
        return time(self.hours[0], self.minutes[0], self.seconds[0])

    def _time_from(self, at: time) -> time | None:
        hour = _from(self.hours, at.hour)
        if hour is None:
            return None
        if hour > at.hour:
            return time(hour, self.minutes[0], self.seconds[0])
        minute = _from(self.minutes, at.minute)
        if minute == at.minute:
            second = _from(self.seconds, at.second)
            if second is not None:
                return time(hour, minute, second)
            minute = _from(self.minutes, at.minute + 1)
        if minute is not None:
            return time(hour, minute, self.seconds[0])
        hour = _from(self.hours, at.hour + 1)
        return None if hour is None else time(hour, self.minutes[0], self.seconds[0])

    def _day_from(self, start: date) -> date | None:
        for year in self.years or range(start.year, LAST_YEAR + 1):
            if year < start.year:
                continue
            for month in self.months:
                if (year, month) < (start.year, start.month):
                    continue
                first = start.day if (year, month) == (start.year, start.month) else 1
                for day in range(first, calendar.monthrange(year, month)[1] + 1):
                    candidate = date(year, month, day)
                    if self._day_matches(candidate):
                        return candidate
        return None

    def _day_matches(self, day: date) -> bool:
        if day.month not in self.months or (self.years and day.year not in self.years):
            return False
        by_number, by_name = day.day in self.days, day.weekday() in self.weekdays
        return by_number or by_name if self.either_day else by_number and by_name


def _from(values: tuple[int, ...], least: int) -> int | None:
    """The first of the sorted ``values`` that is not below ``least``."""
    index = bisect_left(values, least)
    return values[index] if index < len(values) else None
