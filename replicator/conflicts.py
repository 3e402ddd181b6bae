"""Why there is no plan: what only people can decide, as values with their evidence.

Each conflict says in ``message`` what was found, and in ``hint`` the one command, or the one thing to do, that resolves
it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from replicator.errors import ConflictError
from replicator.model import Capability, Form, Origin, StorageInfo, StreamKind, Version, VolumeId

SHOWN_VERSIONS = 3
"""How many versions a message names before it says how many more there are."""


@dataclass(frozen=True, slots=True)
class Route:
    """From where to where, as far as planning and its messages need it.

    :ivar volume: the source volume
    :ivar target: ``NODE:STORAGE``, as the configuration and ``--target`` write it
    :ivar batches: both storages can carry several snapshots in one stream
    """

    volume: VolumeId
    target: str
    source_stream: StreamKind = StreamKind.BLOCKS
    target_stream: StreamKind = StreamKind.BLOCKS
    batches: bool = False

    @classmethod
    def between(cls, volume: VolumeId, source: StorageInfo, target_node: str, target: StorageInfo) -> Route:
        """The route from a volume on the storage ``source`` to the storage ``target`` of ``target_node``."""
        both = source.capabilities & target.capabilities
        return cls(
            volume,
            f"{target_node}:{target.name}",
            source.stream,
            target.stream,
            bool(both & Capability.NATIVE_INTERMEDIATES),
        )

    @property
    def resync(self) -> str:
        """The command that makes the replica right again, whatever happened to it."""
        return f"replicator resync {self.volume} --target {self.target}"


@dataclass(frozen=True, slots=True)
class Conflict(ABC):
    """Why there is no plan: something that only people can decide. Subclasses carry the evidence."""

    kind: ClassVar[str] = "conflict"
    route: Route

    @property
    @abstractmethod
    def message(self) -> str:
        """The thing and the cause, one sentence."""

    @property
    def hint(self) -> str:
        """The remedy."""
        return f"{self.route.resync} makes the replica right again; what only it has is first kept aside there"

    def to_error(self) -> ConflictError:
        """This conflict as an exception."""
        return ConflictError(self.message, hint=self.hint, kind=self.kind)


@dataclass(frozen=True, slots=True)
class SourceMissing(Conflict):
    """The volume to replicate does not exist (any more)."""

    kind: ClassVar[str] = "source_missing"

    @property
    def message(self) -> str:
        return f"source volume {self.route.volume} does not exist"

    @property
    def hint(self) -> str:
        return (
            f"correct the job's source, or bring the volume back: replicator restore copies it from {self.route.target}"
        )


@dataclass(frozen=True, slots=True)
class SourceIsReplica(Conflict):
    """The volume to replicate is itself a replica."""

    kind: ClassVar[str] = "source_is_replica"
    epoch: int

    @property
    def message(self) -> str:
        return f"{self.route.volume} is a replica here (epoch {self.epoch}), so it cannot be a source"

    @property
    def hint(self) -> str:
        return "run the job on the node that has the primary"


@dataclass(frozen=True, slots=True)
class MixedStreams(Conflict):
    """The two storages do not speak the same kind of stream."""

    kind: ClassVar[str] = "mixed_streams"

    @property
    def message(self) -> str:
        route = self.route
        return (
            f"{route.volume} cannot go to {route.target}: the source sends {route.source_stream} streams, "
            f"the target takes {route.target_stream} streams"
        )

    @property
    def hint(self) -> str:
        return "choose a target storage of the same kind as the source's"


@dataclass(frozen=True, slots=True)
class MixedForms(Conflict):
    """The replica was made of streams of the other form than the source sends now; ZFS cannot continue it with those
    (openzfs#16351, #12594).

    :ivar source, target: raw or plain
    """

    kind: ClassVar[str] = "mixed_forms"
    source: Form
    target: Form

    @property
    def message(self) -> str:
        route = self.route
        return (
            f"the replica of {route.volume} on {route.target} was made of {self.target} streams, and the source sends "
            f"{self.source} ones now: ZFS cannot mix them"
        )

    @property
    def hint(self) -> str:
        return (
            f"set replicator:stream of the source's dataset back to {self.target}; or {self.route.resync} keeps the "
            "whole replica aside there as …-diverged-<time> and sends everything anew; it says what that costs, and "
            "asks"
        )


@dataclass(frozen=True, slots=True)
class NotAReplica(Conflict):
    """The target has a volume of that name that is not a replica of this source.

    :ivar found: what it is
    """

    kind: ClassVar[str] = "not_a_replica"
    volume: VolumeId
    found: str

    @property
    def message(self) -> str:
        return f"{self.volume} on {self.route.target} is no replica of {self.route.volume}: {self.found}"

    @property
    def hint(self) -> str:
        return (
            f"rename or remove that volume if it is yours; or {self.route.resync} takes it as the replica, "
            "and first keeps its data aside there"
        )


@dataclass(frozen=True, slots=True)
class Recreated(Conflict):
    """The replica follows another volume than the one that has the source's name now: that was destroyed and made anew,
    or renamed and another took its name. Sending it in full would put it where the only copy of the old one may be.

    :ivar volume: the replica
    :ivar lineage: the family of copies that it belongs to; the source belongs to another, or to none yet
    :ivar newest: the newest snapshot of the replica, None if it has none
    :ivar common: the newest version that both have nonetheless (the volume was brought back from a copy), as the target
        knows it
    :ivar elsewhere: where the source's own replica is on that target, if it is found under another name
    """

    kind: ClassVar[str] = "recreated"
    volume: VolumeId
    lineage: str
    newest: Version | None
    common: Version | None
    elsewhere: VolumeId | None = None

    @property
    def message(self) -> str:
        has = f"newest snapshot {self.newest.name}" if self.newest else "without a snapshot"
        text = (
            f"{self.volume} on {self.route.target} is the replica of another volume than {self.route.volume} is now "
            f"(lineage {self.lineage}, {has}): that was destroyed and made anew, or another took its name"
        )
        return f"{text}; the replica of what has the name now is {self.elsewhere}" if self.elsewhere else text

    @property
    def hint(self) -> str:
        if self.elsewhere:
            return f"rename {self.volume} on {self.route.target}, then the next run gives {self.elsewhere} its new name"
        keep = "if the old data is needed, `replicator restore` brings it back as a new volume"
        if self.common is not None:
            return (
                f"both have {self.common.name}: {self.route.resync} continues from there, without sending all; {keep}"
            )
        if self.route.source_stream is StreamKind.NATIVE:
            return (
                f"if that is right: {self.route.resync} keeps the old replica there as "
                f"{self.volume.name}-diverged-<time>, says what sending everything costs, and asks; {keep}"
            )
        return (
            f"if that is right: {self.route.resync} makes it the replica, keeps what is in it, and asks first; {keep}"
        )


@dataclass(frozen=True, slots=True)
class StaleEpoch(Conflict):
    """The target was promoted after this source: this source was superseded."""

    kind: ClassVar[str] = "stale_epoch"
    source_epoch: int
    target_epoch: int

    @property
    def message(self) -> str:
        return (
            f"{self.route.volume} was superseded: the copy on {self.route.target} is of epoch {self.target_epoch}, "
            f"this one of epoch {self.source_epoch}"
        )

    @property
    def hint(self) -> str:
        node = self.route.target.partition(":")[0]
        return (
            f"{self.route.target} was promoted and has the newer data: stop using the copy here, then "
            f"replicator rejoin {self.route.volume} --from {node} makes it a replica; what only it has is kept aside"
        )


@dataclass(frozen=True, slots=True)
class Diverged(Conflict):
    """The replica has data that the source never had.

    :ivar common: newest common version as the target knows it, if there is one
    :ivar newer: snapshots of the target that are newer than that, oldest first
    :ivar head_changed: live data that no snapshot has
    """

    kind: ClassVar[str] = "diverged"
    common: Version | None
    newer: tuple[Version, ...]
    head_changed: bool

    @property
    def message(self) -> str:
        what = []
        if self.newer:
            what.append(f"has snapshots that the source does not have ({_listed(self.newer)})")
        if self.head_changed:
            what.append("was written to")
        since = f" since {self.common.name}" if self.common else ""
        # Of a native storage only this is known: its live data is not what its newest snapshot is.
        native = self.head_changed and self.route.source_stream is StreamKind.NATIVE
        lost = ", or snapshots that it had after that were destroyed" if native and self.common else ""
        return f"the replica of {self.route.volume} on {self.route.target} {' and '.join(what)}{since}{lost}"


@dataclass(frozen=True, slots=True)
class NoCommonBase(Conflict):
    """Both sides have snapshots, but none in common.

    :ivar source: snapshots and bookmarks of the source, oldest first
    :ivar target: snapshots of the target, oldest first
    :ivar origin: the source is a clone of that; its older snapshots may have gone there (zfs promote)
    """

    kind: ClassVar[str] = "no_common_base"
    source: tuple[Version, ...]
    target: tuple[Version, ...]
    origin: Origin | None = None

    @property
    def message(self) -> str:
        promoted = f"; it is a clone of {self.origin} now, which has its older ones" if self.origin is not None else ""
        return (
            f"{self.route.volume} and its replica on {self.route.target} have no snapshot in common: "
            f"here {_listed(self.source) or 'there is none'}; there {_listed(self.target)}{promoted}"
        )

    @property
    def hint(self) -> str:
        if self.origin is not None:
            return f"zfs promote of {self.route.volume} takes its older snapshots back; or {self._resync}"
        return self._resync

    @property
    def _resync(self) -> str:
        if self.route.source_stream is StreamKind.NATIVE:
            return (
                f"{self.route.resync} keeps the whole replica aside there as …-diverged-<time> and sends everything "
                "anew; it says what that costs, and asks"
            )
        return f"{self.route.resync} compares the two and sends only the blocks that differ"


def _listed(versions: Sequence[Version]) -> str:
    shown = ", ".join(v.name for v in versions[-SHOWN_VERSIONS:])
    more = len(versions) - SHOWN_VERSIONS
    return f"{shown} and {more} more" if more > 0 else shown
