"""What happened: runs, verifications, events. Never what is true now, which only the storages know.

The database is SQLite in the state directory. It may be deleted or damaged at any time, also while the daemon runs:
nothing but history is lost (and, with the next restart, what verifications found to differ: they find it again). A
damaged one is moved aside (``history.sqlite.damaged-<time>``) and a new one begun. No method raises because of the
database; what could not be written or read is logged. Rows older than ``keep`` go, and beyond ``MAX_ROWS`` a table the
oldest; not what is known to differ. Thread-safe; the command line may read while the daemon writes.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeVar

from sqlalchemy import URL, Connection, Engine, Select, Table, create_engine, delete, event, func, insert, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import StaticPool

from replicator import logs
from replicator.history_schema import DIFFERENCES, EVENTS, MIGRATIONS, RUNS, VERIFICATIONS
from replicator.model import format_time

LOG = logging.getLogger(__name__)

FILE_NAME = "history.sqlite"
MAX_ROWS = 500_000
"""Rows of one table: what a thousand jobs write in five days of quarter hours, about 150 MB."""
MAX_TEXT = 2000
"""Characters of a message that are kept."""
BUSY_TIMEOUT = 5.0
"""Seconds to wait for another process that writes."""
PRUNE_EVERY = 1000
"""Rows written between two prunings."""

_Q = TypeVar("_Q")
_R = TypeVar("_R", "Run", "Check", "Event", "Difference")
# What sqlite3 says of a file that is no (whole) database; of a full disk or a busy file it says other things.
_DAMAGED = (
    "malformed",
    "not a database",
    "disk image",
    "no such table",
    "no such column",
    "corrupt",
    "no column named",
)


class Outcome(StrEnum):
    """How a run ended."""

    OK = "ok"
    FAILED = "failed"
    CONFLICT = "conflict"
    CANCELLED = "cancelled"
    SKIPPED = "skipped"


BAD = (Outcome.FAILED, Outcome.CONFLICT)
"""Outcomes that count as failures; cancelled and skipped neither count nor end a series."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a job for one volume and target.

    :ivar code, message: of the error, "" where there was none
    :ivar bytes_done: of changes that were handled; ``bytes_sent``: that crossed the network
    :ivar snapshot_guid, snapshot_name: newest snapshot that the target has complete afterwards, "" where it is unknown
    """

    job: str
    volume: str
    target: str
    started: datetime
    finished: datetime
    outcome: str
    code: str = ""
    message: str = ""
    bytes_done: int = 0
    bytes_sent: int = 0
    snapshot_guid: str = ""
    snapshot_name: str = ""
    attempts: int = 1

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.finished - self.started).total_seconds()


@dataclass(frozen=True, slots=True)
class Check:
    """A verification, a repair or a resync that ended."""

    job: str
    volume: str
    target: str
    kind: Literal["verify", "repair", "resync"]
    finished: datetime
    snapshot_name: str = ""
    checked_bytes: int = 0
    mismatched_bytes: int = 0
    mismatched_ranges: int = 0
    repaired: bool = False
    bytes_sent: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """What a verification found to differ, until something ended it: see :class:`~replicator.verification.Mismatch`."""

    job: str
    volume: str
    target: str
    found: datetime
    snapshot_name: str
    snapshot_guid: str
    differing_bytes: int
    read: bool
    mended: bool
    passed: bool


@dataclass(frozen=True, slots=True)
class Event:
    """Anything else worth remembering: daemon started, peer refused, job paused, database damaged.

    :ivar kind: stable word; ``subject``: what it is about (a job, a peer, a file)
    """

    time: datetime
    kind: str
    subject: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """What the history says of one replica.

    :ivar failures: consecutive ones, up to now
    """

    last_run: Run
    last_success: Run | None
    failures: int


class _Damaged(Exception):
    """The file is not a database of ours."""


class History:
    """The history of this node.

    :param keep: rows older than that are removed; None keeps as many as ``MAX_ROWS`` allows
    :param thorough: look through the whole file when it is opened, as the daemon does at its start
    """

    def __init__(
        self,
        path: Path,
        *,
        keep: timedelta | None = timedelta(days=90),
        thorough: bool = False,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.path = path
        self._keep = keep
        self._thorough = thorough
        self._clock = clock
        self._lock = threading.Lock()
        self._engine: Engine | None = None
        self._file: tuple[int, int] | None = None
        self._written = 0

    # -- writing

    def add_run(self, run: Run) -> None:
        """Remember a run."""
        self._add(RUNS, run)

    def add_check(self, check: Check) -> None:
        """Remember a verification, a repair or a resync."""
        self._add(VERIFICATIONS, check)

    def set_differences(self, job: str, volume: str, target: str, rows: Sequence[Difference]) -> None:
        """From now on this is all that is known to differ in a replica. It is not removed for its age, which would end
        an alarm."""
        table = DIFFERENCES
        values = [_values(row) for row in rows]

        def write(connection: Connection) -> None:
            connection.execute(
                delete(table).where(table.c.job == job, table.c.volume == volume, table.c.target == target)
            )
            if values:
                connection.execute(insert(table), values)

        self._attempt(write, None)

    def add_event(self, kind: str, subject: str, message: str = "") -> None:
        """Remember an event, now."""
        self._add(EVENTS, Event(self._clock(), kind, subject, message))

    def _add(self, table: Table, row: Run | Check | Event) -> None:
        values = _values(row)

        def write(connection: Connection) -> None:
            connection.execute(insert(table).values(values))

        self._attempt(write, None)
        self._written += 1
        if self._written % PRUNE_EVERY == 0:
            self.prune()

    def prune(self) -> int:
        """Remove what is too old or too much; how many rows went."""
        before = None if self._keep is None else self._clock() - self._keep

        def write(connection: Connection) -> int:
            gone = 0
            for table, time in ((RUNS, "finished"), (VERIFICATIONS, "finished"), (EVENTS, "time")):
                if before is not None:
                    gone += connection.execute(delete(table).where(table.c[time] < before)).rowcount
                newest = connection.execute(select(func.max(table.c.id))).scalar()
                if newest is not None:
                    gone += connection.execute(delete(table).where(table.c.id <= newest - MAX_ROWS)).rowcount
            return gone

        return self._attempt(write, 0)

    # -- reading

    def runs(
        self, *, job: str | None = None, volume: str | None = None, target: str | None = None, limit: int = 100
    ) -> list[Run]:
        """Newest first, narrowed by what is given."""
        return self._rows(Run, _narrowed(RUNS, job, volume, target), limit)

    def checks(
        self, *, job: str | None = None, volume: str | None = None, target: str | None = None, limit: int = 100
    ) -> list[Check]:
        """Newest first, narrowed by what is given."""
        return self._rows(Check, _narrowed(VERIFICATIONS, job, volume, target), limit)

    def differences(self, job: str, volume: str, target: str) -> list[Difference]:
        """What is known to differ in a replica, in the order in which it was found."""
        return self._rows(Difference, _narrowed(DIFFERENCES, job, volume, target), MAX_ROWS)[::-1]

    def events(self, *, kind: str | None = None, limit: int = 100) -> list[Event]:
        """Newest first."""
        query = select(EVENTS)
        return self._rows(Event, query if kind is None else query.where(EVENTS.c.kind == kind), limit)

    def summary(self, job: str, volume: str, target: str) -> Summary | None:
        """What there is of one replica; None: nothing."""
        query = _narrowed(RUNS, job, volume, target)
        last = self._rows(Run, query, 1)
        if not last:
            return None
        success = self._rows(Run, query.where(RUNS.c.outcome == Outcome.OK), 1)

        def count(connection: Connection) -> int:
            ok = select(func.coalesce(func.max(RUNS.c.id), 0)).where(
                RUNS.c.job == job, RUNS.c.volume == volume, RUNS.c.target == target, RUNS.c.outcome == Outcome.OK
            )
            bad = select(func.count()).where(
                RUNS.c.job == job,
                RUNS.c.volume == volume,
                RUNS.c.target == target,
                RUNS.c.outcome.in_(BAD),
                RUNS.c.id > ok.scalar_subquery(),
            )
            return connection.execute(bad).scalar_one()

        return Summary(last[0], success[0] if success else None, self._attempt(count, 0))

    def _rows(self, kind: type[_R], query: Select[Any], limit: int) -> list[_R]:
        names = [field.name for field in fields(kind)]

        def read(connection: Connection) -> list[_R]:
            newest = query.order_by(query.selected_columns["id"].desc()).limit(max(0, limit))
            return [
                _restored(kind, {name: row[name] for name in names}) for row in connection.execute(newest).mappings()
            ]

        return self._attempt(read, [])

    # -- the database

    def _attempt(self, work: Callable[[Connection], _Q], otherwise: _Q) -> _Q:
        """Do it in a transaction; on damage once more with a new database; ``otherwise`` if it cannot be done."""
        with self._lock:
            try:
                try:
                    return self._in_transaction(work)
                except (_Damaged, SQLAlchemyError, sqlite3.Error) as error:
                    if not _is_damage(error):
                        raise
                    self._move_aside(str(getattr(error, "orig", None) or error))
                    return self._in_transaction(work)
            except (_Damaged, SQLAlchemyError, sqlite3.Error, OSError, OverflowError) as error:
                logs.event(
                    LOG, "warning", "history unavailable", file=self.path, reason=getattr(error, "orig", None) or error
                )
                self._dispose()
                return otherwise

    def _in_transaction(self, work: Callable[[Connection], _Q]) -> _Q:
        engine = self._engine
        if engine is None or _identity(self.path) != self._file:
            engine = self._open()
        with engine.begin() as connection:
            return work(connection)

    def _open(self) -> Engine:
        """Open the file, or make it, and bring it to today's schema."""
        self._dispose()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        # (SQLite itself removes the write-ahead log of a database that was deleted.)
        engine = self._engine = _engine(self.path)
        with engine.begin() as connection:
            if self._thorough:
                found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
                if found != "ok":
                    raise _Damaged(str(found))
            version = connection.exec_driver_sql("PRAGMA user_version").scalar_one()
            if version > len(MIGRATIONS):
                raise _Damaged(f"its schema {version} is of a newer version of this program")
            for migration in MIGRATIONS[version:]:
                for statement in migration:
                    connection.exec_driver_sql(statement)
            if version < len(MIGRATIONS):
                connection.exec_driver_sql(f"PRAGMA user_version = {len(MIGRATIONS)}")
        self._file = _identity(self.path)
        return engine

    def _move_aside(self, reason: str) -> None:
        """Keep a damaged database beside the new one that is begun, and say so."""
        self._dispose()
        aside = Path(f"{self.path}.damaged-{format_time(self._clock())}")
        with suppress(FileNotFoundError):
            self.path.rename(aside)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                Path(f"{self.path}{suffix}").rename(f"{aside}{suffix}")
        logs.event(LOG, "warning", "history damaged", file=self.path, reason=reason, kept_as=aside)
        told = Event(self._clock(), "history_damaged", str(self.path), f"{reason}; kept as {aside}")
        self._in_transaction(lambda connection: connection.execute(insert(EVENTS).values(_values(told))))

    def _dispose(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
        self._engine = None
        self._file = None

    def close(self) -> None:
        """Close the database; using the history again opens it again."""
        with self._lock:
            self._dispose()


def _engine(path: Path) -> Engine:
    # One connection, used under a lock by whichever thread has it.
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=StaticPool,
        connect_args={"timeout": BUSY_TIMEOUT, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        # Transactions are begun here, not by sqlite3, so that they span schema changes too.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file that is; None if there is none. Tells one that was deleted or replaced while it was open."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _is_damage(error: Exception) -> bool:
    text = str(getattr(error, "orig", None) or error).lower()
    return isinstance(error, _Damaged) or any(words in text for words in _DAMAGED)


def _narrowed(table: Table, job: str | None, volume: str | None, target: str | None) -> Select[Any]:
    given = {"job": job, "volume": volume, "target": target}
    return select(table).where(*(table.c[name] == value for name, value in given.items() if value is not None))


def _values(row: Run | Check | Event | Difference) -> dict[str, object]:
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {name: _cut(value) if isinstance(value, str) else value for name, value in values.items()}


def _cut(text: str) -> str:
    # SQLite takes valid UTF-8 only; a lone surrogate of an odd file name is shown, not refused.
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _restored(kind: type[_R], values: Mapping[str, Any]) -> _R:
    row = kind(**values)
    if isinstance(row, Check):
        return replace(row, repaired=bool(row.repaired))
    if isinstance(row, Difference):
        return replace(row, read=bool(row.read), mended=bool(row.mended), passed=bool(row.passed))
    return row
