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
from replicator.model import Capability, StorageInfo, StreamKind, Version, VolumeId

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
        return (
            f"{self.route.target} was promoted and has the newer data: stop using the copy here, "
            "and replicate from there to here"
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
        return f"the replica of {self.route.volume} on {self.route.target} {' and '.join(what)}{since}"


@dataclass(frozen=True, slots=True)
class NoCommonBase(Conflict):
    """Both sides have snapshots, but none in common.

    :ivar source: snapshots and bookmarks of the source, oldest first
    :ivar target: snapshots of the target, oldest first
    """

    kind: ClassVar[str] = "no_common_base"
    source: tuple[Version, ...]
    target: tuple[Version, ...]

    @property
    def message(self) -> str:
        return (
            f"{self.route.volume} and its replica on {self.route.target} have no snapshot in common: "
            f"here {_listed(self.source) or 'there is none'}; there {_listed(self.target)}"
        )

    @property
    def hint(self) -> str:
        return f"{self.route.resync} compares the two and sends only the blocks that differ"


def _listed(versions: Sequence[Version]) -> str:
    shown = ", ".join(v.name for v in versions[-SHOWN_VERSIONS:])
    more = len(versions) - SHOWN_VERSIONS
    return f"{shown} and {more} more" if more > 0 else shown
