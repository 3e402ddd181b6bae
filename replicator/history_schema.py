"""The tables of the history database, and how an older one becomes today's.

``MIGRATIONS[n]`` brings schema version n to n + 1; the version is SQLite's ``PRAGMA user_version``. A migration that
was released is never changed, a new one is added. ``METADATA`` describes what the last one leaves.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import Column, Dialect, Integer, MetaData, Table, Text
from sqlalchemy.types import TypeDecorator

METADATA = MetaData()

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE runs (
            id INTEGER PRIMARY KEY, job TEXT NOT NULL, volume TEXT NOT NULL, target TEXT NOT NULL,
            started INTEGER NOT NULL, finished INTEGER NOT NULL, outcome TEXT NOT NULL, code TEXT NOT NULL,
            message TEXT NOT NULL, bytes_done INTEGER NOT NULL, bytes_sent INTEGER NOT NULL,
            snapshot_guid TEXT NOT NULL, snapshot_name TEXT NOT NULL, attempts INTEGER NOT NULL)""",
        "CREATE INDEX runs_of_replica ON runs (job, volume, target, id)",
        "CREATE INDEX runs_by_time ON runs (finished)",
        """CREATE TABLE verifications (
            id INTEGER PRIMARY KEY, job TEXT NOT NULL, volume TEXT NOT NULL, target TEXT NOT NULL,
            kind TEXT NOT NULL, finished INTEGER NOT NULL, snapshot_name TEXT NOT NULL,
            checked_bytes INTEGER NOT NULL, mismatched_bytes INTEGER NOT NULL, mismatched_ranges INTEGER NOT NULL,
            repaired INTEGER NOT NULL, bytes_sent INTEGER NOT NULL, message TEXT NOT NULL)""",
        "CREATE INDEX verifications_of_replica ON verifications (job, volume, target, id)",
        "CREATE INDEX verifications_by_time ON verifications (finished)",
        """CREATE TABLE events (
            id INTEGER PRIMARY KEY, time INTEGER NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL,
            message TEXT NOT NULL)""",
        "CREATE INDEX events_by_time ON events (time)",
    ),
    (
        """CREATE TABLE differences (
            id INTEGER PRIMARY KEY, job TEXT NOT NULL, volume TEXT NOT NULL, target TEXT NOT NULL,
            found INTEGER NOT NULL, snapshot_name TEXT NOT NULL, snapshot_guid TEXT NOT NULL,
            differing_bytes INTEGER NOT NULL, read INTEGER NOT NULL, mended INTEGER NOT NULL,
            passed INTEGER NOT NULL)""",
        "CREATE INDEX differences_of_replica ON differences (job, volume, target, id)",
        # until here, what stood was the last verification that differed, without anything but a resync that only
        # continued after it
        """INSERT INTO differences
            (job, volume, target, found, snapshot_name, snapshot_guid, differing_bytes, read, mended, passed)
            SELECT job, volume, target, finished, snapshot_name, '', mismatched_bytes, 1, 0, 0
            FROM verifications AS last WHERE kind = 'verify' AND mismatched_bytes > 0 AND NOT EXISTS (
                SELECT 1 FROM verifications AS later
                WHERE later.job = last.job AND later.volume = last.volume AND later.target = last.target
                AND later.id > last.id AND (later.kind != 'resync' OR later.repaired))""",
    ),
)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class UtcTime(TypeDecorator[datetime]):
    """A moment as whole microseconds since 1970, UTC: sorts as it should and is the same everywhere."""

    impl = Integer
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """To the database."""
        return None if value is None else (value - _EPOCH) // timedelta(microseconds=1)

    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """From the database."""
        return None if value is None else _EPOCH + timedelta(microseconds=value)


def _text(name: str) -> Column[str]:
    return Column(name, Text, nullable=False)


def _number(name: str) -> Column[int]:
    return Column(name, Integer, nullable=False)


def _time(name: str) -> Column[datetime]:
    return Column(name, UtcTime, nullable=False)


def _id() -> Column[int]:
    return Column("id", Integer, primary_key=True)


RUNS = Table(
    "runs",
    METADATA,
    _id(),
    _text("job"),
    _text("volume"),
    _text("target"),
    _time("started"),
    _time("finished"),
    _text("outcome"),
    _text("code"),
    _text("message"),
    _number("bytes_done"),
    _number("bytes_sent"),
    _text("snapshot_guid"),
    _text("snapshot_name"),
    _number("attempts"),
)
VERIFICATIONS = Table(
    "verifications",
    METADATA,
    _id(),
    _text("job"),
    _text("volume"),
    _text("target"),
    _text("kind"),
    _time("finished"),
    _text("snapshot_name"),
    _number("checked_bytes"),
    _number("mismatched_bytes"),
    _number("mismatched_ranges"),
    _number("repaired"),
    _number("bytes_sent"),
    _text("message"),
)
DIFFERENCES = Table(
    "differences",
    METADATA,
    _id(),
    _text("job"),
    _text("volume"),
    _text("target"),
    _time("found"),
    _text("snapshot_name"),
    _text("snapshot_guid"),
    _number("differing_bytes"),
    _number("read"),
    _number("mended"),
    _number("passed"),
)
EVENTS = Table("events", METADATA, _id(), _time("time"), _text("kind"), _text("subject"), _text("message"))
