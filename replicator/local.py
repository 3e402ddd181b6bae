"""The endpoint of this node: its backends behind the :class:`~replicator.endpoint.Endpoint` contract.

What is the same for every storage is done here once: names are checked, a volume is written by one operation at a
time, lineage rules are enforced, retention is decided. Backends know only their storage.
"""

from __future__ import annotations

import secrets
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, tzinfo

from backends.base import Backend, DiffSource, Inspectable
from replicator import names, retention
from replicator.cancellation import Cancellation
from replicator.diff_format import Piece
from replicator.diff_streams import pieces_of
from replicator.endpoint import (
    Copies,
    Copy,
    DigestBatch,
    DigestRequest,
    Head,
    ManifestRequest,
    PruneOutcome,
    PruneRequest,
    ReceiveMode,
    ReceiveRequest,
    RemoveRequest,
    RoleChange,
    Scrub,
    ScrubRequest,
    SendRequest,
    Sighting,
    SnapshotRequest,
    Taken,
    VolumeListing,
)
from replicator.errors import (
    Cancelled,
    ConflictError,
    NoSuchVolume,
    NotAReplica,
    NotReadable,
    ReplicatorError,
    SnapshotHeld,
    StorageUnavailable,
    Unsupported,
    UsageError,
)
from replicator.model import (
    Capability,
    HoldTag,
    Lack,
    Lineage,
    Property,
    Role,
    StorageInfo,
    Version,
    VersionRef,
    VolumeId,
    VolumeInfo,
    VolumeState,
    waits_for_rejoin,
)
from replicator.removing import check_removable, keeps_a_minimum
from replicator.roles import check_change, check_may_receive, newest_complete, stale_epoch
from replicator.streams import KEY_SIZE, Stream
from replicator.volume_locks import RoleChanges, VolumeLocks


@dataclass(frozen=True, slots=True)
class PeerView:
    """What this node does for a peer of what the peer has a right to ask, and how.

    :ivar peer: its name; replicas below it are its own
    :ivar keep: a retention policy that every prune is widened by; "" for none
    :ivar replicas_only: storages in which nothing is changed but replicas: there the peer's replicas are among volumes
        of this node's own
    :ivar sources: of those, where it may protect and prune others as well, because it pulls from there
    :ivar jobs: of this node, that snapshot volumes of this node: their snapshots are not the peer's to prune
    """

    peer: str
    keep: str = ""
    replicas_only: frozenset[str] = frozenset()
    sources: frozenset[str] = frozenset()
    jobs: frozenset[str] = frozenset()

    def owns(self, volume: VolumeId, lineage: Lineage | None) -> bool:
        """Whether this is a replica that the peer made, and so nothing that it does not have."""
        place = volume.name.startswith(f"{self.peer}/") or volume.storage in self.replicas_only
        return place and lineage is not None and lineage.role is Role.REPLICA


class LocalEndpoint:
    """This node's storages.

    :param node: this node's name
    :param backends: by storage name
    :param zone: the time zone in which the hours, days and weeks of a retention policy begin
    :param view: whom it is for, where that is a peer (:meth:`for_peer`)
    :param witness: looks for a third node, see :meth:`~replicator.endpoint.Endpoint.sight`; None: it cannot
    :ivar role_changes: of this node, whoever asked for them
    """

    def __init__(
        self,
        node: str,
        backends: Mapping[str, Backend],
        *,
        zone: tzinfo = UTC,
        view: PeerView | None = None,
        locks: VolumeLocks | None = None,
        witness: Callable[[str, str], Sighting] | None = None,
        role_changes: RoleChanges | None = None,
    ) -> None:
        self._node = names.check_node(node)
        self._backends = dict(backends)
        self._zone = zone
        self._view = view
        self._locks = locks or VolumeLocks()
        self._witness = witness
        self.role_changes = role_changes or RoleChanges()

    def for_peer(self, view: PeerView, witness: Callable[[str, str], Sighting] | None = None) -> LocalEndpoint:
        """The same node, as a peer gets to ask it."""
        return LocalEndpoint(
            self._node,
            self._backends,
            zone=self._zone,
            view=view,
            locks=self._locks,
            witness=witness,
            role_changes=self.role_changes,
        )

    @property
    def node(self) -> str:
        """This node's name."""
        return self._node

    def _backend(self, storage: str) -> Backend:
        backend = self._backends.get(storage)
        if backend is None:
            known = ", ".join(sorted(self._backends)) or "none"
            raise StorageUnavailable(
                f"node {self._node} has no storage {storage!r}",
                hint=f"configured there: {known}; add [storage.{storage}] to its replicator.toml or correct the name",
            )
        return backend

    def _of(self, volume: VolumeId) -> Backend:
        names.check_volume(volume.name)
        return self._backend(volume.storage)

    # -- listings

    def storages(self) -> tuple[StorageInfo, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found = []
        for name, backend in sorted(self._backends.items()):
            try:
                found.append(backend.info())
            except ReplicatorError as error:
                found.append(
                    StorageInfo(
                        name, backend.kind, backend.stream, backend.capabilities, 0, 0, "not available", (str(error),)
                    )
                )
        return tuple(found)

    def storage(self, name: str) -> StorageInfo:
        """See :class:`~replicator.endpoint.Endpoint`."""
        return self._backend(name).info()

    def lacking(self, storage: str, uses: Capability) -> tuple[Lack, ...]:
        """What this process is not allowed to do with a storage; see :class:`~backends.base.Backend`."""
        return self._backend(storage).lacking(uses)

    def volumes(self, storage: str) -> tuple[VolumeInfo, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        return self._backend(storage).volumes()

    def state(self, volume: VolumeId) -> VolumeState | None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        return self._of(volume).state(volume.name)

    def states(self, volumes: Sequence[VolumeId]) -> tuple[VolumeListing, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: dict[VolumeId, VolumeListing] = {}
        for storage, group in _by_storage(volumes).items():
            wanted = tuple(names.check_volume(volume.name) for volume in group)
            try:
                listed = self._backend(storage).states(wanted)
            except ReplicatorError as error:
                listed = tuple(VolumeListing(volume, None, error) for volume in group)
            found.update((listing.volume, listing) for listing in listed)
        return tuple(found[volume] for volume in volumes)

    def heads(self, volumes: Sequence[VolumeId]) -> tuple[Head, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: list[Head] = []
        for storage, group in _by_storage(volumes).items():
            found += self._backend(storage).heads(tuple(names.check_volume(volume.name) for volume in group))
        return tuple(found)

    def _existing(self, volume: VolumeId) -> VolumeState:
        state = self.state(volume)
        if state is None:
            raise self._no_such(volume)
        return state

    def _lineage(self, volume: VolumeId) -> Lineage | None:
        """Of a volume that must exist."""
        found = self._of(volume).brief(volume.name)
        if found is None:
            raise self._no_such(volume)
        return found.lineage

    def _no_such(self, volume: VolumeId) -> NoSuchVolume:
        return NoSuchVolume(
            f"node {self._node} has no volume {volume}", hint="`replicator status` lists the volumes of each job"
        )

    # -- sources

    def ensure_primary(self, volume: VolumeId) -> Lineage:
        """See :class:`~replicator.endpoint.Endpoint`."""
        lineage = self._lineage(volume)
        if lineage is not None and lineage.role is Role.PRIMARY:
            return lineage
        if lineage is not None:
            raise ConflictError(
                f"volume {volume} on node {self._node} is a replica, so it cannot be the source of a job",
                kind="replica_as_source",
                hint="replicate from its primary, or leave it out with a '!' pattern in the job's source",
            )
        with self._locks.writing(volume, "marking it as a primary"):
            again = self._lineage(volume)  # somebody may have been faster
            if again is not None:
                return again
            lineage = Lineage(str(uuid.uuid4()), Role.PRIMARY, 1)
            self._of(volume).set_lineage(volume.name, lineage)
        self.role_changes.add()
        return lineage

    def snapshot(self, request: SnapshotRequest) -> tuple[Taken, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        names.check_snapshot(request.name)
        taken: dict[VolumeId, Taken] = {}
        pools: dict[str, list[tuple[Backend, tuple[str, ...]]]] = {}
        for storage, group in _by_storage(request.volumes).items():
            volumes = tuple(names.check_volume(volume.name) for volume in group)
            try:
                backend = self._backend(storage)
            except ReplicatorError as error:
                taken |= {volume: Taken(volume, None, error) for volume in group}
            else:
                pools.setdefault(backend.pool, []).append((backend, volumes))
        for parts in pools.values():
            try:
                together = parts[0][0].snapshot_each(parts, request.name)
            except ReplicatorError as error:
                wanted = (VolumeId(backend.name, volume) for backend, volumes in parts for volume in volumes)
                together = tuple(Taken(volume, None, error) for volume in wanted)
            taken |= {each.volume: each for each in together}
        return tuple(taken[volume] for volume in request.volumes)

    def estimate(
        self, volume: VolumeId, base: VersionRef | None, to: VersionRef, *, intermediates: bool = False
    ) -> int | None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        return self._of(volume).estimate(volume.name, base, to, intermediates=intermediates)

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        """See :class:`~replicator.endpoint.Endpoint`."""
        return self._of(request.volume).send(request, cancel)

    @contextmanager
    def diff(
        self, volume: VolumeId, base: VersionRef | None, to: VersionRef, cancel: Cancellation
    ) -> Iterator[Iterator[Piece]]:
        """The difference between two snapshots of this node in records: those that the storage tells of, or else the
        extents of its block stream.

        :raises NoSuchSnapshot: base or to is gone
        :raises Unsupported: a storage of native streams; or one that cannot tell
        """
        backend = self._of(volume)
        if isinstance(backend, DiffSource):
            with backend.diff(volume.name, base, to, cancel) as pieces:
                yield pieces
            return
        with backend.send(SendRequest(volume, base, to, secrets.token_hex(KEY_SIZE)), cancel) as stream:
            yield pieces_of(stream)

    def digests(self, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        self._check_open(request.volume)
        return self._of(request.volume).digests(request, cancel)

    def manifest(self, request: ManifestRequest, cancel: Cancellation) -> Stream:
        """See :class:`~replicator.endpoint.Endpoint`."""
        inspectable = self._inspectable(request.volume)
        self._check_open(request.volume)
        return inspectable.manifest(request, cancel)

    def _check_open(self, volume: VolumeId) -> None:
        """:raises NotReadable: the peer gets it only encrypted, so it is not told what is in it either"""
        view, backend = self._view, self._of(volume)
        if view is None or view.owns(volume, self._existing(volume).lineage) or not backend.is_sealed(volume.name):
            return
        raise NotReadable(
            f"{volume} of node {self._node} is sent encrypted, so node {view.peer} is told neither its file names nor "
            "digests of its content",
            hint=f"it is verified by scrubs; or verify it on {self._node}",
        )

    def scrub(self, request: ScrubRequest) -> Scrub:
        """See :class:`~replicator.endpoint.Endpoint`."""
        return self._inspectable(request.volume).scrub(request)

    def _inspectable(self, volume: VolumeId) -> Inspectable:
        backend = self._of(volume)
        if not isinstance(backend, Inspectable):
            raise Unsupported(
                f"storage {volume.storage} of node {self._node} ({backend.kind}) has neither filesystems nor scrubs",
                hint="its volumes are compared block by block: `replicator verify` without --scrub",
            )
        return backend

    # -- protection

    def hold(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        self._check_protectable(volume)
        self._of(volume).hold(volume.name, version, names.check_tag(tag))

    def release(self, volume: VolumeId, version: VersionRef, tag: str) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        self._check_protectable(volume)
        self._of(volume).release(volume.name, version, names.check_tag(tag))

    # -- targets

    def _check_changeable(self, volume: VolumeId) -> None:
        """:raises NotAReplica: it is a volume of this node's own, in a storage where a peer may only change replicas"""
        if self._view is None or volume.storage not in self._view.replicas_only:
            return
        found = self._of(volume).brief(volume.name)
        if found is not None and (found.lineage is None or found.lineage.role is not Role.REPLICA):
            raise NotAReplica(
                f"volume {volume} of node {self._node} is its own, and no replica",
                hint=f"a resync from elsewhere cannot take it over: rename it, or resync on {self._node}",
            )

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        """See :class:`~replicator.endpoint.Endpoint`."""
        names.check_snapshot(request.to.name)
        if request.aside:
            names.check_snapshot(request.aside)
        if request.hold:
            names.check_tag(request.hold)
        if request.lineage is None and request.mode is not ReceiveMode.RESTORE:
            raise UsageError(f"no lineage is given for the replica {request.volume}", hint="")
        backend = self._of(request.volume)
        doing = f"receiving {request.to.name}"
        with cancel.child() as part, self._locks.writing(request.volume, doing, part):
            if request.lineage is not None and request.mode is not ReceiveMode.RESTORE:
                there: VolumeInfo | VolumeState | None = backend.brief(request.volume.name)
                if there is not None and there.lineage is None:
                    there = backend.state(request.volume.name)
                check_may_receive(request.volume, there, request.lineage, request.to.guid)
                if there is None or there.lineage is None or there.lineage.epoch != request.lineage.epoch:
                    self.role_changes.add()
            return backend.receive(request, stream, part)

    def _check_protectable(self, volume: VolumeId) -> None:
        """The same for what is done to sources, too."""
        if self._view is not None and volume.storage not in self._view.sources:
            self._check_changeable(volume)

    def abort_receive(self, volume: VolumeId) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        with self._locks.writing(volume, "discarding partial state"):
            self._check_changeable(volume)
            self._of(volume).abort_receive(volume.name)

    def set_aside(self, volume: VolumeId, name: str) -> VersionRef | None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        names.check_snapshot(name)
        with self._locks.writing(volume, "keeping its own data aside"):
            self._check_changeable(volume)
            self._check_not_primary(volume)
            self.role_changes.add()
            return self._of(volume).set_aside(volume.name, name)

    def adopt(self, volume: VolumeId, lineage: Lineage) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        with self._locks.writing(volume, "making it a replica"):
            self._check_changeable(volume)
            self._check_not_primary(volume)
            current = self._existing(volume).lineage
            if current is not None and current.uuid == lineage.uuid and current.epoch > lineage.epoch:
                raise stale_epoch(volume, current, lineage)
            replica = Lineage(lineage.uuid, Role.REPLICA, lineage.epoch)
            if current != replica:
                self._of(volume).set_lineage(volume.name, replica)
                self.role_changes.add()

    def _check_not_primary(self, volume: VolumeId) -> None:
        """:raises NotAReplica: a peer asks for what ends a primary: that takes a change of role, or this node"""
        found = self._of(volume).brief(volume.name) if self._view is not None else None
        if found is not None and found.lineage is not None and found.lineage.role is Role.PRIMARY:
            raise NotAReplica(
                f"volume {volume} of node {self._node} is a primary there (epoch {found.lineage.epoch})",
                hint="if it was promoted, it has the newer data: `replicator rejoin` on the node that was the primary "
                f"before; or make it a replica with `replicator demote {volume}` on {self._node}",
            )

    # -- roles

    def change_role(self, change: RoleChange) -> Lineage:
        """See :class:`~replicator.endpoint.Endpoint`."""
        volume, new = change.volume, change.lineage
        backend = self._of(volume)
        if Capability.ROLES not in backend.capabilities:
            raise Unsupported(
                f"{volume} stays what it is: storage {volume.storage} ({backend.kind}) does not change roles yet",
                hint="`replicator restore` makes any snapshot of a replica a volume of its own",
            )
        self._check_may_change(change)
        promotes = new.role is Role.PRIMARY and change.at is not None
        if promotes and check_change(self._existing(volume), change):
            # Only one that is going to be: a request that comes late must not stop anything.
            self._locks.interrupt(
                volume,
                Cancelled(f"{volume} is being promoted", hint="what was received of the next snapshot is discarded"),
            )
        with self._locks.writing(volume, f"making it a {new.role}"):
            wanted = check_change(self._existing(volume), change)
            if promotes and change.at is not None:
                if wanted:
                    backend.abort_receive(volume.name)
                backend.promote(volume.name, new, change.at)
            elif wanted and change.expected.role is not new.role:
                backend.demote(volume.name, new, change.at)
            elif wanted:
                backend.set_lineage(volume.name, new)
        self.role_changes.add()
        return new

    def _check_may_change(self, change: RoleChange) -> None:
        """A peer hands over, or takes back, what it has replicated here; nothing else.

        :raises NotAReplica: it is a volume of this node's own
        """
        if self._view is None:
            return
        state = self._existing(change.volume)
        tags = (HoldTag.parse(tag) for version in state.versions for tag in version.tags)
        here = (self._node, change.volume.storage)
        came_here = any(tag is not None and (tag.node, tag.storage) == here for tag in tags)
        if not came_here and not self._view.owns(change.volume, state.lineage):
            raise NotAReplica(
                f"volume {change.volume} of node {self._node} was never replicated here",
                hint=f"change its role on {self._node}",
            )

    def copies(self, lineage: str) -> Copies:
        """See :class:`~replicator.endpoint.Endpoint`."""
        found: list[Copy] = []
        unseen: list[str] = []
        for name, backend in sorted(self._backends.items()):
            try:
                listed = backend.volumes()
                for volume in listed:
                    if volume.lineage is not None and volume.lineage.uuid == lineage:
                        state = backend.state(volume.id.name)
                        if state is not None and state.lineage is not None:
                            changed = state.head_changed or state.lineage.role is Role.PRIMARY
                            found.append(Copy(state.id, state.lineage, newest_complete(state), changed))
            except ReplicatorError:
                unseen.append(name)
        return Copies(tuple(found), tuple(unseen))

    def sight(self, node: str, lineage: str) -> Sighting:
        """See :class:`~replicator.endpoint.Endpoint`."""
        names.check_node(node)
        if node == self._node:
            return Sighting(node, self.copies(lineage))
        if self._witness is None:
            raise Unsupported(f"node {self._node} cannot look for node {node} now", hint="start its daemon")
        return self._witness(node, lineage)

    def rename(self, volume: VolumeId, new: VolumeId) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        names.check_volume(new.name)
        backend = self._of(volume)
        if Capability.RENAME not in backend.capabilities or new.storage != volume.storage:
            raise Unsupported(
                f"{volume} cannot be renamed to {new} here", hint="rename it with the storage's own means"
            )
        with self._locks.writing(volume, "renaming it"), self._locks.writing(new, f"renaming {volume} to it"):
            there, taken = backend.state(volume.name), backend.state(new.name)
            if there is not None and taken is not None:  # between the two looks it may have moved with what is above it
                there = backend.state(volume.name)
            lineage = (there or taken or self._existing(volume)).lineage
            if lineage is None or lineage.role is not Role.REPLICA:
                raise NotAReplica(
                    f"volume {volume} is not a replica of ours", hint="rename it by hand if that is right"
                )
            if taken is not None and there is not None:
                raise NotAReplica(
                    f"{volume} cannot be renamed to {new}: that exists", hint=f"rename or remove {new} if it is yours"
                )
            if there is None:
                return
            try:
                backend.rename(volume.name, new.name)
            except NoSuchVolume:
                moved = backend.state(new.name)
                if moved is None or moved.lineage != there.lineage:
                    raise

    def properties(self, volume: VolumeId) -> tuple[Property, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        return self._of(volume).properties(volume.name)

    def clone(self, volume: VolumeId, version: VersionRef, new: VolumeId) -> VolumeInfo:
        """See :class:`~replicator.endpoint.Endpoint`."""
        names.check_volume(new.name)
        self._check_changeable(volume)
        if new.storage != volume.storage:
            raise UsageError(f"{volume} cannot be cloned into another storage ({new})", hint="copy it with a restore")
        with self._locks.writing(new, "making a clone"):
            return self._of(volume).clone(volume.name, version, new.name)

    def prune(self, request: PruneRequest) -> tuple[PruneOutcome, ...]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        backend = self._of(request.volume)
        self._check_protectable(request.volume)
        state = self._existing(request.volume)
        self._check_prunable(request, state)
        policy = retention.parse(request.keep)
        protect = frozenset(request.protect)
        decisions = retention.apply(state.versions, policy, job=request.job, protect=protect, zone=self._zone)
        floor = {}
        if self._view is not None and self._view.keep:
            minimum = retention.parse(self._view.keep)
            floor = {
                d.version.guid: d.reason
                for d in retention.apply(state.versions, minimum, job=request.job, zone=self._zone)
                if d.keep
            }
        outcomes = []
        others = self._of_another(request, state)
        awaited = max((v.position for v in state.versions if waits_for_rejoin(v)), default=None)
        for decision in decisions:
            version, kept, reason = decision.version, decision.keep, decision.reason
            if not kept and awaited is not None and version.position <= awaited:
                kept, reason = True, "it was promoted, and a copy that has not followed yet may need it"
            elif not kept and others:
                kept, reason = True, f"kept: {others}"
            elif not kept and version.guid in floor:
                kept, reason = True, f"this node's minimum: {floor[version.guid]}"
            outcomes.append(PruneOutcome(version, kept, reason))
        going = tuple(outcome.version.ref for outcome in outcomes if not outcome.kept)
        if request.dry_run or not going:
            return tuple(outcomes)
        try:
            failed = backend.destroy_all(request.volume.name, going)
        except ReplicatorError as error:
            failed = dict.fromkeys(going, error)
        return tuple(_after(outcome, failed.get(outcome.version.ref)) for outcome in outcomes)

    def _check_prunable(self, request: PruneRequest, state: VolumeState) -> None:
        """:raises NotAReplica: a peer may push there, and what it once pushed is a primary now"""
        view, lineage = self._view, state.lineage
        promoted = lineage is not None and lineage.role is Role.PRIMARY
        if view is not None and promoted and request.volume.storage not in view.sources:
            raise NotAReplica(
                f"volume {request.volume} of node {self._node} is a primary there: node {view.peer} prunes it no more",
                hint=f"`replicator rejoin` on {view.peer}",
            )

    def remove(self, request: RemoveRequest) -> None:
        """See :class:`~replicator.endpoint.Endpoint`."""
        volume = request.volume
        backend = self._of(volume)
        with self._locks.writing(volume, "removing it"):
            self._check_changeable(volume)
            state = backend.state(volume.name)
            if state is None:
                return
            check_removable(request, state, self._node)
            if self._view is not None and self._view.keep:
                raise keeps_a_minimum(volume, self._node, self._view.peer, self._view.keep)
            for version in state.versions:
                for tag in version.holds:
                    backend.release(volume.name, version.ref, tag)
            failed = backend.destroy_all(volume.name, [version.ref for version in state.versions])
            for error in failed.values():
                raise error
            backend.remove(volume.name)
            self.role_changes.add()

    def _of_another(self, request: PruneRequest, state: VolumeState) -> str:
        """Why the snapshots of that job are not the peer's to prune; "" where they are. Snapshots have the names of
        their jobs, and what a job of the peer replicates from here has holds of that job and the peer."""
        view = self._view
        if view is None or view.owns(request.volume, state.lineage):
            return ""
        if request.job in view.jobs:
            return f"job {request.job} is one of node {self._node}"
        tags = (HoldTag.parse(tag) for version in state.versions for tag in version.tags)
        if any(tag is not None and tag.job == request.job and tag.node in (view.peer, self._node) for tag in tags):
            return ""
        return f"nothing is held for a job {request.job} of node {view.peer}, so it may be another node's"

    def close(self) -> None:
        """Close every backend."""
        for backend in self._backends.values():
            backend.close()


def _after(outcome: PruneOutcome, error: ReplicatorError | None) -> PruneOutcome:
    """What became of a version that was to go, or was not."""
    if outcome.kept or error is None:
        return outcome
    if isinstance(error, SnapshotHeld):  # since the listing, or by a clone of it
        return replace(outcome, kept=True, reason=str(error))
    return replace(outcome, kept=True, error=str(error))


def _by_storage(volumes: Sequence[VolumeId]) -> dict[str, list[VolumeId]]:
    found: dict[str, list[VolumeId]] = {}
    for volume in dict.fromkeys(volumes):
        found.setdefault(volume.storage, []).append(volume)
    return found
