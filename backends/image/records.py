"""The small JSON files beside the data: what they say, and reading them as input from outside.

::

    meta.json      of a snapshot: its identity, time, position, size; whether digests are kept
    aside.json     of a snapshot that is being replaced: what meta.json becomes, and under which name
    request.json   of an interrupted receive: what is being received
    progress.json  of an interrupted receive: how far it is durable
    lineage.json   of a volume
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from backends import fields
from backends.fields import BadRecord
from replicator.endpoint import ReceiveMode
from replicator.errors import DamagedData
from replicator.model import Lineage, Version
from replicator.streams import MAX_VOLUME_SIZE

_MAX_RECORD = 64 * 1024


def _load(path: Path) -> dict[str, Any]:
    """:raises FileNotFoundError, BadRecord:"""
    with path.open("rb") as file:
        return fields.parse(file.read(_MAX_RECORD))


def _dump(record: dict[str, object]) -> bytes:
    return json.dumps({"format": fields.FORMAT, **record}, indent=1).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class Meta:
    """What is known of a snapshot beside its bytes. Its name is its directory's name.

    :ivar image: random identity of these very bytes; ties the kept digests to them
    :ivar digests: digests are kept in the file ``digests``
    :ivar origin: identity of the live file that it was set aside from, () for others
    """

    guid: str
    created: datetime
    position: int
    size: int
    image: str
    digests: bool
    origin: tuple[int, ...] = ()

    @classmethod
    def of(cls, version: Version, *, position: int, size: int, digests: bool) -> Meta:
        """For a new image of ``version``."""
        return cls(version.guid, version.created, position, size, uuid.uuid4().hex, digests)

    def _fields(self) -> dict[str, object]:
        return {
            "guid": self.guid,
            "created": self.created.isoformat(),
            "position": self.position,
            "size": self.size,
            "image": self.image,
            "digests": self.digests,
            "origin": list(self.origin),
        }

    def encode(self) -> bytes:
        """As ``meta.json``."""
        return _dump(self._fields())

    def encode_aside(self, name: str) -> bytes:
        """As ``aside.json``: what counts once the directory is called ``name``."""
        return _dump({**self._fields(), "name": name})

    @classmethod
    def _from(cls, record: dict[str, Any]) -> Meta:
        origin = record.get("origin", [])
        if not isinstance(origin, list) or not all(isinstance(part, int) for part in origin):
            raise BadRecord("origin is no list of numbers")
        return cls(
            fields.guid(record, "guid"),
            fields.time(record, "created"),
            fields.number(record, "position"),
            fields.number(record, "size", MAX_VOLUME_SIZE + 1),
            fields.text(record, "image"),
            record.get("digests") is True,
            tuple(origin),
        )

    @classmethod
    def load(cls, path: Path) -> Meta:
        """:raises FileNotFoundError, BadRecord:"""
        return cls._from(_load(path))

    @classmethod
    def load_aside(cls, path: Path) -> tuple[str, Meta] | None:
        """The name and contents of an ``aside.json``, None if there is none. :raises BadRecord:"""
        try:
            record = _load(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return fields.snapshot_name(record, "name"), cls._from(record)

    def version(self, name: str, holds: tuple[str, ...]) -> Version:
        """As a listing shows it."""
        return Version(name, self.guid, self.created, self.position, size=self.size, holds=holds)

    def set_aside(self, guid: str, position: int) -> Meta:
        """The same bytes under an identity of their own."""
        return replace(self, guid=guid, position=position)


@dataclass(frozen=True, slots=True)
class Pending:
    """What an interrupted receive was about.

    :ivar size: of the version being received
    """

    to_guid: str
    to_name: str
    base_guid: str | None
    size: int
    mode: ReceiveMode

    def encode(self) -> bytes:
        """As ``request.json``."""
        return _dump(
            {
                "to_guid": self.to_guid,
                "to_name": self.to_name,
                "base_guid": self.base_guid,
                "size": self.size,
                "mode": str(self.mode),
            }
        )

    @classmethod
    def load(cls, path: Path) -> Pending:
        """:raises FileNotFoundError, BadRecord:"""
        record = _load(path)
        try:
            return cls(
                fields.guid(record, "to_guid"),
                fields.snapshot_name(record, "to_name"),
                fields.guid_or_none(record, "base_guid"),
                fields.number(record, "size", MAX_VOLUME_SIZE + 1),
                ReceiveMode(fields.text(record, "mode")),
            )
        except ValueError as error:
            raise BadRecord(str(error)) from None


def encode_progress(offset: int) -> bytes:
    """As ``progress.json``: every change below ``offset`` is durable."""
    return _dump({"offset": offset})


def load_progress(path: Path) -> int:
    """:raises FileNotFoundError, BadRecord:"""
    return fields.number(_load(path), "offset", MAX_VOLUME_SIZE + 1)


def encode_lineage(lineage: Lineage) -> bytes:
    """As ``lineage.json``."""
    return _dump({"uuid": lineage.uuid, "role": str(lineage.role), "epoch": lineage.epoch})


def load_lineage(path: Path) -> Lineage | None:
    """None if there is no such file.

    :raises DamagedData: it is unreadable. Never taken for "none": that would let a promoted copy be overwritten.
    """
    try:
        return fields.lineage(_load(path))
    except FileNotFoundError:
        return None
    except BadRecord as error:
        raise DamagedData(
            f"the record of the volume's role and epoch cannot be read: {path}: {error}",
            hint="`replicator resync` writes it anew on a replica; on a primary, restore the file from a backup",
        ) from None
