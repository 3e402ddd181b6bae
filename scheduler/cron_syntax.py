"""Cron: ``MINUTE HOUR DAY MONTH WEEKDAY`` as in crontab(5).

Weekdays count from Sunday = 0, and 7 is Sunday too. If both day and weekday are given, either suffices; a field that
begins with ``*`` is not given. (APScheduler's CronTrigger differs in both: it counts from Monday and wants both.)
"""

from __future__ import annotations

from datetime import tzinfo

from scheduler.calendar_syntax import WEEKDAYS
from scheduler.fields import NumberField, Refused
from scheduler.timeline import CalendarEvent

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")

_MINUTE = NumberField("minute", 0, 59, "-")
_HOUR = NumberField("hour", 0, 23, "-")
_DAY = NumberField("day of the month", 1, 31, "-")
_MONTH = NumberField("month", 1, 12, "-", names={name: number for number, name in enumerate(_MONTHS, start=1)})
_WEEKDAY = NumberField(
    "weekday", 0, 7, "-", names={day[:3]: number for number, day in enumerate((WEEKDAYS[6], *WEEKDAYS[:6]))}
)


def read_cron(text: str, zone: tzinfo) -> CalendarEvent:
    """Read five fields.

    :param text: lower case, single spaces
    :raises Refused: naming the field that cannot be read
    """
    fields = text.split()
    if len(fields) != 5:
        raise Refused(text, f"cron has 5 fields, this has {len(fields)}")
    minute, hour, day, month, weekday = fields
    return CalendarEvent(
        text=text,
        zone=zone,
        minutes=_MINUTE.read(minute),
        hours=_HOUR.read(hour),
        days=_DAY.read(day),
        months=_MONTH.read(month),
        weekdays=tuple(sorted({(number - 1) % 7 for number in _WEEKDAY.read(weekday)})),
        either_day=not day.startswith("*") and not weekday.startswith("*"),
    )
