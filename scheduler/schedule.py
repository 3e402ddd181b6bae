"""Reading a schedule: calendar event, cron or interval.

===================  ==============================================================
``*/15``             every 15 minutes
``mon..fri 02:00``   weekdays at two
``21:30``            every day
``*-*-01 03:00``     the first of each month
``0 2 * * 1-5``      cron, five fields
``30s``, ``1h30min`` intervals, from 5 s on
===================  ==============================================================
"""

from __future__ import annotations

import re
from datetime import UTC, timedelta, tzinfo

from tzlocal import get_localzone

from replicator.errors import ScheduleError
from scheduler.calendar_syntax import read_calendar_event
from scheduler.cron_syntax import read_cron
from scheduler.fields import Refused
from scheduler.timeline import MAX_INTERVAL, MIN_INTERVAL, CalendarEvent, Interval, Schedule

__all__ = ["MAX_TEXT", "MIN_INTERVAL", "CalendarEvent", "Interval", "Schedule", "parse_schedule", "system_zone"]

MAX_TEXT = 128  # characters, as Proxmox allows for a calendar event

EXAMPLES = (
    'examples: "*/15" (every 15 minutes), "mon..fri 02:00", "21:30", "sat *-*-1..7 03:00", '
    '"30s" or "1h30min" (intervals), "0 2 * * 1-5" (cron)'
)

_UNITS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
    **dict.fromkeys(("w", "week", "weeks"), 604800),
}
_INTERVAL = re.compile(r"(?:[0-9]+(?:\.[0-9]+)? ?[a-z]+ ?)+")
_INTERVAL_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([a-z]+)")


def system_zone() -> tzinfo:
    """The time zone of this machine; UTC where none is set."""
    zone: tzinfo = get_localzone()
    return zone


def parse_schedule(text: str, zone: tzinfo | None = None) -> Schedule:
    """Read a schedule.

    :param text: at most :data:`MAX_TEXT` characters; case and amount of white space do not matter
    :param zone: whose wall clock calendar events and cron follow; None for this machine's
    :raises ScheduleError: naming the text, the offending part, and examples of what would be right
    """
    if len(text) > MAX_TEXT:
        raise ScheduleError(f"a schedule of {len(text)} characters, more than {MAX_TEXT}", hint=EXAMPLES)
    even = " ".join(text.lower().split())
    if not even:
        raise ScheduleError("the schedule is empty", hint=EXAMPLES)
    try:
        return _read(even, system_zone() if zone is None else zone)
    except Refused as error:
        where = "" if error.part == even else f" at {error.part!r}"
        hint = f"{error.remedy}; {EXAMPLES}" if error.remedy else EXAMPLES
        raise ScheduleError(f"schedule {text!r} cannot be used{where}: {error.cause}", hint=hint) from None


def _read(text: str, zone: tzinfo) -> Schedule:
    if _INTERVAL.fullmatch(text) and not text.endswith("utc"):
        return _read_interval(text)
    fields = len(text.split())
    if fields > 5 or (fields == 5 and not text.endswith(" utc")):
        event = read_cron(text, zone)
    else:
        event = read_calendar_event(text, zone)
    if not event.ever_fires():
        raise Refused(text, "no day of the calendar is like that, so it would never run")
    if event.closest() < MIN_INTERVAL:
        raise Refused(text, f"runs would be less than {_seconds(MIN_INTERVAL)} apart", 'the shortest schedule is "5s"')
    return event


def _read_interval(text: str) -> Interval:
    seconds = 0
    largest = max(_UNITS.values()) + 1
    for number, unit in _INTERVAL_PART.findall(text):
        part = number + unit
        size = _UNITS.get(unit)
        if size is None:
            raise Refused(part, f"{unit!r} is no unit of time", "units are s, min, h, d and w")
        if size >= largest:
            raise Refused(part, "each unit comes once, the largest first", 'such as "1h30min"')
        if "." in number or len(number) > 9:
            raise Refused(part, "not a whole number of at most nine digits", 'write "1h30min" rather than "1.5h"')
        largest = size
        seconds += int(number) * size
    # Compared as numbers: nine digits of weeks are more than a timedelta holds.
    if seconds < MIN_INTERVAL.total_seconds():
        raise Refused(text, f"shorter than {_seconds(MIN_INTERVAL)}", 'the shortest interval is "5s"')
    if seconds > MAX_INTERVAL.total_seconds():
        raise Refused(text, f"longer than {MAX_INTERVAL.days} days", 'take a calendar event, such as "yearly"')
    # Kept in UTC: an interval means the same in all zones, and so equal intervals are equal.
    return Interval(text=text, zone=UTC, every=timedelta(seconds=seconds))


def _seconds(span: timedelta) -> str:
    return f"{span.total_seconds():g} s"
