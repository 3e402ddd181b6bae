"""What a diff of ``rbd export-diff`` does not say, in a small file beside it: which snapshot of which volume it brings,
and what its bytes are.

The format of a diff has no place for either, and has to stay what it is. With this file an import makes a snapshot
that the source knows as its own, so that a job continues from it; and no byte that was damaged on its way is taken.
The digests are of consecutive segments, so that each is known good before any of it is written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Final, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from replicator.diff_format import DiffHeader, Read
from replicator.errors import BadDiff, InvalidName
from replicator.model import Lineage, Role
from replicator.streams import Buffer

SUFFIX = ".identity"
"""Behind the name of the diff."""
SEGMENT: Final = 16777216
"""Bytes of a diff that one digest is of."""
DIGEST_SIZE = 32
MAX_FILE = 256 << 20
"""Bytes of such a file, at most: enough for a diff of 50 TiB."""
_MAX_LENGTH = 1 << 60


@dataclass(frozen=True, slots=True)
class DiffIdentity:
    """What goes with a diff.

    :ivar lineage: of the volume that it was exported from
    :ivar header: as the diff has it: they belong together
    :ivar base_guid, guid: identities of the snapshots that it is from and that it brings
    :ivar created: when the data was frozen
    :ivar length: bytes of the diff
    :ivar digests: SHA-256 of each segment of ``SEGMENT`` bytes of it; the last may be short
    """

    lineage: Lineage
    header: DiffHeader
    base_guid: str | None
    guid: str
    created: datetime
    length: int
    digests: tuple[bytes, ...]

    def encode(self) -> bytes:
        """As it is kept."""
        header = self.header
        kept = _Kept(
            format="replicator diff identity 1",
            lineage=self.lineage.uuid,
            epoch=self.lineage.epoch,
            base=None
            if header.base is None or self.base_guid is None
            else _Snapshot(name=header.base, guid=self.base_guid),
            snapshot=_Snapshot(name=header.to, guid=self.guid),
            created=self.created.astimezone(UTC),
            size=header.size,
            length=self.length,
            segment=SEGMENT,
            sha256=[digest.hex() for digest in self.digests],
        )
        return kept.model_dump_json(indent=1).encode() + b"\n"

    @classmethod
    def load(cls, text: bytes, label: str) -> DiffIdentity:
        """:raises BadDiff: it cannot be read"""
        try:
            kept = _Kept.model_validate_json(text)
            lineage = Lineage(kept.lineage, Role.REPLICA, kept.epoch)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise _unreadable(label, f"{where}: {first['msg']}" if where else first["msg"]) from None
        except InvalidName as error:
            raise _unreadable(label, str(error)) from None
        if len(kept.sha256) != -(-kept.length // SEGMENT):
            raise _unreadable(label, f"it has {len(kept.sha256)} digests of a diff of {kept.length} bytes")
        return cls(
            lineage,
            DiffHeader(kept.base.name if kept.base is not None else None, kept.snapshot.name, kept.size),
            kept.base.guid if kept.base is not None else None,
            kept.snapshot.guid,
            kept.created,
            kept.length,
            tuple(bytes.fromhex(digest) for digest in kept.sha256),
        )


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Snapshot(_Strict):
    name: Annotated[str, Field(min_length=1, max_length=4096)]
    guid: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]


class _Kept(_Strict):
    format: Literal["replicator diff identity 1"]
    lineage: Annotated[str, Field(max_length=64)]
    epoch: int
    base: _Snapshot | None
    snapshot: _Snapshot
    created: AwareDatetime
    size: Annotated[int, Field(ge=0, le=_MAX_LENGTH)]
    length: Annotated[int, Field(ge=1, le=_MAX_LENGTH)]
    segment: Literal[16777216]
    sha256: Sequence[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]]


def _unreadable(label: str, why: str) -> BadDiff:
    return BadDiff(
        f"{label} is not the identity of a diff: {why}",
        hint="copy it again; without it the diff can be imported by itself, and `replicator resync` then makes the "
        "volume a replica",
    )


class Digester:
    """Digests of the segments of what goes by."""

    def __init__(self) -> None:
        self._segment = hashlib.sha256()
        self._room = SEGMENT
        self._done: list[bytes] = []
        self.length = 0

    def add(self, data: Buffer) -> None:
        """The next bytes."""
        view = memoryview(data)
        self.length += len(view)
        while view:
            self._segment.update(view[: self._room])
            taken = min(self._room, len(view))
            view, self._room = view[taken:], self._room - taken
            if not self._room:
                self._end_segment()

    def _end_segment(self) -> None:
        self._done.append(self._segment.digest())
        self._segment, self._room = hashlib.sha256(), SEGMENT

    def finish(self) -> tuple[bytes, ...]:
        """All of them, once everything has gone by."""
        if self._room < SEGMENT:
            self._end_segment()
        return tuple(self._done)


class VerifiedReader:
    """Gives the bytes of a diff, each only once its segment is known to be what the identity says.

    :param read: see :data:`~replicator.diff_format.Read`
    :raises BadDiff: a segment is another, or the diff is of another length
    """

    def __init__(self, read: Read, identity: DiffIdentity) -> None:
        self._read = read
        self._digests = identity.digests
        self._length = identity.length
        self._number = 0
        self._segment = memoryview(b"")

    def read(self, size: int) -> bytes:
        """See :data:`~replicator.diff_format.Read`."""
        found = bytes(self._segment[:size])
        self._segment = self._segment[size:]
        while len(found) < size and self._fill():
            missing = size - len(found)
            found += bytes(self._segment[:missing])
            self._segment = self._segment[missing:]
        return found

    def _fill(self) -> bool:
        """Have the next segment; False at the end."""
        due = min(SEGMENT, self._length - self._number * SEGMENT)
        if due <= 0:
            if self._read(1):
                raise self._wrong(f"is longer than {self._length} bytes")
            return False
        data = self._read(due)
        if len(data) != due:
            raise self._wrong(f"ends before its {self._length} bytes")
        if hashlib.sha256(data).digest() != self._digests[self._number]:
            begin = self._number * SEGMENT
            raise self._wrong(f"is not what was exported, between byte {begin} and {begin + due}")
        self._number += 1
        self._segment = memoryview(data)
        return True

    @staticmethod
    def _wrong(why: str) -> BadDiff:
        return BadDiff(
            f"the diff {why}", hint="copy it again, with the identity that was written with it; nothing of it was kept"
        )
