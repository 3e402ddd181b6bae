"""What crosses the local socket: values, events and errors as JSON, the same for the daemon and its client.

Answers are the dataclasses of :mod:`replicator.control` as pydantic writes them. Long work answers with NDJSON, one
event a line::

    {"kind": "progress" | "note" | "report" | "verification" | "resync", "value": {...}}
    {"kind": "heartbeat"}
    {"kind": "result", "value": ...}        the last line of work that was done
    {"kind": "error", "value": {...}}       the last line of work that was not; see Failure
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pydantic_core
from pydantic import TypeAdapter, ValidationError

from replicator.control import (
    Finding,
    Happening,
    HistoryEntry,
    Note,
    OrphanReport,
    PlannedReplica,
    PruneReport,
    Restored,
    ResyncPreview,
    RolePreview,
    RoleReport,
    RunReport,
    SideSnapshots,
    Status,
)
from replicator.errors import ConfigError, ConflictError, Problem, ProtocolError, ReplicatorError, rebuild_error
from replicator.model import Progress
from replicator.verification import Resync, Verification

SOCKET_NAME = "replicator.sock"
"""The daemon's socket, within its state directory."""
PREFIX = "/api/v1"
NDJSON = "application/x-ndjson"
HEARTBEAT_SECONDS = 2.0
"""Silence on a stream of events, at most."""
HEARTBEAT = b'{"kind":"heartbeat"}\n'
MAX_TEXT = 4096
"""Characters of one argument, at most."""
INTERNAL = "internal"
"""Code of an error that is a mistake in the program."""


@dataclass(frozen=True, slots=True)
class Health:
    """That the daemon answers, and which version of it.

    :ivar scheduler_seen: when its scheduler last came round
    :ivar certificate_expires: None: this node has none
    """

    status: str
    version: str
    scheduler_seen: datetime | None = None
    certificate_expires: datetime | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """Something without more to say was done."""

    message: str = "done"


@dataclass(frozen=True, slots=True)
class SyncRequest:
    """Body of ``POST sync``."""

    job: str
    volume: str | None = None
    target: str | None = None


@dataclass(frozen=True, slots=True)
class ResyncRequest:
    """Body of ``POST resync``."""

    volume: str
    target: str | None = None
    full: bool = False


@dataclass(frozen=True, slots=True)
class VerifyRequest:
    """Body of ``POST verify``."""

    volume: str
    target: str | None = None
    snapshot: str | None = None
    repair: bool = False
    scrub: bool = False


@dataclass(frozen=True, slots=True)
class PruneOrder:
    """Body of ``POST prune``."""

    job: str
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class OrphanOrder:
    """Body of ``POST remove-orphans``; ``wanted`` as ``GET orphans`` gave it."""

    job: str
    wanted: tuple[OrphanReport, ...]


@dataclass(frozen=True, slots=True)
class RestoreRequest:
    """Body of ``POST restore``. ``snapshot`` is ``STORAGE:NAME@SNAPSHOT``, ``to`` is ``STORAGE:NAME``."""

    snapshot: str
    to: str


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of :mod:`replicator.errors` as JSON.

    :ivar kind: that of a conflict
    :ivar problems: those of a configuration
    """

    code: str
    message: str
    hint: str
    exit_code: int = 1
    retryable: bool = False
    kind: str = ""
    problems: tuple[Problem, ...] = ()

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """How an error is told; of a mistake in the program no more than its type and text."""
        if not isinstance(error, ReplicatorError):
            return cls(
                INTERNAL,
                f"internal error: {type(error).__name__}: {error}",
                "this is a mistake in replicator; the daemon's log has the details",
            )
        return cls(
            error.code,
            error.message,
            error.hint,
            error.exit_code,
            error.retryable,
            error.kind if isinstance(error, ConflictError) else "",
            error.problems if isinstance(error, ConfigError) else (),
        )

    def rebuild(self) -> ReplicatorError:
        """The error that was told."""
        if self.code == INTERNAL:
            return ReplicatorError(self.message, hint=self.hint)
        error = rebuild_error(self.code, self.message, self.hint)
        if isinstance(error, ConfigError):
            error.problems = self.problems
        if isinstance(error, ConflictError):
            error.kind = self.kind
        return error


HEALTH = TypeAdapter(Health)
DONE = TypeAdapter(Done)
FAILURE = TypeAdapter(Failure)
STATUS = TypeAdapter(Status)
PLAN = TypeAdapter(tuple[PlannedReplica, ...])
PREVIEWS = TypeAdapter(tuple[ResyncPreview, ...])
SNAPSHOTS = TypeAdapter(tuple[SideSnapshots, ...])
HISTORY = TypeAdapter(tuple[HistoryEntry, ...])
FINDINGS = TypeAdapter(tuple[Finding, ...])
REPORTS = TypeAdapter(tuple[RunReport, ...])
RESYNCS = TypeAdapter(tuple[Resync, ...])
VERIFICATIONS = TypeAdapter(tuple[Verification, ...])
PRUNES = TypeAdapter(tuple[PruneReport, ...])
ORPHANS = TypeAdapter(tuple[OrphanReport, ...])
RESTORED = TypeAdapter(Restored)
ROLE_PREVIEW = TypeAdapter(RolePreview)
ROLE_REPORT = TypeAdapter(RoleReport)

_HAPPENINGS: tuple[tuple[str, type[Happening], TypeAdapter[Any]], ...] = (
    ("progress", Progress, TypeAdapter(Progress)),
    ("note", Note, TypeAdapter(Note)),
    ("report", RunReport, TypeAdapter(RunReport)),
    ("verification", Verification, TypeAdapter(Verification)),
    ("resync", Resync, TypeAdapter(Resync)),
)


def event(kind: str, value: bytes) -> bytes:
    """One line of a stream; ``value`` is JSON already."""
    return b'{"kind":"%s","value":%s}\n' % (kind.encode(), value)


def happening_event(happening: Happening) -> bytes:
    """The line that tells a happening."""
    for kind, cls, adapter in _HAPPENINGS:
        if isinstance(happening, cls):
            return event(kind, adapter.dump_json(happening))
    raise TypeError(f"{type(happening).__name__} is no happening")


@dataclass(frozen=True, slots=True)
class Event:
    """A line of a stream, as it was read; ``value`` is what the JSON has."""

    kind: str
    value: Any = None

    @classmethod
    def read(cls, line: bytes) -> Event:
        """:raises ProtocolError: not an event"""
        try:
            found = pydantic_core.from_json(line)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
            raise ProtocolError(
                f"the daemon sent a line that is no event: {line[:80]!r}", hint="restart the daemon after an upgrade"
            )
        return cls(found["kind"], found.get("value"))

    def happening(self) -> Happening | None:
        """What it tells; None for kinds that tell nothing (heartbeats, and those of a later version).

        :raises ProtocolError: its value is not of its kind
        """
        for kind, _, adapter in _HAPPENINGS:
            if kind == self.kind:
                happening: Happening = read(adapter, self.value)
                return happening
        return None


def read(adapter: TypeAdapter[Any], value: object) -> Any:
    """Make a value of what JSON has.

    :raises ProtocolError: it is not of that type
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ProtocolError(
            f"the daemon's answer cannot be read: {error.errors()[0]['msg']}",
            hint="daemon and command line must be of the same version: restart the daemon after an upgrade",
        ) from None


def read_json(adapter: TypeAdapter[Any], text: bytes) -> Any:
    """As :func:`read`, of JSON text."""
    try:
        return read(adapter, pydantic_core.from_json(text))
    except ValueError:
        raise ProtocolError(
            f"the daemon's answer is no JSON: {text[:80]!r}", hint="is something else listening there?"
        ) from None
