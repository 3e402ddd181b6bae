"""What alert rules need to know of a node's configuration. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise

from replicator.config import Config
from scheduler.schedule import Schedule, parse_schedule

LEAST_SLACK = timedelta(minutes=5)
MOST_SLACK = timedelta(hours=2)
_RUNS = 200
"""Runs that are looked at to find the longest time between two: more than there are in a week of quarter hours, or in a
year of working days, does not change it."""


@dataclass(frozen=True, slots=True)
class Site:
    """One node.

    :ivar address: where Prometheus finds it, HOST:PORT
    :ivar peers: whether it has any
    :ivar objectives: whether any of its jobs has a max_lag
    :ivar patience: by job that runs by itself, how long it may be without a success before a run was missed
    :ivar at_once: alerts do not wait until something has been wrong for a while
    """

    node: str
    address: str
    peers: bool
    objectives: bool
    patience: Mapping[str, timedelta]
    at_once: bool = False


def site_of(config: Config, address: str, *, at_once: bool = False, now: datetime | None = None) -> Site:
    """What there is to know.

    :raises ScheduleError: a schedule cannot be read
    """
    present = now or datetime.now(UTC)
    jobs = [job for job in config.jobs.values() if job.enabled]
    gaps = {job.name: longest_gap(parse_schedule(job.schedule, job.zone), present) for job in jobs}
    return Site(
        config.node.name,
        address,
        bool(config.peers),
        any(job.max_lag for job in jobs),
        {name: patience(gap) for name, gap in gaps.items() if gap is not None},
        at_once,
    )


def longest_gap(schedule: Schedule, now: datetime) -> timedelta | None:
    """The longest time between two consecutive runs from now on; None: fewer than two follow."""
    runs: list[datetime] = []
    following = schedule.next_after(now)
    while following is not None and len(runs) < _RUNS:
        runs.append(following)
        following = schedule.next_after(following)
    return max((later - earlier for earlier, later in pairwise(runs)), default=None)


def patience(gap: timedelta) -> timedelta:
    """Half as long again, but at least five minutes and at most two hours more: a run takes its time."""
    return gap + min(max(gap / 2, LEAST_SLACK), MOST_SLACK)
