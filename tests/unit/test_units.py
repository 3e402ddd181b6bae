"""Durations, sizes and rates."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import units
from replicator.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("500ms", 0.5),
        ("45min", 2700),
        ("45 min", 2700),
        ("1h30min", 5400),
        ("1h 30min", 5400),
        ("2d", 172800),
        ("1w", 604800),
        (" 10S ", 10),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert units.parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("30", "has no unit"),
        ("", "not a duration"),
        ("-5s", "not a duration"),
        ("1.5h", "not a duration"),
        ("٣s", "not a duration"),
        ("5 parsecs", "no unit of time"),
        ("30min1h", "largest first"),
        ("1h1h", "largest first"),
        ("0s", "no time at all"),
        ("999999999w", "hundred years"),
        ("1s" * 500, "not a duration"),
    ],
)
def test_durations_refused(text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part) as caught:
        units.parse_duration(text)
    assert caught.value.hint
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1B", 1),
        ("64KiB", 65536),
        ("200 MiB", 200 * 1024**2),
        ("1.5GiB", 3 * 512 * 1024**2),
        ("1GB", 10**9),
        ("64kB", 64000),
        ("64KB", 64000),
        ("0.1TB", 10**11),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "part", "hint"),
    [
        ("100", "has no unit", "MiB"),
        ("200M", "'M' is no unit", '"MiB" (powers of 1024) or "MB"'),
        ("200k", "'k' is no unit", '"KiB" (powers of 1024) or "kB"'),
        ("200mib", "'mib' is no unit", 'write "MiB"'),
        ("200MiB/s", "not a size", "MiB"),
        ("0MiB", "nothing at all", "MiB"),
        ("0.000001B", "nothing at all", "MiB"),
        ("999999EiB", "more than any storage", "MiB"),
        ("-1GiB", "not a size", "MiB"),
        ("1e9B", "not a size", "MiB"),
    ],
)
def test_sizes_refused(text: str, part: str, hint: str) -> None:
    with pytest.raises(UsageError, match=part) as caught:
        units.parse_size(text)
    assert hint in caught.value.hint


def test_rates() -> None:
    assert units.parse_rate("200MiB/s") == 200 * 1024**2
    assert units.parse_rate("1 Gbit/s") == 125_000_000
    assert units.parse_rate("2.5Gbit/s") == 312_500_000
    for text in ("200MiB", "200MiB/min", "1Gbits/s", "0bit/s"):
        with pytest.raises(UsageError):
            units.parse_rate(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1024**2 - 1, "1.00 MiB"),
        (1.41 * 1024**3, "1.41 GiB"),
        (15 * 1024**2, "15.0 MiB"),
        (123 * 1024**2, "123 MiB"),
        (2**70, "1024 EiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert units.format_size(size) == text


def test_rate_for_people() -> None:
    assert units.format_rate(210 * 1024**2) == "210 MiB/s"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.02, "20 ms"),
        (0.4, "0.4 s"),
        (9, "9 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (200, "3 min 20 s"),
        (3600, "1 h"),
        (3599.6, "1 h"),
        (5400, "1 h 30 min"),
        (86399, "23 h 59 min"),
        (2 * 86400 + 5 * 3600 + 59 * 60, "2 d 5 h"),
        (-30, "-30 s"),
    ],
)
def test_durations_for_people(seconds: float, text: str) -> None:
    assert units.format_duration(seconds) == text
    assert units.format_duration(timedelta(seconds=seconds)) == text


def test_ages() -> None:
    now = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
    assert units.format_age(None, now) == "never"
    assert units.format_age(now - timedelta(seconds=200.4), now) == "3 min 20 s ago"
    assert units.format_age(now + timedelta(seconds=12), now) == "in 12 s"
    assert units.format_age(now - timedelta(milliseconds=3), now) == "now"


@given(st.integers(min_value=1, max_value=10**12))
def test_settings_read_back(milliseconds: int) -> None:
    duration = timedelta(milliseconds=milliseconds)
    assert units.parse_duration(units.format_setting(duration)) == duration


@given(st.text(max_size=80))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (units.parse_duration, units.parse_size, units.parse_rate):
        try:
            value = parse(text)
        except UsageError:
            continue
        assert value
