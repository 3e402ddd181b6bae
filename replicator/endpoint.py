"""What a node can be asked about its volumes, near or far.

:class:`Endpoint` is implemented by :class:`replicator.local.LocalEndpoint` over the backends of this node, and by
:class:`transport.remote.RemoteEndpoint` over a connection. Whoever drives a replication cannot tell which it has.

Contract of every method: it may be called again with the same arguments after any failure, and brings the same end
state (idempotent); it raises errors of :mod:`replicator.errors` only; every wait inside it has a deadline; names are
validated before storage is touched. Methods may be called from several threads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Protocol, runtime_checkable

from replicator.cancellation import Cancellation
from replicator.errors import NoSuchSnapshot, ReplicatorError
from replicator.model import (
    Lineage,
    Property,
    ResumeState,
    StorageInfo,
    StreamKind,
    Version,
    VersionRef,
    VolumeId,
    VolumeInfo,
    VolumeState,
)
from replicator.streams import BLOCK_SIZE, Stream


@dataclass(frozen=True, slots=True)
class Range:
    """A range of bytes of a volume."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """First byte after the range."""
        return self.offset + self.length


MAX_RANGES = 32768
"""Ranges in one :class:`SendRequest`, at most."""


@dataclass(frozen=True, slots=True)
class SnapshotRequest:
    """Take one snapshot, under one name, of each of the volumes. Those of one pool, whatever their storages, get theirs
    at one instant where the storage can (Capability.ATOMIC_GROUP)."""

    volumes: tuple[VolumeId, ...]
    name: str


@dataclass(frozen=True, slots=True)
class Taken:
    """What came of one volume of a :class:`SnapshotRequest`.

    :ivar version: its snapshot; None: there is none
    :ivar error: why not
    """

    volume: VolumeId
    version: Version | None
    error: ReplicatorError | None = None

    def get(self) -> Version:
        """The snapshot. :raises ReplicatorError: it could not be taken"""
        if self.version is None:
            raise self.error or NoSuchSnapshot(f"there is no snapshot of {self.volume}", hint="")
        return self.version


@dataclass(frozen=True, slots=True)
class SendRequest:
    """Open a stream that brings a copy of ``base`` (None: nothing) to ``to``.

    :ivar base: of a clone, also the snapshot that it began as (Capability.ORIGINS)
    :ivar key: 32 random bytes in hex, made for this stream by whoever drives it; keys the digests
    :ivar intermediates: native streams: carry the snapshots between base and to as well
    :ivar resume: continue what the receiver durably has
    :ivar ranges: blocks only: not the changes since ``base`` but just these ranges of ``to`` (ascending, disjoint;
        parts beyond its end are left out); ``base`` is None then
    """

    volume: VolumeId
    base: VersionRef | None
    to: VersionRef
    key: str
    lineage: Lineage | None = None
    intermediates: bool = False
    resume: ResumeState | None = None
    ranges: tuple[Range, ...] | None = None


class ReceiveMode(StrEnum):
    """What a received stream becomes."""

    REPLICA = "replica"
    """The next snapshot of a replica; ``base`` (or nothing) is there unchanged."""
    REBUILD = "rebuild"
    """As REPLICA, but the stream is against whatever ``base`` really contains; a snapshot of the identity of ``to``
    may exist already (damaged): it is replaced at once, in its place and with its holds, and the old one kept as
    ``aside`` just before it, with an identity of its own. Interrupted, it leaves nothing to resume.

    Of a native stream: the volume is put back to ``base`` first, or to nothing, and what it had after that is kept as
    the volume NAME-``aside``; but not before the head of the stream has come, and is one that would be taken. From then
    on it is as REPLICA."""
    HEAL = "heal"
    """The whole content of ``to``, which is on the target already: blocks of it that the target cannot read any more
    are written anew, everything else stays as it is. Only storages that can (OpenZFS from 2.2 on)."""
    RESTORE = "restore"
    """A new writable volume without lineage; the volume must not exist; no snapshot remains."""


@dataclass(frozen=True, slots=True)
class ReceiveRequest:
    """Take a stream and make it durable.

    :ivar volume: on the target
    :ivar lineage: of the source; a new volume becomes its replica. The target refuses another lineage, a primary, or
        an older epoch (NotAReplica, StaleEpoch). None only with RESTORE.
    :ivar base: the version of the *target* that the stream applies to; None: to nothing
    :ivar to: the version that exists afterwards, with name, guid, creation time and size of the source
    :ivar key: as in the SendRequest
    :ivar hold: tag set on ``to`` in the same commit; "" for none
    :ivar resume: the state that the stream continues; None begins anew and discards any partial state
    :ivar aside: REBUILD: the name under which a replaced snapshot is kept
    :ivar origin: the volume that ``base`` is a snapshot of, where that is another one: the new volume becomes its clone
        (Capability.ORIGINS)
    :ivar properties: of the source; what this node takes over of them is its own decision (Capability.PROPERTIES)
    :ivar intermediates: as in the SendRequest: each of the snapshots between base and to is received as well
    """

    volume: VolumeId
    lineage: Lineage | None
    base: VersionRef | None
    to: Version
    key: str
    mode: ReceiveMode = ReceiveMode.REPLICA
    kind: StreamKind = StreamKind.BLOCKS
    hold: str = ""
    resume: ResumeState | None = None
    aside: str = ""
    origin: VolumeId | None = None
    properties: tuple[Property, ...] = ()
    intermediates: bool = False


@dataclass(frozen=True, slots=True)
class DigestRequest:
    """Digest a snapshot's blocks by reading them (never from a cache).

    :ivar offset: where to begin, a multiple of ``block_size``
    :ivar length: bytes to cover; what lies beyond the end is left out; None: to the end
    """

    volume: VolumeId
    version: VersionRef
    key: str
    offset: int = 0
    length: int | None = None
    block_size: int = BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class DigestBatch:
    """Digests of consecutive blocks: ``DIGEST_SIZE`` bytes each, the first block at ``offset``; the volume's last block
    may be short. Batches come in order without gaps; holes are digested as zeroes."""

    offset: int
    block_size: int
    digests: bytes

    def __len__(self) -> int:
        return len(self.digests) // 16


UNREADABLE_DIGEST = bytes(16)
"""Stands in a :class:`DigestBatch` for a block that the storage could not read; no block has this digest by chance."""


@dataclass(frozen=True, slots=True)
class ManifestRequest:
    """Walk a snapshot of a filesystem; see :mod:`replicator.manifest`.

    :ivar key: 32 random bytes in hex, the same for both sides of a comparison; keys the digests
    """

    volume: VolumeId
    version: VersionRef
    key: str


@dataclass(frozen=True, slots=True)
class ScrubRequest:
    """What is known of the health of the pool that a volume is in.

    :ivar start: begin a scrub now, where none is running
    """

    volume: VolumeId
    start: bool = False


MAX_DAMAGED = 100
"""Damaged things named in one :class:`Scrub`."""


@dataclass(frozen=True, slots=True)
class Scrub:
    """The last complete scrub of a pool, and what is damaged.

    :ivar pool: its name
    :ivar running: a scrub is under way: ``done`` of ``total`` bytes
    :ivar finished: when the last complete one ended; None: there is none that is known of
    :ivar position: versions of this node up to this one (``Version.position``) were there when it began, so it has read
        all their blocks; None: not known
    :ivar errors: blocks that it could not read or mend
    :ivar damaged: what the pool says is damaged of this volume, and what it cannot say the place of; the first
        ``MAX_DAMAGED``
    :ivar damaged_elsewhere: how much else is damaged in the pool
    """

    pool: str
    running: bool
    done: int
    total: int
    finished: datetime | None
    position: int | None
    errors: int
    damaged: tuple[str, ...] = ()
    damaged_elsewhere: int = 0


@dataclass(frozen=True, slots=True)
class PruneRequest:
    """Apply a retention policy to the snapshots that ``job`` made of a volume.

    The node that owns the storage decides by itself: it lists, it applies the policy (and its own minimum, where it has
    one for the peer that asks), and it never destroys a held version, a foreign one or one named in ``protect``.

    :ivar keep: policy text, see :mod:`replicator.retention`
    :ivar protect: guids that must stay: the last common version of every target, and what clones began as
    """

    volume: VolumeId
    job: str
    keep: str
    protect: tuple[str, ...]
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class RemoveRequest:
    """Remove a replica whose source is gone, with all its versions.

    It says what somebody has seen and wants to be gone; the node that owns the storage refuses where that is not what
    is there.

    :ivar job: that made it: its holds are in nobody's way
    :ivar lineage: of the replica
    :ivar versions: the guids of all its versions
    """

    volume: VolumeId
    job: str
    lineage: Lineage
    versions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class PruneOutcome:
    """What became of one version, and why.

    :ivar kept: True: it stays. With ``dry_run``, False says that it would go.
    :ivar error: why destroying it failed, "" when it did not
    """

    version: Version
    kept: bool
    reason: str
    error: str = ""


@dataclass(frozen=True, slots=True)
class VolumeListing:
    """One volume in a listing of many.

    :ivar state: None: there is no such volume, or it could not be listed
    :ivar error: why it could not
    """

    volume: VolumeId
    state: VolumeState | None
    error: ReplicatorError | None = None

    def get(self) -> VolumeState | None:
        """The state. :raises ReplicatorError: it could not be listed"""
        if self.error is not None:
            raise self.error
        return self.state


@dataclass(frozen=True, slots=True)
class Head:
    """The live data of a volume, by its newest snapshot.

    :ivar newest: with its holds; None: there is no snapshot
    :ivar changed: whether there is live data that ``newest`` has not; everything that was written before the question
        was asked counts
    :ivar partial: whether there is a half-received version
    """

    volume: VolumeId
    newest: Version | None
    changed: bool
    lineage: Lineage | None
    partial: bool = False


@runtime_checkable
class Endpoint(Protocol):
    """A node, as far as replication needs it.

    :ivar node: its name
    """

    @property
    def node(self) -> str: ...

    def storages(self) -> tuple[StorageInfo, ...]:
        """The storages that the caller may use.

        :raises StorageUnavailable: never for one that is only absent: that one is listed with a warning
        """

    def storage(self, name: str) -> StorageInfo:
        """One storage.

        :raises StorageUnavailable: there is none of that name, or it is not there now
        """

    def volumes(self, storage: str) -> tuple[VolumeInfo, ...]:
        """The volumes of a storage, sorted by name; replicas included."""

    def state(self, volume: VolumeId) -> VolumeState | None:
        """Versions, lineage and partial state of a volume in one listing; None if there is no such volume."""

    def states(self, volumes: Sequence[VolumeId]) -> tuple[VolumeListing, ...]:
        """The states of many volumes, in their order; as few listings as the storages can do it with.

        A failure of one volume is in its place and keeps nobody from the others.
        """

    def heads(self, volumes: Sequence[VolumeId]) -> tuple[Head, ...]:
        """What the live data of many volumes is, in their order, at a cost that does not grow with their versions.

        Of those only that exist and whose storage can tell: not every storage can, and a volume that cannot be read is
        left out as well.

        :raises StorageUnavailable: a storage is not there now
        """

    def ensure_primary(self, volume: VolumeId) -> Lineage:
        """The lineage of a source volume; one is made (epoch 1) and stored durably the first time.

        :raises ConflictError: the volume is a replica here, so it cannot be a source
        """

    def snapshot(self, request: SnapshotRequest) -> tuple[Taken, ...]:
        """Take snapshots, in the order of the request; they are durable when this returns. One that exists under that
        name is returned as it is.

        A volume of which none can be taken (it is gone, its names are too long, a limit) has its error in its place and
        keeps nobody from the others.
        """

    def hold(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        """Protect a version from being destroyed; durable; holding it twice with one tag is one hold.

        :raises NoSuchSnapshot:
        """

    def release(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        """Take back a hold; nothing happens if there is none, or no such version."""

    def estimate(
        self, volume: VolumeId, base: VersionRef | None, to: VersionRef, *, intermediates: bool = False
    ) -> int | None:
        """Bytes of changes that a send would have, None where that is not known cheaply.

        :param intermediates: as in the SendRequest: what was written and deleted in between counts as well
        """

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        """Open a stream.

        :raises NoSuchSnapshot: base or to is gone
        :raises StaleResume: the resume state fits nothing here
        """

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        """Take the whole stream; returns once the new version is durable and visible (COMMITTED).

        On any failure what was received stays as partial state (see ``VolumeState.resume``) and nothing complete is
        touched. If the version is there already (a lost confirmation), the stream is not read and the version returned.

        :raises NotAReplica, StaleEpoch: the target's volume is not a replica that may take this
        :raises NoSuchSnapshot: the base is not on the target
        :raises NoSpace, ChecksumMismatch, StaleResume, Cancelled:
        """

    def abort_receive(self, volume: VolumeId) -> None:
        """Discard partial state; nothing happens if there is none."""

    def digests(self, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
        """Digest blocks, in order. The iterator must be exhausted or closed.

        :raises NoSuchSnapshot, DamagedData:
        :raises NotReadable: its key is not loaded, or the node's user may not read it
        """

    def manifest(self, request: ManifestRequest, cancel: Cancellation) -> Stream:
        """Walk a snapshot of a filesystem and stream its manifest; close the stream whatever happened.

        :raises NotReadable: its key is not loaded, or the node's user may not mount or read it
        :raises Unsupported: a storage without filesystems
        """

    def scrub(self, request: ScrubRequest) -> Scrub:
        """The state of the pool that a volume is in; does not wait for a scrub that it starts.

        :raises NotReadable: the node's user may not ask, or not start
        :raises Unsupported: a storage that does not check itself
        """

    def set_aside(self, volume: VolumeId, name: str) -> VersionRef | None:
        """Keep live data of a replica that no snapshot has as a snapshot ``name`` and remove it from where it lives.

        None if there is no such data. The volume's lineage becomes that of a replica if it had none or was promoted
        by hand; the caller gives the right one with the next receive.
        """

    def adopt(self, volume: VolumeId, lineage: Lineage) -> None:
        """Make an existing volume a replica of ``lineage``, for resync only; its data stays as it is until then.

        :raises StaleEpoch: the volume is of the same lineage with a newer epoch
        """

    def rename(self, volume: VolumeId, new: VolumeId) -> None:
        """Give a replica another name in its storage; what is below it moves with it. Nothing happens if ``new`` is of
        the same lineage already and ``volume`` is gone.

        :raises Unsupported: without Capability.RENAME, or to another storage
        :raises NotAReplica: ``volume`` is none, or ``new`` exists
        """

    def properties(self, volume: VolumeId) -> tuple[Property, ...]:
        """What a source volume has set by itself of what replicas may take over, by name; () where there is nothing.

        :raises NoSuchVolume:
        """

    def prune(self, request: PruneRequest) -> tuple[PruneOutcome, ...]:
        """Destroy what a policy does not keep, one by one: a failure of one never stops the others."""

    def remove(self, request: RemoveRequest) -> None:
        """Remove a replica; nothing happens if it is gone. Interrupted, it has fewer versions, and is asked for again.

        :raises NotAReplica: it is none, or of another lineage or epoch
        :raises VolumeChanged: it has a version, or live data, that the request does not know of
        :raises SnapshotHeld: somebody else than the job holds a version
        :raises NotAuthorized: this node keeps a minimum of what the peer that asks has here
        :raises VolumeBusy: it is in use, or has clones or volumes below it
        """

    def clone(self, volume: VolumeId, version: VersionRef, new: VolumeId) -> VolumeInfo:
        """Make a snapshot a new writable volume of the same node, without lineage.

        :raises Unsupported: not possible without copying: send and receive with RESTORE instead
        :raises VolumeBusy: ``new`` exists
        """

    def close(self) -> None:
        """Release connections; the endpoint cannot be used afterwards."""
