"""What the storage in memory keeps of a volume."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import StaleResume
from replicator.model import Lineage, ResumeState, StreamKind, Version, VersionKind, VersionRef

_POSITION_STEP = 1024
"""Between two positions, so that a snapshot kept aside fits before the one that replaces it."""


@dataclass(slots=True)
class Stored:
    """A version with its data. A bookmark keeps the data only to know what changed since, as others keep digests."""

    version: Version
    data: bytes


@dataclass(slots=True)
class Partial:
    """A half-received version. ``offset``: every change below it is in ``data``."""

    request: ReceiveRequest
    data: bytearray
    offset: int

    @property
    def resume(self) -> ResumeState | None:
        """A rebuild mends what is really there, so no later stream can continue it; nor a restore."""
        request = self.request
        if request.mode is not ReceiveMode.REPLICA:
            return None
        base = request.base.guid if request.base else None
        return ResumeState(StreamKind.BLOCKS, request.to.guid, request.to.name, base, self.offset)


@dataclass(slots=True)
class Volume:
    """A volume.

    :ivar head: live data; a replica has none of its own unless somebody wrote
    """

    head: bytearray | None = None
    lineage: Lineage | None = None
    stored: list[Stored] = field(default_factory=list)
    partial: Partial | None = None

    @property
    def visible(self) -> bool:
        """Whether there is more than the beginnings of a volume."""
        return self.head is not None or self.lineage is not None or bool(self.stored)


def newest_data(volume: Volume) -> bytes:
    """The bytes of the newest snapshot that was not put aside; none where there is no such snapshot."""
    snapshots = [s for s in volume.stored if s.version.kind is VersionKind.SNAPSHOT and not s.version.is_diverged]
    newest = max(snapshots, key=lambda s: s.version.position, default=None)
    return newest.data if newest else b""


def next_position(volume: Volume) -> int:
    """After every version that there is."""
    newest = max((s.version.position for s in volume.stored), default=0)
    return (newest // _POSITION_STEP + 1) * _POSITION_STEP


def continues(resume: ResumeState, found: ResumeState) -> bool:
    """Whether a stream for ``resume`` continues what is there. It may begin earlier: then some is done again."""
    return resume.offset <= found.offset and replace(resume, offset=found.offset, to_name=found.to_name) == found


def check_resume(resume: ResumeState, base: VersionRef | None, to: VersionRef) -> None:
    """Whether a partial state belongs to this step. :raises StaleResume:"""
    if resume.kind is not StreamKind.BLOCKS or resume.to_guid != to.guid:
        raise StaleResume(f"the partial state is not one of {to.name}", hint="plan again")
    if resume.base_guid != (base.guid if base else None):
        raise StaleResume(f"the partial state of {to.name} has another base", hint="plan again")
