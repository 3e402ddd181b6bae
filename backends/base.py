"""One storage of this node: the contract that every backend fulfils.

A backend knows its storage and nothing else: no policy, no peer, no schedule. It is reached only through
:class:`replicator.local.LocalEndpoint`, which checks names, lineage and policy first and serialises what must be
(one receive, snapshot, adopt, set_aside or destroy of a volume at a time in this process); against other processes a
backend protects itself (a lock file, a rados lock, ZFS's own rules).

Rules for all methods: idempotent; everything reported as done is durable (a power cut at any moment afterwards loses
nothing of it, and one before leaves the state as it was or resumable); errors of :mod:`replicator.errors` only; what
a listing returns is validated as input from outside: a name that fails :mod:`replicator.names` is left out and
reported as a warning of ``info``. ``tests/conformance/test_backend.py`` holds each backend to it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

from replicator.cancellation import Cancellation
from replicator.diff_format import Piece
from replicator.endpoint import (
    DigestBatch,
    DigestRequest,
    Head,
    ManifestRequest,
    ReceiveRequest,
    Scrub,
    ScrubRequest,
    SendRequest,
    Taken,
    VolumeListing,
)
from replicator.errors import NotAReplica, ReplicatorError, VolumeBusy
from replicator.model import (
    Capability,
    Lack,
    Lineage,
    Property,
    Role,
    StorageInfo,
    StreamKind,
    Version,
    VersionRef,
    VolumeId,
    VolumeInfo,
    VolumeState,
)
from replicator.streams import Stream


class Backend(Protocol):
    """A storage. ``volume`` arguments are names within it (``VolumeId.name``).

    :ivar name: the storage's name in the configuration
    :ivar kind: ``image``, ``zfs``, ``rbd``, ``memory``
    """

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...

    @property
    def stream(self) -> StreamKind: ...

    @property
    def capabilities(self) -> Capability: ...

    def info(self) -> StorageInfo:
        """Size, free space, what it can do and what an operator should know.

        :raises StorageUnavailable: the storage is not there now
        """

    def lacking(self, uses: Capability) -> tuple[Lack, ...]:
        """What this process is not allowed to do, and would have to be for these uses.

        :param uses: SEND for a source, RECEIVE for a target
        :raises StorageUnavailable: the storage is not there now
        """

    def volumes(self) -> tuple[VolumeInfo, ...]:
        """All volumes, sorted by name. Cheap: one listing, no data is read."""

    def state(self, volume: str) -> VolumeState | None:
        """Versions (oldest first), lineage, partial state; None if there is no such volume.

        Partial or damaged leftovers are never listed as versions.
        """

    def brief(self, volume: str) -> VolumeInfo | None:
        """What :meth:`volumes` tells of this one, None if there is none; whatever the number of its versions, where the
        storage can."""

    def states(self, volumes: Sequence[str]) -> tuple[VolumeListing, ...]:
        """See :meth:`replicator.endpoint.Endpoint.states`."""

    def heads(self, volumes: Sequence[str]) -> tuple[Head, ...]:
        """See :meth:`replicator.endpoint.Endpoint.heads`."""

    def set_lineage(self, volume: str, lineage: Lineage) -> None:
        """Store lineage, role and epoch durably and atomically beside the volume's data."""

    def snapshot(self, volumes: tuple[str, ...], name: str) -> tuple[Version, ...]:
        """Snapshot each volume under ``name``, at one instant with Capability.ATOMIC_GROUP.

        A snapshot of that name that exists is returned unchanged. If one volume fails, those made before stay.
        """

    @property
    def pool(self) -> str:
        """What it shares instants with: volumes of all storages of this node with the same one can be snapshotted
        together (:meth:`snapshot_each`)."""

    def snapshot_each(self, parts: Sequence[tuple[Backend, tuple[str, ...]]], name: str) -> tuple[Taken, ...]:
        """:meth:`snapshot` of volumes of storages that have this one's ``pool``. What fails is in its place, and keeps
        nobody from the others; with Capability.ATOMIC_GROUP these still are of one instant.

        :param parts: storages, this one among them, with volumes of each
        """

    def destroy(self, volume: str, version: VersionRef) -> None:
        """Destroy one version; nothing happens if it is gone.

        :raises SnapshotHeld: it has holds
        """

    def destroy_all(self, volume: str, versions: Sequence[VersionRef]) -> dict[VersionRef, ReplicatorError]:
        """Destroy many versions, each as :meth:`destroy` does; those that stay, and why. One never blocks the others.

        :raises ReplicatorError: none of them could even be tried
        """

    def hold(self, volume: str, version: VersionRef, tag: str) -> None:
        """Add a hold. :raises NoSuchSnapshot:"""

    def release(self, volume: str, version: VersionRef, tag: str) -> None:
        """Remove a hold if it is there."""

    def estimate(
        self, volume: str, base: VersionRef | None, to: VersionRef, *, intermediates: bool = False
    ) -> int | None:
        """Bytes of changes between two versions if that is cheap to say, else None.

        :param intermediates: native streams: with those of the snapshots between the two
        """

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        """See :meth:`replicator.endpoint.Endpoint.send`."""

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        """See :meth:`replicator.endpoint.Endpoint.receive`; lineage rules are checked again here, under the lock that
        the receive itself holds. Every digest is verified before its data is written."""

    def abort_receive(self, volume: str) -> None:
        """Discard partial state."""

    def digests(self, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
        """Read and digest the blocks of a snapshot."""

    def is_sealed(self, volume: str, /) -> bool:
        """Whether :meth:`send` gives its data only encrypted, while this node may be able to read it."""

    def set_aside(self, volume: str, name: str) -> VersionRef | None:
        """See :meth:`replicator.endpoint.Endpoint.set_aside`."""

    def rename(self, volume: str, new: str) -> None:
        """See :meth:`replicator.endpoint.Endpoint.rename`; the endpoint has checked roles, and that ``new`` is free."""

    def remove(self, volume: str) -> None:
        """Remove a replica that has no versions any more, with what was half received; nothing happens if it is gone.

        :raises NotAReplica: it is none
        :raises VolumeBusy: it has a version all the same, is in use, or has something that depends on it
        """

    def properties(self, volume: str) -> tuple[Property, ...]:
        """See :meth:`replicator.endpoint.Endpoint.properties`."""

    def clone(self, volume: str, version: VersionRef, new: str) -> VolumeInfo:
        """See :meth:`replicator.endpoint.Endpoint.clone`."""

    def close(self) -> None:
        """Release handles and connections."""


def not_removable(label: str, lineage: Lineage | None) -> ReplicatorError:
    """The refusal of :meth:`Backend.remove`."""
    if lineage is None or lineage.role is not Role.REPLICA:
        return NotAReplica(
            f"volume {label} is no replica, so it is not removed", hint="remove it by hand if that is right"
        )
    return VolumeBusy(f"replica {label} has snapshots, so it is not removed", hint="look again what it has")


class OneByOne(ABC):
    """What a backend inherits that has no better way to treat many volumes or versions than one after the other."""

    name: str

    @property
    def pool(self) -> str:
        """See :class:`Backend`."""
        return self.name

    def is_sealed(self, _volume: str) -> bool:
        """See :class:`Backend`."""
        return False

    @abstractmethod
    def snapshot(self, volumes: tuple[str, ...], name: str) -> tuple[Version, ...]:
        """See :class:`Backend`."""

    def snapshot_each(self, parts: Sequence[tuple[Backend, tuple[str, ...]]], name: str) -> tuple[Taken, ...]:
        """See :class:`Backend`."""
        return tuple(self._taken(volume, name) for _, volumes in parts for volume in volumes)

    def _taken(self, volume: str, name: str) -> Taken:
        identity = VolumeId(self.name, volume)
        try:
            (version,) = self.snapshot((volume,), name)
        except ReplicatorError as error:
            return Taken(identity, None, error)
        return Taken(identity, version)

    @abstractmethod
    def state(self, volume: str) -> VolumeState | None:
        """See :class:`Backend`."""

    @abstractmethod
    def destroy(self, volume: str, version: VersionRef) -> None:
        """See :class:`Backend`."""

    def brief(self, volume: str) -> VolumeInfo | None:
        """See :class:`Backend`."""
        state = self.state(volume)
        return None if state is None else VolumeInfo(state.id, state.size, state.lineage, state.origin)

    def states(self, volumes: Sequence[str]) -> tuple[VolumeListing, ...]:
        """See :class:`Backend`."""
        return tuple(self._listed(volume) for volume in volumes)

    def _listed(self, volume: str) -> VolumeListing:
        identity = VolumeId(self.name, volume)
        try:
            return VolumeListing(identity, self.state(volume))
        except ReplicatorError as error:
            return VolumeListing(identity, None, error)

    def heads(self, volumes: Sequence[str]) -> tuple[Head, ...]:  # noqa: ARG002 - it cannot tell of any
        """See :class:`Backend`."""
        return ()

    def destroy_all(self, volume: str, versions: Sequence[VersionRef]) -> dict[VersionRef, ReplicatorError]:
        """See :class:`Backend`."""
        failed: dict[VersionRef, ReplicatorError] = {}
        for version in versions:
            try:
                self.destroy(volume, version)
            except ReplicatorError as error:
                failed[version] = error
        return failed


@runtime_checkable
class Inspectable(Protocol):
    """A storage of native streams whose snapshots can be looked into, and which checks its own disks."""

    def manifest(self, request: ManifestRequest, cancel: Cancellation) -> Stream:
        """See :meth:`replicator.endpoint.Endpoint.manifest`."""

    def scrub(self, request: ScrubRequest) -> Scrub:
        """See :meth:`replicator.endpoint.Endpoint.scrub`."""


@runtime_checkable
class DiffSource(Protocol):
    """A storage of block streams that tells of changes in records of its own, as ``rbd export-diff`` writes them."""

    def diff(
        self, volume: str, base: VersionRef | None, to: VersionRef, cancel: Cancellation
    ) -> AbstractContextManager[Iterator[Piece]]:
        """See :meth:`replicator.local.LocalEndpoint.diff`."""
