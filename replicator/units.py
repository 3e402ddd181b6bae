"""Durations, sizes and rates: as people write them in a configuration, and as people read them.

==========  ==================================================================================================
durations   ``500ms`` ``30s`` ``45min`` ``1h30min`` ``2d`` ``1w``; several parts from the largest unit down
sizes       ``64KiB`` ``1.5GiB`` (powers of 1024, IEC 80000-13) and ``64kB`` ``1GB`` (powers of 1000)
rates       a size and ``/s``, or bits: ``200MiB/s`` ``1Gbit/s``
==========  ==================================================================================================

A number without a unit is refused: nobody can tell what was meant.
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from replicator.errors import UsageError

DURATION_EXAMPLES = 'for example "30s", "45min", "1h30min" or "2d"'
SIZE_EXAMPLES = 'for example "64KiB", "200MiB" or "1.5GB"'
RATE_EXAMPLES = 'for example "200MiB/s" or "1Gbit/s"'

MAX_DURATION = timedelta(days=36500)
MAX_SIZE = 2**63 - 1

_MILLISECONDS = {
    **dict.fromkeys(("ms", "msec"), 1),
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1000),
    **dict.fromkeys(("m", "min", "minute", "minutes"), 60_000),
    **dict.fromkeys(("h", "hr", "hour", "hours"), 3_600_000),
    **dict.fromkeys(("d", "day", "days"), 86_400_000),
    **dict.fromkeys(("w", "week", "weeks"), 604_800_000),
}
_BINARY = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")
_BYTES = {
    "B": 1,
    **{unit: 1024**power for power, unit in enumerate(_BINARY, 1)},
    **{unit: 1000**power for power, unit in enumerate(("kB", "MB", "GB", "TB", "PB", "EB"), 1)},
    "KB": 1000,
}
_BITS = {"bit": 1, "kbit": 1000, "Mbit": 1000**2, "Gbit": 1000**3, "Tbit": 1000**4}

_MAX_TEXT = 64
_DURATION = re.compile(r"(?:[0-9]{1,9} ?[a-z]+ ?)+", re.ASCII)
_DURATION_PART = re.compile(r"([0-9]+) ?([a-z]+)", re.ASCII)
_AMOUNT = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,6}))? ?([A-Za-z]*)", re.ASCII)


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "...")


def parse_duration(text: str) -> timedelta:
    """``"1h30min"`` -> timedelta, above zero.

    :raises UsageError: no unit, an unknown one, one twice or out of order, zero, or more than a hundred years
    """
    even = text.strip().lower()
    if len(even) > _MAX_TEXT or not _DURATION.fullmatch(even):
        why = "has no unit" if even.isdecimal() else "is not a duration"
        raise UsageError(f"{_shown(text)} {why}", hint=DURATION_EXAMPLES)
    total = 0
    last = max(_MILLISECONDS.values()) + 1
    for number, unit in _DURATION_PART.findall(even):
        size = _MILLISECONDS.get(unit)
        if size is None:
            raise UsageError(f"{_shown(text)}: {unit!r} is no unit of time", hint="units are ms, s, min, h, d and w")
        if size >= last:
            raise UsageError(f"{_shown(text)}: each unit comes once, the largest first", hint=DURATION_EXAMPLES)
        last = size
        total += int(number) * size
    if total == 0:
        raise UsageError(f"{_shown(text)} is no time at all", hint=DURATION_EXAMPLES)
    if total > MAX_DURATION / timedelta(milliseconds=1):
        raise UsageError(f"{_shown(text)} is more than a hundred years", hint=DURATION_EXAMPLES)
    return timedelta(milliseconds=total)


def _parse_amount(text: str, units: dict[str, int], what: str, examples: str) -> tuple[int, int]:
    """Amount in the smallest unit, times a million, and the unit's factor: decimals stay exact in integers."""
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise UsageError(f"{_shown(text)} is not a {what}", hint=examples)
    whole, fraction, unit = match.groups()
    if not unit:
        raise UsageError(f"{_shown(text)} has no unit", hint=examples)
    factor = units.get(unit)
    if factor is None:
        right = next((known for known in units if known.lower() == unit.lower()), None)
        if right is not None:
            hint = f'write "{right}"'
        elif len(unit) == 1 and f"{unit.upper()}iB" in units:
            hint = f'write "{unit.upper()}iB" (powers of 1024) or "{"k" if unit in "kK" else unit.upper()}B" (of 1000)'
        else:
            hint = examples
        raise UsageError(f"{_shown(text)}: {unit!r} is no unit of a {what}", hint=hint)
    return int(whole + (fraction or "").ljust(6, "0")), factor


def parse_size(text: str) -> int:
    """``"1.5GiB"`` -> bytes, at least 1.

    :raises UsageError: no unit, an unknown or ambiguous one ("200M"), zero, or above ``MAX_SIZE``
    """
    millionths, factor = _parse_amount(text.strip(), _BYTES, "size", SIZE_EXAMPLES)
    return _in_range(text, millionths * factor // 1_000_000, SIZE_EXAMPLES)


def parse_rate(text: str) -> int:
    """``"200MiB/s"`` or ``"1Gbit/s"`` -> bytes per second, at least 1.

    :raises UsageError: as :func:`parse_size`, or without ``/s``
    """
    amount, slash, per = text.strip().partition("/")
    if slash != "/" or per.strip() != "s":
        raise UsageError(f"{_shown(text)} is not a rate: it does not end in '/s'", hint=RATE_EXAMPLES)
    amount = amount.strip()
    if amount.endswith("bit"):
        millionths, factor = _parse_amount(amount, _BITS, "rate", RATE_EXAMPLES)
        millionths //= 8
    else:
        millionths, factor = _parse_amount(amount, _BYTES, "rate", RATE_EXAMPLES)
    return _in_range(text, millionths * factor // 1_000_000, RATE_EXAMPLES)


def _in_range(text: str, value: int, examples: str) -> int:
    if value < 1:
        raise UsageError(f"{_shown(text)} is nothing at all", hint=examples)
    if value > MAX_SIZE:
        raise UsageError(f"{_shown(text)} is more than any storage has", hint=examples)
    return value


def format_size(size: float) -> str:
    """Bytes for people, three significant digits: ``512 B``, ``1.41 GiB``."""
    if size < 0:
        return "-" + format_size(-size)
    if round(size) < 1024:
        return f"{round(size)} B"
    value = float(size)
    for unit in _BINARY:
        value /= 1024
        # 1023.6 would show as "1024 KiB".
        if value < 1023.5 or unit == _BINARY[-1]:
            break
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    return f"{value:.{digits}f} {unit}"


def format_rate(rate: float) -> str:
    """Bytes per second for people: ``210 MiB/s``."""
    return f"{format_size(rate)}/s"


def format_duration(duration: timedelta | float) -> str:
    """A duration (or seconds) for people, its two largest units: ``0.4 s``, ``3 min 20 s``, ``2 d 5 h``."""
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    if seconds < 0:
        return "-" + format_duration(-seconds)
    if seconds < 0.0995:
        return f"{round(seconds * 1000)} ms"
    if seconds < 9.95:
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    whole = round(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            # Rounded to the smaller unit first, so that 59 min 59.6 s becomes 1 h, not "59 min 60 s".
            first, rest = divmod(whole // part * part, size)
            return f"{first} {unit}" + (f" {rest // part} {smaller}" if rest else "")
    return f"{whole} s"


def format_age(moment: datetime | None, now: datetime) -> str:
    """How long ago (or ahead) a moment is: ``3 min 20 s ago``, ``in 12 s``, ``now``; ``never`` for None."""
    if moment is None:
        return "never"
    seconds = (now - moment).total_seconds()
    if abs(seconds) < 1:
        return "now"
    return f"{format_duration(round(seconds))} ago" if seconds > 0 else f"in {format_duration(round(-seconds))}"


def format_setting(duration: timedelta) -> str:
    """A duration as the configuration writes it: ``1h30min``; :func:`parse_duration` reads it back."""
    rest = duration // timedelta(milliseconds=1)
    parts = []
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000), ("ms", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts) or "0s"
