"""Retention: the text, the meaning that Proxmox users know, and what no policy may do."""

from __future__ import annotations

import random
import re
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.errors import ConfigError
from replicator.model import Version
from replicator.retention import MAX_KEEP, Decision, Policy, apply, parse
from tests.support.versions import mark, snap

# -- the text


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("last=3", Policy(last=3)),
        ("last=3 hourly=24 daily=7 weekly=4 monthly=12 yearly=1", Policy(3, 24, 7, 4, 12, 1)),
        ("yearly=1 last=3", Policy(last=3, yearly=1)),
        ("keep-last=3,keep-daily=7", Policy(last=3, daily=7)),
        (" keep-last=3 , daily=7 ", Policy(last=3, daily=7)),
        ("last=0 hourly=24", Policy(hourly=24)),
        ("all", Policy()),
        ("keep-all", Policy()),
        ("keep-all=1", Policy()),
        ("keep-all=0 last=2", Policy(last=2)),
        ("", Policy()),
        ("   ", Policy()),
        (f"last={MAX_KEEP}", Policy(last=MAX_KEEP)),
    ],
)
def test_texts(text: str, policy: Policy) -> None:
    assert parse(text) == policy


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("last", "'last' is not OPTION=NUMBER"),
        ("last=", "'last=' is not OPTION=NUMBER"),
        ("last=-1", "not OPTION=NUMBER"),
        ("last=1.5", "not OPTION=NUMBER"),
        ("last=٣", "not OPTION=NUMBER"),
        ("last=3days", "not OPTION=NUMBER"),
        ("last = 3", "'last' is not OPTION=NUMBER"),
        ("minutely=3", "no option 'minutely'"),
        ("last=100001", "out of range: 0 to 100000"),
        ("last=9999999999999999999999", "not OPTION=NUMBER"),
        ("last=3 last=4", "last is given twice"),
        ("last=3 keep-last=3", "last is given twice"),
        ("last=0", "keeps nothing"),
        ("last=0 daily=0", "keeps nothing"),
        ("keep-all=0", "keeps nothing"),
        ("all last=3", "no meaning beside it"),
        ("x" * 500, "..."),
    ],
)
def test_texts_that_are_refused(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert problem in str(caught.value)
    assert "last=3 hourly=24" in caught.value.hint
    assert len(str(caught.value)) < 400


def test_all_problems_are_told_at_once_with_their_place() -> None:
    with pytest.raises(ConfigError) as caught:
        parse("last=x daily=7 daily=8 fortnightly=1", file="replicator.toml", key="job.vms.keep.target")
    assert [p.key for p in caught.value.problems] == ["job.vms.keep.target"] * 3
    assert {p.file for p in caught.value.problems} == {"replicator.toml"}


counts = st.integers(0, 5)
policies = st.builds(Policy, counts, counts, counts, counts, counts, counts)


@given(st.builds(Policy, *[st.integers(0, MAX_KEEP)] * 6))
def test_text_round_trip(policy: Policy) -> None:
    assert parse(str(policy)) == policy


@given(st.text(st.sampled_from("last=hourydikepn-0123 ,all"), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        policy = parse(text)
    except ConfigError as error:
        assert error.problems
    else:
        assert parse(str(policy)) == policy


# -- the meaning


def when(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def series(*texts: str) -> list[Version]:
    """Snapshots of those times, in that order; the guid is the text."""
    return [snap(n, guid=text, created=when(text)) for n, text in enumerate(texts)]


def kept(versions: list[Version], text: str, zone: str = "UTC") -> list[str]:
    decisions = apply(versions, parse(text), job="vms", zone=ZoneInfo(zone))
    return [d.version.guid for d in decisions if d.keep]


def reasons(decisions: list[Decision]) -> list[str]:
    return [d.reason for d in decisions]


def test_last_keeps_the_newest() -> None:
    versions = series("2026-11-20T08:00", "2026-11-20T08:01", "2026-11-20T08:02")
    assert kept(versions, "last=2") == ["2026-11-20T08:01", "2026-11-20T08:02"]


def test_the_newest_of_each_period_stays() -> None:
    versions = series("2026-11-19T10:00", "2026-11-19T22:00", "2026-11-20T01:00", "2026-11-20T08:00")
    assert kept(versions, "daily=2") == ["2026-11-19T22:00", "2026-11-20T08:00"]


def test_an_option_covers_only_what_earlier_ones_left() -> None:
    """last=1 covers the eighth hour, so hourly=1 goes to the seventh; both cover the 20th, so daily=1 to the 19th."""
    versions = series(
        "2026-11-19T22:00", "2026-11-20T07:10", "2026-11-20T07:50", "2026-11-20T08:00", "2026-11-20T08:30"
    )
    decisions = apply(versions, parse("last=1 hourly=1 daily=1"), job="vms")
    assert reasons(decisions) == [
        "kept: daily 1 of 1",
        "destroyed: not kept by last=1 hourly=1 daily=1",
        "kept: hourly 1 of 1",
        "destroyed: not kept by last=1 hourly=1 daily=1",
        "kept: last 1 of 1",
    ]


def test_periods_without_a_snapshot_do_not_count() -> None:
    versions = series("2020-01-01T00:00", "2023-06-01T00:00", "2026-11-20T08:00")
    assert kept(versions, "daily=3") == [v.guid for v in versions]
    assert kept(versions, "hourly=2") == ["2023-06-01T00:00", "2026-11-20T08:00"]


def test_weeks_are_iso_weeks() -> None:
    """2026-01-01 is a Thursday: it and 2025-12-29 (Monday) are in week 1 of 2026, 2025-12-28 (Sunday) in week 52."""
    versions = series("2025-12-28T12:00", "2025-12-29T12:00", "2026-01-01T12:00")
    assert kept(versions, "weekly=5") == ["2025-12-28T12:00", "2026-01-01T12:00"]
    assert kept(versions, "yearly=5") == ["2025-12-29T12:00", "2026-01-01T12:00"]


def test_days_begin_in_the_given_time_zone() -> None:
    versions = series("2026-11-19T22:30", "2026-11-19T23:30")
    assert kept(versions, "daily=5") == ["2026-11-19T23:30"]
    assert kept(versions, "daily=5", "Europe/Berlin") == ["2026-11-19T22:30", "2026-11-19T23:30"]


def test_daily_snapshots_thin_out() -> None:
    """One a day at 08:00 for 120 days. From the newest: 3 last (to Nov 18), 13 days (to Nov 5), then the Sundays of the
    weeks not covered yet, then the last days of the months not covered yet."""
    start = when("2026-07-24T08:00")
    versions = [snap(n, created=start + timedelta(days=n)) for n in range(120)]
    assert versions[-1].created == when("2026-11-20T08:00")
    decisions = apply(versions, parse("last=3 daily=13 weekly=2 monthly=2"), job="vms")
    stays = [d.version.created.strftime("%m-%d") for d in decisions if d.keep]
    days = [f"11-{n:02d}" for n in range(5, 21)]
    assert stays == ["08-31", "09-30", "10-25", "11-01", *days]


def test_creation_times_that_lie_do_not_change_what_is_newest() -> None:
    versions = series("2030-01-01T00:00", "1999-01-01T00:00", "2026-11-20T08:00")
    assert kept(versions, "last=1") == ["2026-11-20T08:00"]


def test_what_is_not_ours_stays_and_does_not_count() -> None:
    ours, newest = series("2026-11-20T08:00", "2026-11-20T08:01")
    other = snap(7, job="other")
    foreign = snap(8, name="before-upgrade")
    aside = snap(9, name="diverged-20261120T080900.000Z")
    bookmark = mark(10, name=ours.name)
    decisions = apply([ours, newest, other, foreign, aside, bookmark], parse("last=1"), job="vms")
    assert reasons(decisions) == [
        "destroyed: not kept by last=1",
        "kept: last 1 of 1",
        "kept: not made by this job",
        "kept: not made by this job",
        "kept: a resync put it aside; only you can destroy it",
        "kept: a bookmark has no data",
    ]


def test_a_job_whose_name_begins_like_another_is_another() -> None:
    versions = [snap(1, job="vm"), snap(2, job="vm_s"), snap(3, job="vms"), snap(4, job="vms")]
    gone = [d.version.guid for d in apply(versions, parse("last=1"), job="vms") if not d.keep]
    assert gone == ["guid3"]


def test_held_and_protected_ones_stay() -> None:
    versions = [snap(1, holds=["a", "b"]), snap(2), snap(3), snap(4, holds=["a"])]
    decisions = apply(versions, parse("last=1"), job="vms", protect={"guid2", "guid4"})
    assert reasons(decisions) == [
        "kept: held by a, b",
        "kept: last common version with a target, or what a clone began as",
        "destroyed: not kept by last=1",
        "kept: last 1 of 1",
    ]


def test_no_policy_keeps_all() -> None:
    decisions = apply([snap(1), snap(2)], parse(""), job="vms")
    assert reasons(decisions) == ["kept: the policy keeps all"] * 2


def test_no_versions() -> None:
    assert apply([], parse("last=1"), job="vms") == []


# -- what no policy may do

MINUTES = 60 * 24 * 455
moments = st.integers(0, MINUTES).map(lambda n: when("2024-12-01T00:00") + timedelta(minutes=n))
zones = st.sampled_from(["UTC", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns"]).map(ZoneInfo)


@st.composite
def listings(draw: st.DrawFn) -> list[Version]:
    """Versions of a volume: mostly ours, at times that need not follow their order, some held, some foreign."""
    times = draw(st.lists(moments, max_size=40))
    if draw(st.booleans()):
        times.sort()
    kinds = st.sampled_from(["ours"] * 6 + ["held", "foreign", "other", "aside", "bookmark"])
    found = []
    for number, moment in enumerate(times):
        version = snap(number, created=moment)
        match draw(kinds):
            case "held":
                version = replace(version, holds=("tag",))
            case "foreign":
                version = replace(version, name=f"foreign-{number}")
            case "other":
                version = snap(number, created=moment, job="other")
            case "aside":
                version = replace(version, name=f"diverged-{number}")
            case "bookmark":
                version = mark(number)
        found.append(version)
    names = {v.name: v for v in found}
    return list(names.values())


protections = st.sets(st.integers(0, 40).map(lambda n: f"guid{n}"), max_size=3)


def survivors(versions: list[Version], policy: Policy, protect: set[str], zone: ZoneInfo) -> list[Version]:
    return [d.version for d in apply(versions, policy, job="vms", protect=protect, zone=zone) if d.keep]


@given(listings(), policies, protections, zones)
def test_what_must_stay_stays(versions: list[Version], policy: Policy, protect: set[str], zone: ZoneInfo) -> None:
    decisions = apply(versions, policy, job="vms", protect=protect, zone=zone)
    assert [d.version for d in decisions] == sorted(versions, key=lambda v: v.position)
    for decision in decisions:
        version = decision.version
        assert decision.reason.startswith("kept: " if decision.keep else "destroyed: ")
        if version.holds or version.guid in protect or version.job != "vms":
            assert decision.keep
    ours = [d for d in decisions if d.version.job == "vms"]
    assert not ours or ours[-1].keep


@given(listings(), policies, protections, zones)
def test_a_second_time_destroys_nothing_more(
    versions: list[Version], policy: Policy, protect: set[str], zone: ZoneInfo
) -> None:
    once = survivors(versions, policy, protect, zone)
    assert survivors(once, policy, protect, zone) == once


@given(listings(), policies, protections, zones, st.randoms(use_true_random=False))
def test_the_order_of_a_listing_does_not_matter(
    versions: list[Version], policy: Policy, protect: set[str], zone: ZoneInfo, chance: random.Random
) -> None:
    shuffled = list(versions)
    chance.shuffle(shuffled)
    assert survivors(shuffled, policy, protect, zone) == survivors(versions, policy, protect, zone)


@given(listings(), policies, protections, zones, st.sampled_from(fields(Policy)), st.integers(1, 3))
def test_a_larger_number_never_destroys_more(
    versions: list[Version], policy: Policy, protect: set[str], zone: ZoneInfo, option: object, more: int
) -> None:
    """Where periods lie within one another. Weeks do not lie within months: there, as in Proxmox, another weekly one
    may stand for its month, and that month's last one goes."""
    if policy.keeps_all:
        return
    name = option.name  # type: ignore[attr-defined]
    larger = replace(policy, **{name: getattr(policy, name) + more})
    if larger.weekly and (larger.monthly or larger.yearly):
        return
    kept_before = {v.guid for v in survivors(versions, policy, protect, zone)}
    assert kept_before <= {v.guid for v in survivors(versions, larger, protect, zone)}


@given(listings(), policies, protections, zones)
def test_each_option_keeps_no_more_than_its_number(
    versions: list[Version], policy: Policy, protect: set[str], zone: ZoneInfo
) -> None:
    if policy.keeps_all:
        return
    decisions = apply(versions, policy, job="vms", protect=protect, zone=zone)
    for name, count in policy.options():
        assert sum(bool(re.match(rf"kept: {name} \d", d.reason)) for d in decisions) <= count


def test_many_versions() -> None:
    start = when("2020-01-01T00:00")
    versions = [snap(n, created=start + timedelta(minutes=15 * n)) for n in range(65_536)]
    decisions = apply(versions, parse("last=24 hourly=48 daily=14 weekly=8 monthly=12 yearly=2"), job="vms")
    assert sum(d.keep for d in decisions) <= 24 + 48 + 14 + 8 + 12 + 2
