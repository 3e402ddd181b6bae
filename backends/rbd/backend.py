"""The RBD backend: what a storage of kind ``rbd`` answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime

from backends.base import Backend, OneByOne
from backends.rbd import (
    binding,
    catalog,
    exporting,
    health,
    layout,
    records,
    replica,
    roles,
    snapshotting,
    source,
    target,
    together,
)
from backends.rbd.binding import Binding, Image
from backends.rbd.catalog import Catalog, now_utc, read_catalog
from backends.rbd.changes import head_changed
from backends.rbd.cluster import Connection, Session, Where, is_absent
from backends.rbd.context import Context
from backends.rbd.header import Notes
from backends.rbd.locks import Lease
from backends.rbd.naming import HIDDEN, Naming, Place, encode
from backends.rbd.parents import Origins
from replicator import names
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.diff_format import Piece
from replicator.endpoint import DigestBatch, DigestRequest, Head, ReceiveRequest, SendRequest, Taken
from replicator.errors import DamagedData, InvalidName, NoSuchVolume, Unsupported
from replicator.model import (
    Capability,
    Lack,
    Lineage,
    Property,
    StorageInfo,
    StreamKind,
    Version,
    VersionRef,
    VolumeId,
    VolumeInfo,
    VolumeState,
)
from replicator.streams import Stream

CAPABILITIES = (
    Capability.SEND
    | Capability.RECEIVE
    | Capability.DIGESTS
    | Capability.ATOMIC_SNAPSHOT
    | Capability.CLONE
    | Capability.ORIGINS
    | Capability.PROPERTIES
    | Capability.ROLES
)
_MAX_WARNINGS = 20
WARNINGS_AGE = 60.0
"""Seconds for which ``info`` may repeat what it found wrong with images."""


class RbdBackend(OneByOne):
    """The images of a Ceph pool; see :mod:`backends.rbd`. Thread-safe.

    :param where: pool, cluster and user; the cluster may come and go
    :param namespace: the one namespace that it is about; None: all of the pool
    :param checksums: the checksum path (``transport.checksum``)
    :param grouped: snapshots of one run are taken at one instant, through an RBD group
    :param lease: of the lock that keeps two nodes from writing one image
    :param load: the bindings of Ceph, when they are first needed
    """

    kind = "rbd"
    stream = StreamKind.BLOCKS

    def __init__(
        self,
        name: str,
        where: Where,
        *,
        namespace: str | None = None,
        checksums: Checksums,
        grouped: bool = False,
        lease: Lease | None = None,
        clock: Callable[[], datetime] = now_utc,
        load: Callable[[], Binding] = binding.load,
    ) -> None:
        self.name = names.check_word("storage name", name)
        self.capabilities = CAPABILITIES | (Capability.ATOMIC_GROUP if grouped else Capability.NONE)
        self._grouped = grouped
        self._apart: tuple[str, ...] = ()
        self._where = where
        self._naming = Naming(None if namespace is None else encode(namespace))
        self._connection = Connection(name, where, load)
        self._context = Context(name, self._naming, self._connection, checksums, lease or Lease(), clock)
        self._warnings_lock = threading.Lock()
        self._warnings: tuple[float, tuple[str, ...]] | None = None
        self._unlike: dict[str, tuple[str, ...]] = {}

    def info(self) -> StorageInfo:
        """See :class:`~backends.base.Backend`."""
        with self._context.session("looking at the storage") as session:
            room = health.space(session, self._where)
            release = health.version(session)
            cannot = health.no_groups(session, self._naming.namespace or "") if self._grouped else ""
            warnings = [*health.cluster_warnings(session), *self._apart, *self._found_warnings(session)]
        warnings += [told for volume in sorted(self._unlike) for told in self._unlike[volume]]
        capabilities = self.capabilities
        if cannot:
            capabilities &= ~Capability.ATOMIC_GROUP
            warnings.insert(0, f"{self.name}: snapshots of several images are not of one instant: {cannot}")
        if len(warnings) > _MAX_WARNINGS:
            warnings[_MAX_WARNINGS:] = [f"and {len(warnings) - _MAX_WARNINGS} more warnings"]
        detail = f"Ceph {release}, {self._where}".replace("Ceph ,", "Ceph,")
        return StorageInfo(
            self.name, self.kind, self.stream, capabilities, room.total, room.free, detail, tuple(warnings)
        )

    def _found_warnings(self, session: Session) -> tuple[str, ...]:
        """What is wrong with images. It takes opening every one of them, and each run asks for ``info``: so what was
        found is used again for a while."""
        with self._warnings_lock:
            now = time.monotonic()
            if self._warnings is None or now - self._warnings[0] >= WARNINGS_AGE:
                found: list[str] = []
                for _ in self._listing(session, found):
                    pass
                self._warnings = (now, tuple(found))
            return self._warnings[1]

    def lacking(self, uses: Capability) -> tuple[Lack, ...]:
        """See :class:`~backends.base.Backend`."""
        with self._context.session("trying what is allowed") as session:
            return health.lacking(session, self._where, self._naming.namespace or "", uses)

    # -- listings

    def volumes(self) -> tuple[VolumeInfo, ...]:
        """See :class:`~backends.base.Backend`."""
        with self._context.session("listing the volumes") as session:
            return tuple(sorted(self._listing(session, []), key=lambda info: info.id))

    def _listing(self, session: Session, warnings: list[str]) -> Iterator[VolumeInfo]:
        """The images that are volumes; why others are not."""
        origins = Origins(self._context, session)
        for place in self._places(session):
            try:
                volume = self._naming.volume(place)
            except InvalidName as error:
                warnings.append(f"{self.name}: image {str(place)!a} is left out: {error}")
                continue
            label = self._context.label(volume)
            identity = VolumeId(self.name, volume)
            try:
                with session.image(place) as image:
                    reason = health.foreign(session, image)
                    if reason:
                        warnings.append(f"{label} is left out: {reason}")
                        continue
                    warnings.extend(health.image_warnings(session, image, label))
                    if self._grouped:
                        warnings.extend(health.group_warnings(session, image, label))
                    found = read_catalog(session, image, label)
                    origin = origins.of(place, image)
            except DamagedData as error:  # one that is damaged hides no other; whoever asks for it is told
                warnings.append(str(error))
                yield VolumeInfo(identity, None, None)
                continue
            except session.binding.errors as error:
                if is_absent(error):  # removed just now
                    continue
                raise
            warnings.extend(found.warnings)
            yield VolumeInfo(identity, found.size, found.lineage, origin)

    def _places(self, session: Session) -> Iterator[Place]:
        """All images that are not hidden ones of ours."""
        for namespace in self._namespaces(session):
            with session.ioctx(namespace) as ioctx:
                images = session.pool.list(ioctx)
            yield from (Place(namespace, image) for image in images if not image.startswith(HIDDEN))

    def _namespaces(self, session: Session) -> list[str]:
        if self._naming.namespace is not None:
            return [self._naming.namespace]
        with session.ioctx("") as ioctx:
            return ["", *session.pool.namespace_list(ioctx)]

    def state(self, volume: str) -> VolumeState | None:
        """See :class:`~backends.base.Backend`."""
        with self._context.session(f"listing {volume}") as session:
            try:
                with self._context.opened(session, volume) as (image, found):
                    if health.foreign(session, image):
                        return None
                    return self._state(session, image, found, volume)
            except NoSuchVolume:
                return None

    def _state(self, session: Session, image: Image, found: Catalog, volume: str) -> VolumeState:
        resume = found.partial.resume if found.partial is not None else None
        if resume is not None and any(version.guid == resume.to_guid for version in found.versions):
            resume = None  # a cut after the version was complete; the next receive forgets it
        origin = Origins(self._context, session).of(self._naming.place(volume), image)
        changed = found.is_replica and _written_to(session, image, found)
        return VolumeState(
            VolumeId(self.name, volume),
            found.size,
            found.versions,
            found.lineage,
            resume,
            head_changed=changed,
            origin=origin,
        )

    def brief(self, volume: str) -> VolumeInfo | None:
        """See :class:`~backends.base.Backend`."""
        with self._context.session(f"looking at {volume}") as session:
            try:
                with self._context.opened(session, volume) as (image, found):
                    if health.foreign(session, image):
                        return None
                    origin = Origins(self._context, session).of(self._naming.place(volume), image)
                    return VolumeInfo(VolumeId(self.name, volume), found.size, found.lineage, origin)
            except NoSuchVolume:
                return None

    def heads(self, volumes: Sequence[str]) -> tuple[Head, ...]:
        """See :class:`~backends.base.Backend`."""
        found = []
        with self._context.session("looking at live data") as session:
            for volume in volumes:
                try:
                    with self._context.opened(session, volume) as (image, seen):
                        if not health.foreign(session, image):
                            found.append(self._head(session, image, seen, volume))
                except (NoSuchVolume, DamagedData):
                    continue
        return tuple(found)

    def _head(self, session: Session, image: Image, found: Catalog, volume: str) -> Head:
        newest = found.versions[-1] if found.versions else None
        changed = newest is None or found.head_is != newest.guid or head_changed(session, image, found)
        return Head(VolumeId(self.name, volume), newest, changed, found.lineage, found.partial is not None)

    # -- small changes

    def set_lineage(self, volume: str, lineage: Lineage) -> None:
        """See :class:`~backends.base.Backend`."""
        with (
            self._context.session(f"writing the lineage of {volume}") as session,
            self._context.opened(session, volume) as (_, found),
            self._notes(session, volume, found) as notes,
        ):
            notes.metadata_set(records.LINEAGE, records.encode_lineage(lineage, found.image))

    def _notes(self, session: Session, volume: str, found: Catalog) -> AbstractContextManager[Notes]:
        return session.notes(self._naming.place(volume).namespace, found.image)

    def promote(self, volume: str, lineage: Lineage, at: VersionRef) -> None:
        """See :class:`~backends.base.Backend`."""
        roles.change(self._context, volume, lineage, at)

    def demote(self, volume: str, lineage: Lineage, at: VersionRef | None) -> None:
        """See :class:`~backends.base.Backend`."""
        if at is None:
            self.set_lineage(volume, lineage)
        else:
            roles.change(self._context, volume, lineage, at)

    def hold(self, volume: str, version: VersionRef, tag: str) -> None:
        """See :class:`~backends.base.Backend`."""
        names.check_tag(tag)
        with (
            self._context.session(f"holding {volume}@{version.name}") as session,
            self._context.opened(session, volume, read_only=False) as (image, found),
            self._notes(session, volume, found) as notes,
        ):
            snapshot = found.require(version)
            if tag not in snapshot.version.holds:
                catalog.add_hold(session, image, notes, snapshot.raw, tag)

    def release(self, volume: str, version: VersionRef, tag: str) -> None:
        """See :class:`~backends.base.Backend`."""
        names.check_tag(tag)
        with self._context.session(f"releasing {volume}@{version.name}") as session:
            try:
                with (
                    self._context.opened(session, volume, read_only=False) as (image, found),
                    self._notes(session, volume, found) as notes,
                ):
                    snapshot = found.find(version)
                    if snapshot is not None:
                        catalog.remove_hold(session, image, notes, found, snapshot, tag)
            except NoSuchVolume:
                return

    def destroy(self, volume: str, version: VersionRef) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._context.session(f"destroying {volume}@{version.name}") as session:
            try:
                with (
                    self._context.opened(session, volume, read_only=False) as (image, found),
                    self._notes(session, volume, found) as notes,
                ):
                    snapshot = found.find(version)
                    if snapshot is not None:
                        catalog.destroy(session, image, notes, found, snapshot)
            except NoSuchVolume:
                return

    def abort_receive(self, volume: str) -> None:
        """See :class:`~backends.base.Backend`."""
        replica.abort_receive(self._context, volume)

    # -- data

    def snapshot(self, volumes: tuple[str, ...], name: str) -> tuple[Version, ...]:
        """See :class:`~backends.base.Backend`."""
        names.check_snapshot(name)
        if self._grouped and len(volumes) > 1:
            return tuple(taken.get() for taken in self.snapshot_each([(self, volumes)], name))
        return tuple(snapshotting.take_snapshot(self._context, volume, name) for volume in volumes)

    @property
    def pool(self) -> str:
        """See :class:`~backends.base.Backend`. A group is of one cluster and namespace, whatever the pools."""
        if not self._grouped:
            return self.name
        where = self._where
        place = self._naming.namespace
        return f"rbd {where.conffile} {where.user} {where.keyring} {'*' if place is None else f'/{place}'}"

    def snapshot_each(self, parts: Sequence[tuple[Backend, tuple[str, ...]]], name: str) -> tuple[Taken, ...]:
        """See :class:`~backends.base.Backend`. Through one group for all storages of the namespace."""
        if not self._grouped or sum(len(volumes) for _, volumes in parts) < 2:
            return super().snapshot_each(parts, name)
        contexts = [(part._context, volumes) for part, volumes in parts if isinstance(part, RbdBackend)]
        return together.take_each(contexts, name, self._note_apart)

    def _note_apart(self, why: tuple[str, ...]) -> None:
        """What ``info`` says until the next time."""
        self._apart = why

    def estimate(
        self,
        volume: str,
        base: VersionRef | None,
        to: VersionRef,
        *,
        intermediates: bool = False,  # noqa: ARG002
    ) -> int | None:
        """See :class:`~backends.base.Backend`."""
        return source.estimate(self._context, volume, base, to)

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        """See :class:`~backends.base.Backend`."""
        return source.open_stream(self._context, request, cancel)

    def diff(
        self, volume: str, base: VersionRef | None, to: VersionRef, cancel: Cancellation
    ) -> AbstractContextManager[Iterator[Piece]]:
        """See :class:`~backends.base.DiffSource`."""
        return exporting.open_diff(self._context, volume, base, to, cancel)

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        """See :class:`~backends.base.Backend`."""
        version, told = replica.receive(self._context, request, stream, cancel)
        if told:
            self._unlike[request.volume.name] = told
        else:
            self._unlike.pop(request.volume.name, None)
        return version

    def digests(self, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
        """See :class:`~backends.base.Backend`."""
        return source.digest_blocks(self._context, request, cancel)

    def set_aside(self, volume: str, name: str) -> VersionRef | None:
        """See :class:`~backends.base.Backend`."""
        return snapshotting.set_aside(self._context, volume, name)

    def rename(self, volume: str, _new: str) -> None:
        """Not declared, so not asked for."""
        raise Unsupported(f"image {volume} cannot be renamed", hint="`rbd rename` it while nothing uses it")

    def remove(self, volume: str) -> None:
        """See :class:`~backends.base.Backend`."""
        target.remove_replica(self._context, volume)
        self._unlike.pop(volume, None)

    def properties(self, volume: str) -> tuple[Property, ...]:
        """See :class:`~backends.base.Backend`."""
        with (
            self._context.session(f"looking at {volume}") as session,
            self._context.opened(session, volume) as (image, _),
        ):
            return layout.offered(session, image)

    def clone(self, volume: str, version: VersionRef, new: str) -> VolumeInfo:
        """See :class:`~backends.base.Backend`."""
        names.check_volume(new)
        size = snapshotting.clone_snapshot(self._context, volume, version, new)
        return VolumeInfo(VolumeId(self.name, new), size, None)

    def close(self) -> None:
        """Leave the cluster; whatever still runs ends first."""
        self._connection.close()


def _written_to(session: Session, image: Image, found: Catalog) -> bool:
    """Whether the head of a replica has what no version has, and we did not put there."""
    if found.partial is not None:
        return False
    return found.head_is is None or head_changed(session, image, found)
