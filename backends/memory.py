"""Volumes in memory: a storage for tests and simulations that keeps the whole contract, and forgets at exit.

What other storages make durable by fsync, this one makes visible by one assignment under its lock: whatever is
interrupted leaves the state as it was, or resumable at the last chunk applied.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime

from backends.base import Backend, OneByOne, not_removable
from backends.blocks import ChunkChecker, after, changes, packed, within
from backends.memory_volume import Partial, Stored, Volume, check_resume, continues, newest_data, next_position
from replicator import names
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.endpoint import DigestBatch, DigestRequest, Head, ReceiveMode, ReceiveRequest, SendRequest, Taken
from replicator.errors import (
    NoSuchSnapshot,
    NoSuchVolume,
    NotAReplica,
    SnapshotExists,
    SnapshotHeld,
    StaleResume,
    Unsupported,
    VolumeBusy,
    VolumeChanged,
)
from replicator.model import (
    Capability,
    Lack,
    Lineage,
    Property,
    Role,
    StorageInfo,
    StreamKind,
    Version,
    VersionKind,
    VersionRef,
    VolumeId,
    VolumeInfo,
    VolumeState,
)
from replicator.roles import check_may_receive
from replicator.streams import CHUNK_SIZE, BlockChunk, ChunkStream, Extent, Stream

_DIGEST_BATCH = 256
"""Digests in one batch."""

CAPABILITIES = (
    Capability.SEND
    | Capability.RECEIVE
    | Capability.BOOKMARKS
    | Capability.ATOMIC_GROUP
    | Capability.ATOMIC_SNAPSHOT
    | Capability.DIGESTS
    | Capability.CLONE
    | Capability.ROLES
    | Capability.RENAME
)


def _utc_now() -> datetime:
    return datetime.now(UTC)


class MemoryBackend(OneByOne):
    """A storage in memory.

    :param capabilities: declared ones; a test takes some away
    :param chunk_size: bytes of data in a chunk that it sends, at most
    :param clock: creation times of snapshots
    """

    kind = "memory"
    stream = StreamKind.BLOCKS

    def __init__(
        self,
        name: str,
        *,
        checksums: Checksums,
        capabilities: Capability = CAPABILITIES,
        chunk_size: int = CHUNK_SIZE,
        clock: Callable[[], datetime] = _utc_now,
    ) -> None:
        self.name = name
        self.capabilities = capabilities
        self._checksums = checksums
        self._chunk_size = chunk_size
        self._clock = clock
        self._lock = threading.RLock()
        self._volumes: dict[str, Volume] = {}
        self._receiving: set[str] = set()
        self._users: dict[str, str] = {}

    # -- what a guest does to its disk

    def create(self, volume: str, data: bytes) -> None:
        """A new volume with live data."""
        with self._lock:
            found = self._volumes.setdefault(names.check_volume(volume), Volume())
            found.head = bytearray(data)

    def write(self, volume: str, offset: int, data: bytes) -> None:
        """Write live data. On a replica this is what nobody should do: its live data then departs from its newest
        snapshot."""
        with self._lock:
            head = self._live(volume)
            if offset + len(data) > len(head):
                head.extend(bytes(offset + len(data) - len(head)))
            head[offset : offset + len(data)] = data

    def attach(self, volume: str, user: str) -> None:
        """Somebody has the live data open from now on."""
        with self._lock:
            self._users[volume] = user

    def detach(self, volume: str) -> None:
        """Nobody has it open any more."""
        with self._lock:
            self._users.pop(volume, None)

    def resize(self, volume: str, size: int) -> None:
        """Grow with zeros, or cut."""
        with self._lock:
            head = self._live(volume)
            del head[size:]
            head.extend(bytes(size - len(head)))

    def read(self, volume: str, version: VersionRef | None = None) -> bytes:
        """The bytes of a snapshot, or of the live data."""
        with self._lock:
            if version is None:
                return bytes(self._live(volume))
            return self._snapshot(volume, version).data

    def damage(self, volume: str, version: VersionRef, offset: int, data: bytes) -> None:
        """Change a snapshot's bytes, as a failing disk does."""
        with self._lock:
            stored = self._snapshot(volume, version)
            stored.data = stored.data[:offset] + data + stored.data[offset + len(data) :]

    def bookmark(self, volume: str, version: VersionRef, name: str) -> Version:
        """Keep a snapshot's identity as a base for sending."""
        with self._lock:
            stored = self._snapshot(volume, version)
            mark = replace(stored.version, name=names.check_snapshot(name), kind=VersionKind.BOOKMARK, holds=())
            self._volumes[volume].stored.append(Stored(mark, stored.data))
            return mark

    def rename_snapshot(self, volume: str, version: VersionRef, name: str) -> None:
        """Call a snapshot something else."""
        with self._lock:
            stored = self._snapshot(volume, version)
            stored.version = replace(stored.version, name=names.check_snapshot(name))

    # -- looking things up

    def _volume(self, name: str) -> Volume:
        found = self._volumes.get(names.check_volume(name))
        if found is None or not found.visible:
            raise NoSuchVolume(f"storage {self.name} has no volume {name}", hint="`replicator status` lists volumes")
        return found

    def _live(self, name: str) -> bytearray:
        volume = self._volume(name)
        if volume.head is None:
            volume.head = bytearray(newest_data(volume))
        return volume.head

    def _find(self, volume: Volume, version: VersionRef) -> Stored | None:
        found = [s for s in volume.stored if s.version.guid == version.guid]
        return min(found, key=lambda s: s.version.kind is not version.kind, default=None)

    def _version(self, volume: str, version: VersionRef) -> Stored:
        found = self._find(self._volume(volume), version)
        if found is None:
            raise NoSuchSnapshot(
                f"volume {self.name}:{volume} has no {version.kind} {version.name} (guid {version.guid})",
                hint=f"`replicator snapshots {self.name}:{volume}` lists what there is",
            )
        return found

    def _snapshot(self, volume: str, version: VersionRef) -> Stored:
        found = self._version(volume, version)
        if found.version.kind is not VersionKind.SNAPSHOT:
            raise NoSuchSnapshot(f"of {version.name} there is only a bookmark, without data", hint="")
        return found

    # -- listings

    def info(self) -> StorageInfo:
        """See :class:`~backends.base.Backend`."""
        return StorageInfo(self.name, self.kind, self.stream, self.capabilities, 0, 0, "in memory, gone at exit")

    def lacking(self, _uses: Capability) -> tuple[Lack, ...]:
        """See :class:`~backends.base.Backend`."""
        return ()

    def volumes(self) -> tuple[VolumeInfo, ...]:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            found = [self.state(name) for name in sorted(self._volumes)]
        return tuple(VolumeInfo(state.id, state.size, state.lineage) for state in found if state is not None)

    def state(self, volume: str) -> VolumeState | None:
        """See :class:`~backends.base.Backend`."""
        names.check_volume(volume)
        with self._lock:
            found = self._volumes.get(volume)
            if found is None or not found.visible:
                return None
            versions = tuple(sorted((s.version for s in found.stored), key=lambda v: v.position))
            replica = found.lineage is not None and found.lineage.role is Role.REPLICA
            head = found.head if found.head is not None else newest_data(found)
            return VolumeState(
                VolumeId(self.name, volume),
                len(head),
                versions,
                found.lineage,
                found.partial.resume if found.partial else None,
                replica and found.head is not None and bytes(found.head) != newest_data(found),
            )

    def heads(self, volumes: Sequence[str]) -> tuple[Head, ...]:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            return tuple(head for head in map(self._head, volumes) if head is not None)

    def _head(self, name: str) -> Head | None:
        state = self.state(name)
        if state is None:
            return None
        volume = self._volumes[name]
        changed = volume.head is not None and bytes(volume.head) != newest_data(volume)
        newest = state.snapshots[-1] if state.snapshots else None
        return Head(state.id, newest, changed or newest is None, state.lineage, state.resume is not None)

    def set_lineage(self, volume: str, lineage: Lineage) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            self._volume(volume).lineage = lineage

    def promote(self, volume: str, lineage: Lineage, at: VersionRef) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            found = self._volume(volume)
            if found.lineage != lineage or found.head is None:
                found.head = bytearray(self._snapshot(volume, at).data)
            found.lineage = lineage

    def demote(self, volume: str, lineage: Lineage, at: VersionRef | None) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            found = self._volume(volume)
            if at is not None:
                if volume in self._users:
                    raise VolumeBusy(
                        f"volume {self.name}:{volume} is in use by {self._users[volume]}", hint="stop what uses it"
                    )
                if found.head is not None and bytes(found.head) != self._snapshot(volume, at).data:
                    raise VolumeChanged(
                        f"volume {self.name}:{volume} was written to since {at.name}", hint="run it again"
                    )
                found.head = None
            found.lineage = lineage

    # -- versions

    def snapshot(self, volumes: tuple[str, ...], name: str) -> tuple[Version, ...]:
        """See :class:`~backends.base.Backend`."""
        names.check_snapshot(name)
        with self._lock:
            moment = self._clock()
            for volume in volumes:
                if self._volume(volume).head is None and self._named(volume, name) is None:
                    raise NoSuchVolume(
                        f"volume {self.name}:{volume} has no live data to snapshot: it is a replica",
                        hint="take snapshots of its primary",
                    )
            return tuple(self._take(volume, name, moment) for volume in volumes)

    def snapshot_each(self, parts: Sequence[tuple[Backend, tuple[str, ...]]], name: str) -> tuple[Taken, ...]:
        """See :class:`~backends.base.Backend`. Nobody writes meanwhile."""
        with self._lock:
            return super().snapshot_each(parts, name)

    def _named(self, volume: str, name: str) -> Version | None:
        versions = (s.version for s in self._volume(volume).stored)
        return next((v for v in versions if v.name == name and v.kind is VersionKind.SNAPSHOT), None)

    def _take(self, name: str, snapshot: str, moment: datetime) -> Version:
        existing = self._named(name, snapshot)
        if existing is not None:
            return existing
        volume, data = self._volume(name), bytes(self._live(name))
        version = Version(snapshot, uuid.uuid4().hex, moment, next_position(volume), size=len(data))
        volume.stored.append(Stored(version, data))
        return version

    def destroy(self, volume: str, version: VersionRef) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            found = self._volumes.get(volume)
            stored = self._find(found, version) if found else None
            if found is None or stored is None or stored.version.kind is not version.kind:
                return
            if stored.version.holds:
                raise SnapshotHeld(
                    f"snapshot {stored.version.name} of {self.name}:{volume} is held by "
                    f"{', '.join(stored.version.holds)}",
                    hint="the job that holds it releases it once its target has a newer one",
                )
            found.stored.remove(stored)

    def hold(self, volume: str, version: VersionRef, tag: str) -> None:
        """See :class:`~backends.base.Backend`."""
        names.check_tag(tag)
        with self._lock:
            stored = self._snapshot(volume, version)
            stored.version = replace(stored.version, holds=tuple(sorted({*stored.version.holds, tag})))

    def release(self, volume: str, version: VersionRef, tag: str) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            found = self._volumes.get(volume)
            stored = self._find(found, version) if found else None
            if stored is not None:
                stored.version = replace(stored.version, holds=tuple(t for t in stored.version.holds if t != tag))

    def rename(self, volume: str, new: str) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            self._volumes[names.check_volume(new)] = self._volume(volume)
            del self._volumes[volume]

    def remove(self, volume: str) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            found = self._volumes.get(volume)
            if found is None:
                return
            if found.lineage is None or found.lineage.role is not Role.REPLICA or found.stored:
                raise not_removable(f"{self.name}:{volume}", found.lineage)
            del self._volumes[volume]

    def properties(self, _volume: str) -> tuple[Property, ...]:
        """None that matter."""
        return ()

    def clone(self, volume: str, version: VersionRef, new: str) -> VolumeInfo:
        """See :class:`~backends.base.Backend`."""
        names.check_volume(new)
        if Capability.CLONE not in self.capabilities:
            raise Unsupported(f"storage {self.name} cannot clone", hint="restore it as a copy")
        with self._lock:
            data = self._snapshot(volume, version).data
            self._check_absent(new)
            self._volumes[new] = Volume(bytearray(data))
            return VolumeInfo(VolumeId(self.name, new), len(data), None)

    def _check_absent(self, volume: str) -> None:
        found = self._volumes.get(volume)
        if found is not None and found.visible:
            raise VolumeBusy(f"volume {self.name}:{volume} exists already", hint="choose another name for the new one")

    def set_aside(self, volume: str, name: str) -> VersionRef | None:
        """See :class:`~backends.base.Backend`."""
        names.check_snapshot(name)
        with self._lock:
            state = self.state(volume)
            if state is None:
                return None
            found = self._volume(volume)
            own = found.lineage is None or found.lineage.role is Role.PRIMARY or state.head_changed
            kept = None
            if own and found.head is not None:
                kept = self._take(volume, name, self._clock()).ref
            found.head = None
            lineage = found.lineage or Lineage(str(uuid.uuid4()), Role.REPLICA, 1)
            found.lineage = replace(lineage, role=Role.REPLICA)
            return kept

    def close(self) -> None:
        """Nothing is open."""

    # -- sending

    def estimate(
        self,
        volume: str,
        base: VersionRef | None,
        to: VersionRef,
        *,
        intermediates: bool = False,  # noqa: ARG002
    ) -> int | None:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            data = self._snapshot(volume, to).data
            return sum(e.length for e in changes(self._version(volume, base).data if base else b"", data))

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        """See :class:`~replicator.endpoint.Endpoint`."""
        volume = request.volume.name
        with self._lock:
            to = self._snapshot(volume, request.to).data
            base = self._version(volume, request.base).data if request.base else b""
        start = 0
        if request.resume is not None:
            check_resume(request.resume, request.base, request.to)
            start = request.resume.offset
        found = within(request.ranges, to) if request.ranges is not None else after(start, changes(base, to))
        extents = list(found)
        key = bytes.fromhex(request.key)
        estimate = sum(extent.length for extent in extents)
        return ChunkStream(StreamKind.BLOCKS, self._chunks(to, extents, key, cancel), estimate=estimate)

    def _chunks(self, data: bytes, found: list[Extent], key: bytes, cancel: Cancellation) -> Iterator[BlockChunk]:
        for extents in packed(found, self._chunk_size):
            cancel.check()
            pieces = [data[e.offset : e.end] for e in extents if not e.zero]
            digests = b"".join(self._checksums.digest_blocks(piece, key) for piece in pieces)
            yield BlockChunk(extents, b"".join(pieces), digests)

    def digests(self, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
        """See :class:`~replicator.endpoint.Endpoint`."""
        with self._lock:
            data = self._snapshot(request.volume.name, request.version).data
        end = len(data) if request.length is None else min(len(data), request.offset + request.length)
        key, size = bytes.fromhex(request.key), request.block_size
        step = size * _DIGEST_BATCH
        for offset in range(request.offset, end, step):
            cancel.check()
            piece = data[offset : min(end, offset + step)]
            yield DigestBatch(offset, size, self._checksums.digest_blocks(piece, key, block_size=size))

    # -- receiving

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        """See :class:`~replicator.endpoint.Endpoint`."""
        volume = names.check_volume(request.volume.name)
        names.check_snapshot(request.to.name)
        with self._writing(volume):
            with self._lock:
                existing = self._already(request)
                if existing is not None:
                    return existing
                partial = self._begin(request)
            checker = ChunkChecker(
                f"{self.name}:{volume}@{request.to.name}",
                size=len(partial.data),
                start=partial.offset,
                key=bytes.fromhex(request.key),
                checksums=self._checksums,
            )
            for chunk in stream:
                cancel.check()
                for extent, data in checker.check(chunk):
                    partial.data[extent.offset : extent.end] = bytes(extent.length) if extent.zero else data
                    partial.offset = extent.end
                chunk.release()
            cancel.check()
            with self._lock:
                return self._commit(request, partial)

    @contextmanager
    def _writing(self, volume: str) -> Iterator[None]:
        with self._lock:
            if volume in self._receiving:
                raise VolumeBusy(f"volume {self.name}:{volume} is being received already", hint="wait until it is done")
            self._receiving.add(volume)
        try:
            yield
        finally:
            with self._lock:
                self._receiving.discard(volume)

    def _already(self, request: ReceiveRequest) -> Version | None:
        """Check that the volume may take this. The version, if it is there (a confirmation was lost)."""
        name = request.volume.name
        volume = self._volumes.get(name)
        if request.mode is ReceiveMode.RESTORE:
            self._check_absent(name)
            return None
        if request.lineage is None:
            raise NotAReplica(f"no lineage is given for the replica {request.volume}", hint="")
        if volume is None or not volume.visible:
            return None
        check_may_receive(request.volume, self.state(name), request.lineage)
        volume.lineage = replace(request.lineage, role=Role.REPLICA)
        stored = self._find(volume, replace(request.to.ref, kind=VersionKind.SNAPSHOT))
        if stored is None or stored.version.kind is not VersionKind.SNAPSHOT or request.mode is ReceiveMode.REBUILD:
            return None
        if request.hold:
            self.hold(name, stored.version.ref, request.hold)
        if volume.partial is not None and volume.partial.request.to.guid == request.to.guid:
            volume.partial = None
        return stored.version

    def _begin(self, request: ReceiveRequest) -> Partial:
        """The partial state to continue, or a fresh one made from the base."""
        name = request.volume.name
        base = b""
        if request.base is not None:
            if self.state(name) is None:
                raise NoSuchSnapshot(
                    f"{request.volume} is not there, and so not its {request.base.name}", hint="plan again"
                )
            base = self._snapshot(name, request.base).data
        existing = self._named(name, request.to.name) if self.state(name) is not None else None
        if existing is not None and existing.guid != request.to.guid:
            raise SnapshotExists(
                f"{request.volume} has another snapshot named {request.to.name}",
                hint="plan again: it is then received under another name",
            )
        volume = self._volumes.setdefault(name, Volume())
        if request.resume is not None:
            found = volume.partial.resume if volume.partial else None
            if volume.partial is None or found is None or not continues(request.resume, found):
                raise StaleResume(
                    f"{request.volume} has no partial state of {request.to.name} that ends at {request.resume.offset}",
                    hint="plan again",
                )
            check_resume(request.resume, request.base, request.to.ref)
            volume.partial.offset = request.resume.offset
            return volume.partial
        if request.mode is not ReceiveMode.RESTORE and request.lineage is not None:
            volume.lineage = replace(request.lineage, role=Role.REPLICA)
        size = request.to.size or 0
        volume.partial = Partial(request, bytearray(base[:size]) + bytes(size - min(size, len(base))), 0)
        return volume.partial

    def _commit(self, request: ReceiveRequest, partial: Partial) -> Version:
        volume = self._volumes[request.volume.name]
        volume.partial = None
        data = bytes(partial.data)
        if request.mode is ReceiveMode.RESTORE:
            volume.head = bytearray(data)
            return request.to
        if request.lineage is not None:
            volume.lineage = replace(request.lineage, role=Role.REPLICA)
        if volume.head is not None and bytes(volume.head) == newest_data(volume):
            volume.head = None  # of a primary that stepped down: nothing that its newest snapshot has not
        holds = (request.hold,) if request.hold else ()
        new = replace(request.to, size=len(data), holds=holds, kind=VersionKind.SNAPSHOT)
        old = self._find(volume, new.ref)
        if old is not None:
            new = self._replace(volume, old, replace(new, position=old.version.position), request.aside)
        else:
            new = replace(new, position=next_position(volume))
        volume.stored.append(Stored(new, data))
        return new

    @staticmethod
    def _replace(volume: Volume, old: Stored, new: Version, aside: str) -> Version:
        """Keep a replaced snapshot just before its successor, as a version of its own; holds are the successor's."""
        taken = {s.version.position for s in volume.stored}
        before = next(p for p in range(old.version.position - 1, -2, -1) if p not in taken)
        holds = tuple(sorted({*old.version.holds, *new.holds}))
        old.version = replace(old.version, name=aside, guid=uuid.uuid4().hex, position=before, holds=())
        return replace(new, holds=holds)

    def abort_receive(self, volume: str) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._lock:
            found = self._volumes.get(volume)
            if found is not None:
                found.partial = None
                if not found.visible:
                    del self._volumes[volume]
