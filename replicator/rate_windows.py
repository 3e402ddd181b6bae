"""Rate limits that depend on the time of day: how they are written, and which one holds now. Pure.

====================================  ==============================================
``200MiB/s``                          always
``mon..fri 08:00-18:00 = 50MiB/s``    on these days from eight to six
``sat,sun = unlimited``               all day
``22:00-06:00 = 1Gbit/s``             every day, over midnight: it belongs to the day on which it begins
====================================  ==============================================

Of several the first that holds counts; where none does, there is no limit. Times are of the wall clock, so a window
is an hour shorter or longer in the nights in which clocks are set.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from replicator import units
from replicator.errors import UsageError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
UNLIMITED = "unlimited"
MAX_ENTRIES = 50
_MIDNIGHT = 24 * 60
_EXAMPLE = 'write for example "200MiB/s", or ["mon..fri 08:00-18:00 = 50MiB/s", "200MiB/s"]'
_TIMES = re.compile(r"([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2})")


@dataclass(frozen=True, slots=True)
class Window:
    """When a limit holds.

    :ivar days: 0 for Monday to 6 for Sunday
    :ivar start, end: minutes of the day, from 0 to 1440; an end that is not after the start is of the next day
    """

    days: frozenset[int] = frozenset(range(7))
    start: int = 0
    end: int = _MIDNIGHT

    def holds(self, local: datetime) -> bool:
        """Whether it does at a moment of the wall clock."""
        day, minute = local.weekday(), local.hour * 60 + local.minute
        if self.start < self.end:
            return day in self.days and self.start <= minute < self.end
        return (day in self.days and minute >= self.start) or ((day - 1) % 7 in self.days and minute < self.end)


@dataclass(frozen=True, slots=True)
class RateLimit:
    """A rate limit as it is set.

    :ivar entries: a window (None: always), and bytes per second then (None: no limit)
    """

    entries: tuple[tuple[Window | None, int | None], ...]

    def at(self, local: datetime) -> int | None:
        """Bytes per second at a moment of the wall clock; None: no limit."""
        for window, rate in self.entries:
            if window is None or window.holds(local):
                return rate
        return None

    @classmethod
    def parse(cls, texts: Sequence[str]) -> RateLimit:
        """Of one text or several. :raises UsageError: what is wrong, and what would be right"""
        if not texts or len(texts) > MAX_ENTRIES:
            raise UsageError(f"has {len(texts)} limits, not 1 to {MAX_ENTRIES}", hint=_EXAMPLE)
        entries = tuple(_entry(text) for text in texts)
        for text, (window, _) in zip(texts[:-1], entries, strict=False):
            if window is None:
                raise UsageError(f"{text!r} always holds, so what follows never does", hint="put it last")
        return cls(entries)


def _entry(text: str) -> tuple[Window | None, int | None]:
    window, equals, rate = text.rpartition("=")
    if not equals:
        return None, units.parse_rate(text)
    return _window(window), None if rate.strip().lower() == UNLIMITED else units.parse_rate(rate.strip())


def _window(text: str) -> Window:
    words = text.lower().split()
    if not words or len(words) > 2:
        raise UsageError(f"{text.strip()!r} is no time window", hint=_EXAMPLE)
    times = words.pop() if _TIMES.fullmatch(words[-1]) else ""
    if len(words) > 1:
        raise UsageError(f"{words[1]!r} is no span of times", hint='write for example "08:00-18:00"')
    days = _days(words[0]) if words else Window().days
    return Window(days, *_span(times)) if times else Window(days)


def _days(text: str) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        for name in (first, last) if dots else (first,):
            if name not in DAYS:
                raise UsageError(f"{name!r} is no day of the week", hint='write for example "mon..fri" or "sat,sun"')
        begin = DAYS.index(first)
        count = (DAYS.index(last) - begin) % 7 if dots else 0
        found |= {(begin + offset) % 7 for offset in range(count + 1)}
    return frozenset(found)


def _span(text: str) -> tuple[int, int]:
    match = _TIMES.fullmatch(text)
    assert match is not None  # noqa: S101 - the caller has matched it
    from_hour, from_minute, to_hour, to_minute = map(int, match.groups())
    start, end = from_hour * 60 + from_minute, to_hour * 60 + to_minute
    if from_minute > 59 or to_minute > 59 or start >= _MIDNIGHT or end > _MIDNIGHT:
        raise UsageError(f"{text!r} has a time that no clock shows", hint='write for example "08:00-18:00"')
    if start == end:
        raise UsageError(f"{text!r} is no time at all", hint='leave the times out to mean all day, or "00:00-24:00"')
    return start, end
