"""Reading the fields of a record of ours as input from outside: JSON that somebody may have changed or damaged."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from replicator import names
from replicator.errors import InvalidName
from replicator.model import Lineage, Role

FORMAT = 1
MAX_GUID = 128


class BadRecord(Exception):
    """A record that cannot be what we wrote; the message says why."""


def parse(data: str | bytes) -> dict[str, Any]:
    """The fields of a record of this format. :raises BadRecord:"""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise BadRecord("not a JSON object")
    if record.get("format") != FORMAT:
        raise BadRecord(f"of format {record.get('format')!r}, this version knows {FORMAT}")
    return record


def text(record: dict[str, Any], field: str, limit: int = 512) -> str:
    """A text that is not empty. :raises BadRecord:"""
    value = record.get(field)
    if not isinstance(value, str) or not 0 < len(value) <= limit:
        raise BadRecord(f"{field} is missing or no text")
    return value


def number(record: dict[str, Any], field: str, limit: int = 2**63) -> int:
    """A number from 0 to below ``limit``. :raises BadRecord:"""
    value = record.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < limit:
        raise BadRecord(f"{field} is missing or out of range")
    return value


def time(record: dict[str, Any], field: str) -> datetime:
    """A time, in UTC. :raises BadRecord:"""
    try:
        moment = datetime.fromisoformat(text(record, field))
    except ValueError:
        raise BadRecord(f"{field} is no time") from None
    if moment.tzinfo is None:
        raise BadRecord(f"{field} has no time zone")
    return moment.astimezone(UTC)


def snapshot_name(record: dict[str, Any], field: str) -> str:
    """The name of a snapshot. :raises BadRecord:"""
    try:
        return names.check_snapshot(text(record, field))
    except InvalidName as error:
        raise BadRecord(str(error)) from None


def guid(record: dict[str, Any], field: str) -> str:
    """The identity of a version. :raises BadRecord:"""
    return text(record, field, MAX_GUID)


def guid_or_none(record: dict[str, Any], field: str) -> str | None:
    """The same, where there may be none. :raises BadRecord:"""
    return None if record.get(field) is None else guid(record, field)


def lineage(record: dict[str, Any]) -> Lineage:
    """Uuid, role and epoch. :raises BadRecord:"""
    try:
        return Lineage(text(record, "uuid"), Role(text(record, "role")), number(record, "epoch"))
    except (ValueError, InvalidName) as error:
        raise BadRecord(str(error)) from None
