"""Whether all is well, in one line, as monitoring plugins say it. Pure.

The line and the exit status are those of https://www.monitoring-plugins.org/doc/guidelines.html: 0 OK, 1 WARNING,
2 CRITICAL, 3 UNKNOWN; after ``|`` come figures, ``'label'=value[unit];warning;critical;minimum``. What is how grave:

=========  =====================================================================================================
CRITICAL   no daemon answers; the scheduler stands still; a replica is in conflict, is further behind than its job
           allows, is known to differ from its source, or, without an objective, failed three times in a row; the
           certificate is expired
WARNING    a run failed and the replica is still within its objective; a replica has nothing yet; a job is paused,
           or no volume of it is known; a peer is down; the certificate ends soon
UNKNOWN    it could not be found out: wrong usage or configuration, no right to ask, no such volume
=========  =====================================================================================================
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum

from replicator import units
from replicator.control import PeerStatus, ReplicaStatus, State, Status

STALLED = timedelta(seconds=60)
"""The scheduler comes round every second; if it did not for so long, nothing runs by itself."""
EXPIRY_WARNING = timedelta(days=20)
"""A certificate is renewed 30 days before it expires; one that is nearer to its end than this was not."""
FAILURES = 3
"""Failed runs in a row that are critical where no objective says how far a replica may be behind."""
TOLD = 3
"""Causes that are told in the line; of more, how many."""


class Grade(IntEnum):
    """How grave it is; the value is the exit status."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure for graphs.

    :ivar critical: the value beyond which it is critical; None: there is none
    """

    label: str
    value: float
    unit: str = ""
    critical: float | None = None

    def __str__(self) -> str:
        label = "".join(letter for letter in self.label if letter.isprintable() and letter not in "'=|")
        critical = "" if self.critical is None else f"{self.critical:g}"
        return f"'{label}'={round(self.value, 3):.15g}{self.unit};;{critical};0"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said.

    :ivar text: what is the matter, worst first
    """

    grade: Grade
    text: str
    figures: tuple[Figure, ...] = ()

    def line(self) -> str:
        """The one line, without control characters; ``|`` stands only before the figures."""
        text = "".join(" " if not letter.isprintable() else letter for letter in self.text).replace("|", "/")
        figures = " ".join(map(str, self.figures))
        return f"REPLICATOR {self.grade.name}: {text}" + (f" | {figures}" if figures else "")


_Cause = tuple[Grade, str]


def judge(
    status: Status,
    *,
    jobs: Iterable[str],
    scheduler_seen: datetime | None,
    certificate_expires: datetime | None,
    volume: str | None = None,
) -> Verdict:
    """How this node is, or one of its volumes.

    :param jobs: those that are enabled
    :param scheduler_seen: when the scheduler last came round
    :param certificate_expires: None: this node has none
    :param volume: only this one, as ``status`` names it
    """
    rows = [row for row in status.replicas if volume in (None, row.volume)]
    if volume is not None and not rows:
        return Verdict(Grade.UNKNOWN, f"no job of {status.node} replicates a volume {volume}")
    nodes = {row.target.partition(":")[0] for row in rows} | {row.volume.partition("/")[0] for row in rows}
    peers = [peer for peer in status.peers if volume is None or peer.node in nodes]
    causes = [
        *_of_scheduler(scheduler_seen, status.now),
        *_of_certificate(certificate_expires, status.now),
        *(cause for row in rows for cause in _of_replica(row)),
        *(_idle_jobs(jobs, rows) if volume is None else ()),
        *((Grade.WARNING, _away(peer)) for peer in peers if not peer.up),
    ]
    causes.sort(key=lambda cause: -cause[0])
    if causes:
        more = f"; and {len(causes) - TOLD} more" if len(causes) > TOLD else ""
        text = "; ".join(text for _, text in causes[:TOLD]) + more
    else:
        text = _all_well(status.node, rows)
    figures = _figures_of_node(rows, peers) if volume is None else _figures_of_volume(rows)
    return Verdict(causes[0][0] if causes else Grade.OK, text, figures)


def _of_scheduler(seen: datetime | None, now: datetime) -> Iterator[_Cause]:
    if seen is None or now - seen > STALLED:
        since = "" if seen is None else f" for {units.format_duration(now - seen)}"
        yield Grade.CRITICAL, f"the scheduler stands still{since}"


def _of_certificate(expires: datetime | None, now: datetime) -> Iterator[_Cause]:
    if expires is not None and expires <= now:
        yield Grade.CRITICAL, f"the certificate expired {units.format_age(expires, now)}"
    elif expires is not None and expires - now < EXPIRY_WARNING:
        yield Grade.WARNING, f"the certificate ends in {units.format_duration(expires - now)}"


def _of_replica(row: ReplicaStatus) -> Iterator[_Cause]:
    name = f"{row.volume} to {row.target}"
    why = f": {row.message}" if row.message else ""
    if row.differing:
        yield Grade.CRITICAL, f"{name} differs from its source in {units.format_size(row.differing)}"
    behind = row.misses_objective and not (row.lag is None and row.state is State.RUNNING)
    if row.state is State.CONFLICT:
        yield Grade.CRITICAL, f"{name} is in conflict{why}"
    elif behind and row.lag is not None and row.objective is not None:
        lag, objective = units.format_duration(row.lag), units.format_duration(row.objective)
        yield Grade.CRITICAL, f"{name} is {lag} behind, {objective} are allowed" + (why if row.failures else "")
    elif row.state is State.FAILED:
        grave = behind or (row.objective is None and row.failures >= FAILURES)
        times = "" if row.failures < 2 else f" {row.failures} times in a row"
        yield Grade.CRITICAL if grave else Grade.WARNING, f"{name} failed{times}{why}"
    elif row.lag is None:
        yield Grade.CRITICAL if behind else Grade.WARNING, f"{name} has nothing yet"
    if row.paused:
        yield Grade.WARNING, f"job {row.job} is paused, {name} with it"


def _idle_jobs(jobs: Iterable[str], rows: Sequence[ReplicaStatus]) -> Iterator[_Cause]:
    known = {row.job for row in rows}
    for job in jobs:
        if job not in known:
            yield Grade.WARNING, f"no volume of job {job} is known"


def _away(peer: PeerStatus) -> str:
    return f"peer {peer.node} is down" + (f": {peer.message}" if peer.message else "")


def _all_well(node: str, rows: Sequence[ReplicaStatus]) -> str:
    if not rows:
        return f"{node} replicates nothing by itself, and answers"
    lags = [row.lag for row in rows if row.lag is not None]
    behind = f", at most {units.format_duration(max(lags))} behind" if lags else ""
    return f"{len(rows)} replica{'' if len(rows) == 1 else 's'}{behind}"


def _figures_of_node(rows: Sequence[ReplicaStatus], peers: Sequence[PeerStatus]) -> tuple[Figure, ...]:
    states = Counter(row.state for row in rows)
    figures = [Figure("replicas", len(rows))]
    figures += [Figure(state.value.replace(" ", "_"), states[state]) for state in State]
    figures.append(Figure("behind", sum(row.misses_objective for row in rows)))
    figures.append(Figure("differing", sum(row.differing for row in rows), "B"))
    figures += [Figure("lag", max(lags), "s")] if (lags := [row.lag for row in rows if row.lag is not None]) else []
    figures.append(Figure("peers_down", sum(not peer.up for peer in peers)))
    return tuple(figures)


def _figures_of_volume(rows: Sequence[ReplicaStatus]) -> tuple[Figure, ...]:
    """The job is part of the label only where two have the same target."""
    targets = Counter(row.target for row in rows)
    figures = []
    for row in rows:
        name = row.target if targets[row.target] == 1 else f"{row.job} {row.target}"
        if row.lag is not None:
            figures.append(Figure(f"lag {name}", row.lag, "s", row.objective))
        figures.append(Figure(f"failures {name}", row.failures))
        figures.append(Figure(f"differing {name}", row.differing, "B", 0))
    return tuple(figures)
