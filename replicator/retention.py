"""Which snapshots stay and which go, each with its reason. Pure; no I/O, no clock.

The text is what Proxmox users know: ``last=3 hourly=24 daily=7 weekly=4 monthly=12 yearly=1``, also written
``keep-last=3,keep-daily=7``; ``all`` (or ``keep-all=1``, or nothing) keeps everything.

The meaning is that of Proxmox Backup Server (``mark_selections`` in pbs-datastore/src/prune.rs, and the prune simulator
at pbs.proxmox.com/docs/prune-simulator): the options are worked through in the order above, newest snapshot first. Each
one keeps the newest snapshot of each of its periods that no earlier option has covered already, until it has kept as
many as it may. Periods without a snapshot do not count, so the past is not forgotten because a node was off; nothing
depends on today's date. Weeks are ISO weeks, Monday to Sunday.

Two things are ours. The order is that of ``position``, since creation times can lie. Snapshots that are held or in
``protect`` stay whatever the policy says, and are counted by it like all others: ``last=3`` means the three newest,
held or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, fields
from datetime import UTC, datetime, tzinfo

from replicator.errors import ConfigError, Problem
from replicator.model import Version, VersionKind

MAX_KEEP = 100_000
"""The largest number an option may have."""
EXAMPLES = "for example: last=3 hourly=24 daily=7 weekly=4 monthly=12 yearly=1; or: all"

_WORD = re.compile(r"(?:keep-)?(?P<option>[a-z]+)=(?P<count>[0-9]{1,9})")


@dataclass(frozen=True, slots=True)
class Policy:
    """How many snapshots each option keeps, in the order in which the options are worked through.

    All zero keeps everything: there is no policy that keeps nothing.
    """

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0

    @property
    def keeps_all(self) -> bool:
        """Whether nothing is ever destroyed."""
        return not any(count for _, count in self.options())

    def options(self) -> Iterator[tuple[str, int]]:
        """Each option with its count, in their order."""
        for option in fields(self):
            yield option.name, getattr(self, option.name)

    def __str__(self) -> str:
        return " ".join(f"{name}={count}" for name, count in self.options() if count) or "all"


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one version, and why.

    :ivar reason: ``kept: …`` or ``destroyed: …``, one line
    """

    version: Version
    keep: bool
    reason: str


def parse(text: str, *, file: str = "retention policy", key: str = "") -> Policy:
    """Read a policy.

    :param file, key: where the text stands, for the problems
    :raises ConfigError: with every problem of the text, not only the first
    """
    counts: dict[str, int] = {}
    problems: list[str] = []
    keep_all: bool | None = None
    known = [option.name for option in fields(Policy)]
    words = text.replace(",", " ").split()
    for word in words:
        match = _WORD.fullmatch(word)
        option = match["option"] if match else ""
        if word in ("all", "keep-all"):
            keep_all = True
        elif match is None:
            problems.append(f"{_shown(word)} is not OPTION=NUMBER")
        elif option == "all":
            keep_all = match["count"] != "0"
        elif option not in known:
            problems.append(f"{_shown(word)}: there is no option {option!r}, only {', '.join(known)} and all")
        elif option in counts:
            problems.append(f"{option} is given twice")
        else:
            counts[option] = int(match["count"])
            if counts[option] > MAX_KEEP:
                problems.append(f"{_shown(word)} is out of range: 0 to {MAX_KEEP}")
    if keep_all and any(counts.values()):
        problems.append("'all' keeps everything, so the other options have no meaning beside it")
    if (counts and not any(counts.values()) and not keep_all) or (keep_all is False and not counts):
        problems.append("it keeps nothing; write 'all' to keep everything, or at least last=1")
    if problems:
        raise ConfigError(
            f"{_shown(text)} is not a retention policy: {'; '.join(problems)}",
            hint=EXAMPLES,
            problems=[Problem(file, key, problem, EXAMPLES) for problem in problems],
        )
    return Policy(**counts)


def apply(
    versions: Iterable[Version], policy: Policy, *, job: str, protect: Set[str] = frozenset(), zone: tzinfo = UTC
) -> list[Decision]:
    """Decide about every version of a volume.

    :param versions: all of one volume on one node, in any order
    :param job: only this job's snapshots are ours to destroy
    :param protect: guids that stay: the last common version with each target, and what clones began as
    :param zone: the time zone in which hours, days, weeks, months and years begin
    :return: one decision a version, oldest first
    """
    ordered = sorted(versions, key=lambda v: v.position)
    ours = [v for v in ordered if v.job == job and v.kind is VersionKind.SNAPSHOT]
    kept = _select(ours, policy, zone)
    return [_decide(version, policy, job, protect, kept) for version in ordered]


def _decide(version: Version, policy: Policy, job: str, protect: Set[str], kept: dict[str, str]) -> Decision:
    if version.is_diverged:
        return Decision(version, True, "kept: a resync put it aside; only you can destroy it")
    if version.job != job:
        return Decision(version, True, "kept: not made by this job")
    if version.kind is VersionKind.BOOKMARK:
        return Decision(version, True, "kept: a bookmark has no data")
    if policy.keeps_all:
        return Decision(version, True, "kept: the policy keeps all")
    if version.name in kept:
        return Decision(version, True, f"kept: {kept[version.name]}")
    if version.holds:
        return Decision(version, True, f"kept: held by {', '.join(version.holds)}")
    if version.guid in protect:
        return Decision(version, True, "kept: last common version with a target, or what a clone began as")
    return Decision(version, False, f"destroyed: not kept by {policy}")


def _select(ours: list[Version], policy: Policy, zone: tzinfo) -> dict[str, str]:
    """Names of the versions that the policy keeps, each with the option that does and its place in it."""
    newest_first = [(version, version.created.astimezone(zone)) for version in reversed(ours)]
    kept: dict[str, str] = {}
    dropped: set[str] = set()  # in a period of which a newer one is kept: later options do not look at these again
    for option, count in policy.options():
        if not count:
            continue
        period = _PERIODS.get(option)
        covered = {period(when) for version, when in newest_first if version.name in kept} if period else set()
        taken: set[tuple[int, ...]] = set()
        for index, (version, when) in enumerate(newest_first):
            if version.name in kept or version.name in dropped:
                continue
            place = period(when) if period else (index,)
            if place in covered:
                continue
            if place in taken:
                dropped.add(version.name)
                continue
            if len(taken) >= count:
                break
            taken.add(place)
            kept[version.name] = f"{option} {len(taken)} of {count}"
    return kept


_PERIODS: dict[str, Callable[[datetime], tuple[int, ...]]] = {
    "hourly": lambda when: (when.year, when.month, when.day, when.hour),
    "daily": lambda when: (when.year, when.month, when.day),
    "weekly": lambda when: tuple(when.isocalendar()[:2]),
    "monthly": lambda when: (when.year, when.month),
    "yearly": lambda when: (when.year,),
}
"""The period of an option that a moment belongs to; ``last`` has none: each snapshot is its own."""


def _shown(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")
