"""What is kept in an image's metadata, and reading it as input from outside.

::

    replicator.lineage          which family of copies, role, epoch
    replicator.snapshot.ID      of a snapshot that was received: guid, time, position, name
    replicator.hold.ID.TAG      a hold on a snapshot
    replicator.protected.ID     that the snapshot was protected by us
    replicator.partial          what is being received into the head, and how far it is
    replicator.head             which version the head is the content of, where that is not the newest snapshot

ID is RBD's number of the snapshot. ``rbd cp``, ``rbd deep cp`` and ``rbd migration`` copy metadata to other images,
of which nothing of this is true: so each record says which image, and which snapshot by its time, it is of, and counts
there alone. Each is one value, so it is written in one step.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from backends import fields
from backends.fields import BadRecord
from replicator import names
from replicator.endpoint import ReceiveMode
from replicator.errors import InvalidName
from replicator.model import Lineage, ResumeState, StreamKind
from replicator.streams import MAX_VOLUME_SIZE

PREFIX = "replicator."
LINEAGE = f"{PREFIX}lineage"
PARTIAL = f"{PREFIX}partial"
HEAD = f"{PREFIX}head"
RESTORED = f"{PREFIX}restored"
_SNAPSHOT, _HOLD, _PROTECTED = f"{PREFIX}snapshot.", f"{PREFIX}hold.", f"{PREFIX}protected."

_MAX_RECORD = 16 * 1024


@dataclass(frozen=True, slots=True)
class Taken:
    """Which snapshot of which image a record is of.

    :ivar image: RBD's id of the image
    :ivar snapshot: RBD's id of the snapshot
    :ivar time: when RBD took it; whole seconds
    """

    image: str
    snapshot: int
    time: datetime


def snapshot_key(snapshot: int) -> str:
    """Of the record of a received snapshot."""
    return f"{_SNAPSHOT}{snapshot}"


def hold_key(snapshot: int, tag: str) -> str:
    """Of a hold."""
    return f"{_HOLD}{snapshot}.{names.check_tag(tag)}"


def protected_key(snapshot: int) -> str:
    """That we protected a snapshot."""
    return f"{_PROTECTED}{snapshot}"


def snapshot_of(key: str) -> int | None:
    """The snapshot that a key is about, None where it is about none."""
    for prefix in (_SNAPSHOT, _HOLD, _PROTECTED):
        if key.startswith(prefix):
            digits = key[len(prefix) :].partition(".")[0]
            return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 20 else None
    return None


def holds_in(metadata: dict[str, str], taken: Taken) -> tuple[str, ...]:
    """The tags of the holds on a snapshot."""
    prefix = f"{_HOLD}{taken.snapshot}."
    found = []
    for key, value in metadata.items():
        if key.startswith(prefix):
            try:
                load_mark(value, taken)
                found.append(names.check_tag(key[len(prefix) :]))
            except (BadRecord, InvalidName):
                continue
    return tuple(sorted(found))


# -- encoding


def _dump(record: dict[str, object]) -> str:
    return json.dumps({"format": fields.FORMAT, **record}, separators=(",", ":"))


def _parse(text: str) -> dict[str, Any]:
    if len(text) > _MAX_RECORD:
        raise BadRecord("too long")
    return fields.parse(text)


def _check_image(record: dict[str, Any], image: str) -> None:
    if fields.text(record, "image") != image:
        raise BadRecord("of another image, which this one was copied from")


def _of(taken: Taken) -> dict[str, object]:
    return {"image": taken.image, "taken": taken.time.isoformat()}


def _check_taken(record: dict[str, Any], taken: Taken) -> None:
    _check_image(record, taken.image)
    if fields.time(record, "taken") != taken.time:
        raise BadRecord("of another snapshot")


def encode_mark(taken: Taken) -> str:
    """A record that says nothing but what it is of: a hold, or that we protected a snapshot."""
    return _dump(_of(taken))


def load_mark(text: str, taken: Taken) -> None:
    """:raises BadRecord: it is none, or of something else"""
    _check_taken(_parse(text), taken)


# -- versions


@dataclass(frozen=True, slots=True)
class Identity:
    """What a snapshot is, whatever RBD knows of it.

    :ivar name: as a version; RBD's own name follows
    """

    guid: str
    name: str
    created: datetime
    position: int


@dataclass(frozen=True, slots=True)
class Replaced:
    """The older snapshot that one takes the place of (a rebuild), and what becomes of it.

    :ivar snapshot: RBD's id
    """

    snapshot: int
    guid: str
    name: str
    position: int


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """``replicator.snapshot.ID``: once it is there, the snapshot is a version, whole and durable."""

    identity: Identity
    replaces: Replaced | None = None

    def encode(self, taken: Taken) -> str:
        """As it is kept."""
        identity = self.identity
        replaces = None if self.replaces is None else asdict(self.replaces)
        return _dump(
            {
                **_of(taken),
                "guid": identity.guid,
                "name": identity.name,
                "created": identity.created.isoformat(),
                "position": identity.position,
                **({} if replaces is None else {"replaces": replaces}),
            }
        )

    @classmethod
    def load(cls, text: str, taken: Taken) -> SnapshotRecord:
        """:raises BadRecord: it is damaged, or not of this snapshot"""
        record = _parse(text)
        _check_taken(record, taken)
        identity = Identity(
            fields.guid(record, "guid"),
            fields.snapshot_name(record, "name"),
            fields.time(record, "created"),
            fields.number(record, "position"),
        )
        old = record.get("replaces")
        if old is None:
            return cls(identity)
        if not isinstance(old, dict):
            raise BadRecord("replaces is no object")
        replaces = Replaced(
            fields.number(old, "snapshot"),
            fields.guid(old, "guid"),
            fields.snapshot_name(old, "name"),
            fields.number(old, "position"),
        )
        return cls(identity, replaces)

    @property
    def settled(self) -> SnapshotRecord:
        """What remains once the replaced one has its own record and name."""
        return replace(self, replaces=None)


# -- the head


class Stage(StrEnum):
    """How far a receive is."""

    REVERT = "revert"
    """The head is being made what the stream applies to; its content is nothing, and nobody's."""
    WRITE = "write"
    """The stream is being written."""


@dataclass(frozen=True, slots=True)
class Partial:
    """``replicator.partial``: what is being received into the head.

    While it is there the head is no version's content, and what is in it is ours to throw away.

    :ivar size: of the version being received
    :ivar offset: every change below it is durable
    """

    to_guid: str
    to_name: str
    base_guid: str | None
    size: int
    mode: ReceiveMode
    stage: Stage
    offset: int = 0

    def encode(self, image: str) -> str:
        """As it is kept."""
        record: dict[str, object] = asdict(self)
        return _dump({"image": image, **record})

    @classmethod
    def load(cls, text: str, image: str) -> Partial:
        """:raises BadRecord:"""
        record = _parse(text)
        _check_image(record, image)
        try:
            return cls(
                fields.guid(record, "to_guid"),
                fields.snapshot_name(record, "to_name"),
                fields.guid_or_none(record, "base_guid"),
                fields.number(record, "size", MAX_VOLUME_SIZE + 1),
                ReceiveMode(fields.text(record, "mode")),
                Stage(fields.text(record, "stage")),
                fields.number(record, "offset", MAX_VOLUME_SIZE + 1),
            )
        except ValueError as error:
            raise BadRecord(str(error)) from None

    @property
    def resume(self) -> ResumeState | None:
        """As a listing shows it. A rebuild is not continued: its changes were made against what the target had then."""
        if self.mode is not ReceiveMode.REPLICA or self.stage is not Stage.WRITE:
            return None
        return ResumeState(StreamKind.BLOCKS, self.to_guid, self.to_name, self.base_guid, self.offset)


@dataclass(frozen=True, slots=True)
class HeadRecord:
    """``replicator.head``: at a hidden snapshot, the head had been put back to the content of a version.

    RBD tells what was written since a snapshot, and putting back is writing: so the snapshot after it is what tells
    whether somebody else has written.

    :ivar guid: of the version; "" for no content at all
    """

    taken: Taken
    guid: str

    def encode(self) -> str:
        """As it is kept."""
        return _dump({**_of(self.taken), "snapshot": self.taken.snapshot, "guid": self.guid})

    @classmethod
    def load(cls, text: str, image: str) -> HeadRecord:
        """:raises BadRecord:"""
        record = _parse(text)
        _check_image(record, image)
        guid = record.get("guid")
        if not isinstance(guid, str) or len(guid) > fields.MAX_GUID:
            raise BadRecord("guid is missing")
        return cls(Taken(image, fields.number(record, "snapshot"), fields.time(record, "taken")), guid)


# -- lineage


def encode_lineage(lineage: Lineage, image: str) -> str:
    """As ``replicator.lineage``."""
    return _dump({"image": image, "uuid": lineage.uuid, "role": str(lineage.role), "epoch": lineage.epoch})


def load_lineage(text: str, image: str) -> Lineage | None:
    """None where the image was copied from the one that this is of. :raises BadRecord: it is damaged"""
    record = _parse(text)
    if fields.text(record, "image") != image:
        return None
    return fields.lineage(record)
