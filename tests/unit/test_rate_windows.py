"""Rate limits by the time of day: how they are written, which holds when, and that what flows follows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator import config
from replicator.errors import ConfigError, ReplicatorError, UsageError
from replicator.rate_windows import DAYS, RateLimit, Window
from replicator.rates import Rates

MIB = 1 << 20
OFFICE = ("mon..fri 08:00-18:00 = 50MiB/s", "sat,sun = unlimited", "22:00-06:00 = 100MiB/s", "200MiB/s")
MONDAY = datetime(2026, 11, 16)  # noqa: DTZ001 - a wall clock


def at(limit: RateLimit, day: int, time: str) -> int | None:
    hour, minute = map(int, time.split(":"))
    return limit.at(MONDAY + timedelta(days=day, hours=hour, minutes=minute))


@pytest.mark.parametrize(
    ("day", "time", "rate"),
    [
        (0, "07:59", 200), (0, "08:00", 50), (4, "17:59", 50), (4, "18:00", 200), (4, "22:00", 100),
        (5, "05:59", None), (5, "12:00", None), (6, "23:59", None), (0, "00:00", 100), (0, "06:00", 200),
    ],
)  # fmt: skip
def test_the_first_that_holds_counts(day: int, time: str, rate: int | None) -> None:
    assert at(RateLimit.parse(OFFICE), day, time) == (None if rate is None else rate * MIB)


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    limit = RateLimit.parse(["fri 22:00-06:00 = 1MiB/s"])
    held = [(day, time) for day in range(7) for time in ("05:59", "06:00", "21:59", "22:00") if at(limit, day, time)]
    assert held == [(4, "22:00"), (5, "05:59")]
    assert at(RateLimit.parse(["sun 22:00-06:00 = 1MiB/s"]), 0, "05:00") == MIB


def test_forms() -> None:
    assert RateLimit.parse(["200MiB/s"]) == RateLimit(((None, 200 * MIB),))
    assert RateLimit.parse(["  MON..FRI   08:00-18:00=1MiB/s "]) == RateLimit(
        ((Window(frozenset(range(5)), 480, 1080), MIB),)
    )
    assert RateLimit.parse(["sat..mon = UNLIMITED"]).entries[0] == (Window(frozenset({5, 6, 0})), None)
    assert RateLimit.parse(["0:00-24:00 = 1MiB/s"]).entries[0][0] == Window()
    assert RateLimit.parse(["tue = 1MiB/s"]).at(MONDAY) is None


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        ([], "0 limits"),
        (["1MiB/s"] * 51, "51 limits"),
        (["1MiB/s", "mon = 2MiB/s"], "always holds"),
        (["= 1MiB/s"], "no time window"),
        (["mon 08:00-18:00 tue = 1MiB/s"], "no time window"),
        (["mon 08:00 = 1MiB/s"], "'08:00' is no span of times"),
        (["moon = 1MiB/s"], "'moon' is no day"),
        (["mon.. = 1MiB/s"], "'' is no day"),
        (["mon,, = 1MiB/s"], "'' is no day"),
        (["08:00-24:01 = 1MiB/s"], "no clock"),
        (["24:00-08:00 = 1MiB/s"], "no clock"),
        (["08:60-09:00 = 1MiB/s"], "no clock"),
        (["08:00-08:00 = 1MiB/s"], "no time at all"),
        (["mon = fast"], "fast"),
        (["mon = 0MiB/s"], "0"),
        (["unlimited"], "unlimited"),
    ],
)
def test_what_is_refused(texts: list[str], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        RateLimit.parse(texts)
    assert told in str(caught.value)
    assert caught.value.hint


@given(st.lists(st.text("monfri.,=:0123456789- MiB/sunlimted", max_size=30), max_size=4))
def test_any_text_is_read_or_refused(texts: list[str]) -> None:
    try:
        limit = RateLimit.parse(texts)
    except ReplicatorError:
        return
    assert limit.at(MONDAY) is None or limit.at(MONDAY)


@given(
    st.sets(st.sampled_from(range(7)), min_size=1), st.integers(0, 1439), st.integers(1, 1440),
    st.integers(0, 6), st.integers(0, 1439),
)  # fmt: skip
def test_a_window_is_what_it_says(days: set[int], start: int, length: int, day: int, minute: int) -> None:
    """Against counting: minutes since the beginning of each day of the window, in a week that goes round."""
    end = (start + length - 1) % 1440 + 1
    window = Window(frozenset(days), start, end)
    span = end - start if start < end else end + 1440 - start
    if start == end:
        return
    text = f"{','.join(DAYS[d] for d in days)} {start // 60}:{start % 60:02}-{end // 60}:{end % 60:02} = 1MiB/s"
    assert RateLimit.parse([text]).entries[0][0] == window
    now = day * 1440 + minute
    expected = any((now - (d * 1440 + start)) % (7 * 1440) < span for d in days)
    assert window.holds(MONDAY + timedelta(days=day, minutes=minute)) is expected


CONFIG = """
[node]
name = "prox1"
[network]
cluster = "10.99.0.0/24"
listen = "10.99.0.1:8571"
[storage.images]
kind = "image"
path = "/images"
[job.vms]
source = "images:*"
targets = ["images"]
timezone = "{zone}"
rate_limit = {limit}
"""


def test_in_the_configuration() -> None:
    now = datetime.now(UTC)
    for zone in ("Pacific/Kiritimati", "Pacific/Pago_Pago"):  # 25 hours apart: never the same day
        day = DAYS[now.astimezone(ZoneInfo(zone)).weekday()]
        rates = Rates(config.parse(CONFIG.format(zone=zone, limit=f'["{day} = 1MiB/s", "2MiB/s"]')))
        assert (
            rates.of_job("vms") == MIB or datetime.now(ZoneInfo(zone)).date() != now.astimezone(ZoneInfo(zone)).date()
        )
    for limit in ('["mon = 1MiB/s", 5]', "5", "[]", '["1MiB/s", "2MiB/s"]'):
        with pytest.raises(ConfigError) as caught:
            config.parse(CONFIG.format(zone="UTC", limit=limit))
        assert [problem.key for problem in caught.value.problems] == ["job.vms.rate_limit"]
