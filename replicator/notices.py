"""What people are told when a replica's state changes, and when. Pure, but for the file of what was told.

A replica is, worst first: in conflict, differing from its source, behind its objective, failed, or well. People
hear when that changes, of all that changed in one message, and not again before some time has passed: what went bad and
got well meanwhile they never hear of. What they were told is kept over restarts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from replicator import units
from replicator.control import ReplicaStatus, State, Status
from replicator.tracker import ReplicaKey

FILE_NAME = "notified.json"
MAX_LISTED = 50
"""Changes that one message lists; of more, how many."""


class Condition(StrEnum):
    """How a replica is, as people are told."""

    CONFLICT = "in conflict"
    DIFFERS = "differs from its source"
    LAGGING = "behind its objective"
    FAILED = "failed"
    WELL = "well"


Told = Mapping[ReplicaKey, Condition]


@dataclass(frozen=True, slots=True)
class Change:
    """A replica is otherwise than people were told last."""

    key: ReplicaKey
    before: Condition
    now: Condition
    row: ReplicaStatus

    @property
    def recovered(self) -> bool:
        """Whether it is well again."""
        return self.now is Condition.WELL


@dataclass(frozen=True, slots=True)
class Message:
    """What is sent."""

    subject: str
    text: str


def condition(row: ReplicaStatus, before: Condition) -> Condition:
    """How a replica is. While a run is under way it is as it was, but for what cannot have to do with that.

    One that has nothing yet is not behind: its first copy takes its time, and if that fails, it has failed.
    """
    if row.state is State.CONFLICT:
        return Condition.CONFLICT
    if row.differing:
        return Condition.DIFFERS
    if row.lag is not None and row.misses_objective:
        return Condition.LAGGING
    if row.state is State.FAILED:
        return Condition.FAILED
    if row.state is State.RUNNING and before in (Condition.CONFLICT, Condition.FAILED):
        return before
    return Condition.WELL


def changes(status: Status, told: Told) -> tuple[Change, ...]:
    """What people do not know yet."""
    found = []
    for row in status.replicas:
        key = ReplicaKey(row.job, row.volume, row.target)
        before = told.get(key, Condition.WELL)
        now = condition(row, before)
        if now is not before:
            found.append(Change(key, before, now, row))
    return tuple(found)


def after(told: Told, status: Status, sent: Iterable[Change]) -> dict[ReplicaKey, Condition]:
    """What people know once these were sent: only what is bad is remembered, and only of replicas that there are."""
    known = {**told, **{change.key: change.now for change in sent}}
    there = {ReplicaKey(row.job, row.volume, row.target) for row in status.replicas}
    return {key: now for key, now in known.items() if now is not Condition.WELL and key in there}


def compose(node: str, found: Iterable[Change]) -> Message:
    """One message of all changes, what is bad first."""
    ordered = sorted(found, key=lambda change: (list(Condition).index(change.now), change.key))
    bad = sum(not change.recovered for change in ordered)
    parts = [f"{bad} bad" if bad else "", f"{len(ordered) - bad} recovered" if bad < len(ordered) else ""]
    first = ordered[0]
    what = f"{first.key.volume} to {first.key.target} {_is(first)}" if len(ordered) == 1 else _joined(parts)
    lines = [line for change in ordered[:MAX_LISTED] for line in _lines(change)]
    if len(ordered) > MAX_LISTED:
        lines.append(f"... and {len(ordered) - MAX_LISTED} more: replicator status")
    return Message(_one_line(f"replicator on {node}: {what}"), "\n".join(lines) + "\n")


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(part for part in parts if part)


def _is(change: Change) -> str:
    if change.recovered:
        return "recovered"
    return str(change.now) if change.now in (Condition.DIFFERS, Condition.FAILED) else f"is {change.now}"


def _lines(change: Change) -> list[str]:
    row = change.row
    found = [_one_line(f"{change.key.volume} to {change.key.target} (job {change.key.job}) {_is(change)}")]
    if row.lag is not None:
        allowed = f", {units.format_duration(row.objective)} allowed" if row.objective is not None else ""
        found.append(f"  {units.format_duration(row.lag)} behind{allowed}")
    if not change.recovered:
        found += [f"  {_one_line(text)}" for text in (row.message, row.hint and f"hint: {row.hint}") if text]
    return found


def _one_line(text: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in text)


def load(path: Path) -> dict[ReplicaKey, Condition]:
    """What people were told, as it was kept; nothing where that cannot be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {ReplicaKey(job, volume, target): Condition(now) for job, volume, target, now in kept}
    except (OSError, ValueError, TypeError):
        return {}


def save(path: Path, told: Told) -> None:
    """Keep it. :raises OSError: it cannot be written"""
    kept = [[key.job, key.volume, key.target, str(now)] for key, now in sorted(told.items())]
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(kept, ensure_ascii=False), encoding="utf-8")
    os.replace(beside, path)  # noqa: PTH105 - as one step
