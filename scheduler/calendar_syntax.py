"""Calendar events as Proxmox VE and Proxmox Backup Server write them.

Format: ``[WEEKDAY] [[YEARS-]MONTHS-DAYS] [[HOURS:]MINUTES[:SECONDS]] [UTC]``, a subset of systemd.time(7) with two
additions of Proxmox: a lone minute list (``*/15``) and repetition within a range (``8..17/3``). Sources: "Calendar
Events" in the Proxmox VE administration guide and in the Proxmox Backup documentation
(https://pbs.proxmox.com/docs/calendarevents.html); the details (bounds, where ``*/N`` counts from, wrapping weekday
ranges, ``UTC``) follow Proxmox's own reader, crate proxmox-time.

Two things are stricter here: a repetition of 0 is refused, and weekday, date and time are separated by white space.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, tzinfo

from scheduler.fields import NumberField, Refused
from scheduler.timeline import FIRST_YEAR, LAST_YEAR, CalendarEvent

WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")

_SECOND = NumberField("second", 0, 59, "..")
_MINUTE = NumberField("minute", 0, 59, "..")
_HOUR = NumberField("hour", 0, 23, "..")
_DAY = NumberField("day of the month", 1, 31, "..")
_MONTH = NumberField("month", 1, 12, "..")
_YEAR = NumberField("year", FIRST_YEAR, LAST_YEAR, "..", star_from=0)

_WEEKDAY_NUMBERS = {name: number for number, day in enumerate(WEEKDAYS) for name in (day, day[:3])}

KEYWORDS = {
    "minutely": "*-*-* *:*:00",
    "hourly": "*-*-* *:00:00",
    "daily": "*-*-* 00:00:00",
    "weekly": "mon *-*-* 00:00:00",
    "monthly": "*-*-01 00:00:00",
    "quarterly": "*-01,04,07,10-01 00:00:00",
    "semiannually": "*-01,07-01 00:00:00",
    "semi-annually": "*-01,07-01 00:00:00",
    "yearly": "*-01-01 00:00:00",
    "annually": "*-01-01 00:00:00",
}


def read_calendar_event(text: str, zone: tzinfo) -> CalendarEvent:
    """Read an event.

    :param text: lower case, single spaces
    :param zone: whose wall clock counts, unless the text ends in ``utc``
    :raises Refused: naming the part that cannot be read
    """
    parts = text.split()
    if parts[-1] == "utc" and len(parts) > 1:
        parts.pop()
        zone = UTC
    if len(parts) == 1 and parts[0] in KEYWORDS:
        parts = KEYWORDS[parts[0]].split()
    event = CalendarEvent(text=text, zone=zone, hours=(0,), minutes=(0,))
    rest = list(parts)
    if rest[0][0].isalpha():
        event = replace(event, weekdays=_read_weekdays(rest.pop(0)))
    if rest and "-" in rest[0] and ":" not in rest[0]:
        event = _read_date(rest.pop(0), event)
    if rest:
        event = _read_time(rest.pop(0), event)
    if rest:
        raise Refused(rest[0], "more than weekdays, a date and a time, in this order")
    return event


def _read_weekdays(text: str) -> tuple[int, ...]:
    found: set[int] = set()
    for item in text.split(","):
        first_text, dots, last_text = item.partition("..")
        first = _weekday(first_text, item)
        last = _weekday(last_text, item) if dots else first
        found.update((first + step) % 7 for step in range((last - first) % 7 + 1))
    return tuple(sorted(found))


def _weekday(text: str, item: str) -> int:
    number = _WEEKDAY_NUMBERS.get(text)
    if number is None:
        remedy = "write a range of weekdays as mon..fri" if "-" in text else "weekdays are mon tue wed thu fri sat sun"
        raise Refused(item, "neither a weekday nor a word such as daily", remedy)
    return number


def _read_date(text: str, event: CalendarEvent) -> CalendarEvent:
    parts = text.split("-")
    if len(parts) == 3:
        # Every year is no list of years, so that an event of every year equals one without a date.
        event = replace(event, years=() if parts[0] == "*" else _YEAR.read(parts[0]))
        parts = parts[1:]
    if len(parts) != 2:
        raise Refused(text, "a date is YEARS-MONTHS-DAYS or MONTHS-DAYS")
    return replace(event, months=_MONTH.read(parts[0]), days=_DAY.read(parts[1]))


def _read_time(text: str, event: CalendarEvent) -> CalendarEvent:
    parts = text.split(":")
    if len(parts) > 3:
        raise Refused(text, "a time is HOURS:MINUTES:SECONDS, HOURS:MINUTES or MINUTES")
    if len(parts) == 1:
        parts.insert(0, "*")  # a lone list is of minutes: "*/15"
    return replace(
        event,
        hours=_HOUR.read(parts[0]),
        minutes=_MINUTE.read(parts[1]),
        seconds=_SECOND.read(parts[2]) if len(parts) == 3 else (0,),
    )
