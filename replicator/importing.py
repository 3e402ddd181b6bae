"""Reads a diff of ``rbd export-diff`` into a volume.

What is imported is a replica: it is received as what comes from another node is, in the same steps, and nobody but who
replicates into it may write to it. With its identity (:mod:`replicator.diff_identity`) it is the replica of the volume
that the diff was exported from, and a job continues from it. Without, it is of a lineage that only imports have.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.diff_format import DiffHeader, DiffReader, Read
from replicator.diff_identity import DiffIdentity, VerifiedReader
from replicator.diff_streams import chunks_of
from replicator.endpoint import ReceiveRequest
from replicator.errors import BadDiff, ConflictError, NoSuchSnapshot, NotAReplica, SnapshotExists, Unsupported
from replicator.exporting import Way
from replicator.local import LocalEndpoint
from replicator.model import Lineage, Role, StreamKind, Version, VolumeId, VolumeState
from replicator.names import check_snapshot
from replicator.planning import SendPolicy
from replicator.replication import Limits, Meter, ObservedStream, Observer, Options, Outcome, new_key
from replicator.roles import check_may_receive
from replicator.streams import ChunkStream
from replicator.watchdog import Watchdog

_IMPORTED = b"import"
"""Begins the lineages of volumes that were made by an import without identity."""


def imported_lineage() -> Lineage:
    """A new lineage that shows where it came from: a UUID of version 8 (RFC 9562, 5.8) that begins with ``import``."""
    random = uuid.uuid4().bytes
    version = bytes([random[6] & 0x0F | 0x80])
    return Lineage(str(uuid.UUID(bytes=_IMPORTED + version + random[7:])), Role.REPLICA, 1)


def is_imported(lineage: Lineage) -> bool:
    """Whether it is one of those."""
    found = uuid.UUID(lineage.uuid)
    return found.bytes.startswith(_IMPORTED) and found.version == 8


@dataclass(frozen=True, slots=True)
class Imported:
    """A snapshot that is there now.

    :ivar size: bytes of the volume
    :ivar changed: bytes of changes that were written or zeroed; 0 where it was there already
    :ivar continues: a job goes on from it (it came with its identity)
    """

    volume: str
    base: str | None
    snapshot: str
    size: int
    changed: int
    continues: bool
    there_already: bool = False


class Import:
    """One import. Whether the volume is what the diff applies to is found out when this is made.

    Cut off at any moment, it leaves no snapshot, and the same import may be begun anew.

    :param read: gives the diff
    :param clock: the time now, with a time zone: when a snapshot without identity was taken
    :raises BadDiff: it is none, or is not what the identity says
    :raises NoSuchSnapshot: the volume has not what the diff is from
    :raises ConflictError: the volume has changed since, or has snapshots that the diff does not know of
    :raises NotAReplica, StaleEpoch: the volume may not be written into
    :raises SnapshotExists: the volume has another snapshot of that name
    """

    def __init__(
        self,
        endpoint: LocalEndpoint,
        volume: VolumeId,
        read: Read,
        identity: DiffIdentity | None = None,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if endpoint.storage(volume.storage).stream is not StreamKind.BLOCKS:
            raise Unsupported(
                f"storage {volume.storage} takes streams of its own, which are no diffs",
                hint="import into a storage of kind image or rbd",
            )
        self._endpoint = endpoint
        self._volume = volume
        self._identified = identity is not None
        self._reader = DiffReader(VerifiedReader(read, identity).read if identity is not None else read)
        header = self._reader.header
        if identity is not None and identity.header != header:
            raise BadDiff(
                f"the identity is of {_told(identity.header)}, and the diff is {_told(header)}",
                hint="give the identity that was written with the diff",
            )
        guid, created = (uuid.uuid4().hex, clock()) if identity is None else (identity.guid, identity.created)
        self._to = Version(check_snapshot(header.to), guid, created, 0, size=header.size)
        state = endpoint.state(volume)
        self._done = state.by_guid(guid) if state is not None else None
        if self._done is None:
            self._lineage = _lineage(volume, state, identity)
            self._base = _base(volume, state, header, identity)
            _check_name(state, self._to)

    def run(self, checksums: Checksums, *, observer: Observer, cancel: Cancellation) -> Imported:
        """Make it a snapshot.

        :raises BadDiff: it is cut short, garbled, or damaged; nothing of it is kept
        """
        header = self._reader.header
        done = Imported(str(self._volume), header.base, header.to, header.size, 0, self._identified)
        if self._done is not None:
            return replace(done, snapshot=self._done.name, there_already=True)
        try:
            return replace(done, changed=self._receive(checksums, observer, cancel))
        except BadDiff:
            self._endpoint.abort_receive(self._volume)
            raise

    def _receive(self, checksums: Checksums, observer: Observer, cancel: Cancellation) -> int:
        """Bytes of changes."""
        outcome = Outcome()
        key = new_key()
        way = Way(self._volume, f"{self._endpoint.node}:{self._volume.storage}")
        # Whoever writes into a pipe has his own patience: see `byte_channels`.
        options = Options(SendPolicy(), limits=replace(Limits(), stall=2 * Limits().prepare))
        base = self._base.ref if self._base is not None else None
        request = ReceiveRequest(self._volume, self._lineage, base, self._to, key)
        with cancel.child() as part:
            watchdog = Watchdog(part)
            meter = Meter(way, f"importing {self._to.name}", total=None, observer=observer, outcome=outcome)
            stream = ChunkStream(StreamKind.BLOCKS, chunks_of(self._reader, bytes.fromhex(key), checksums))
            with (
                watchdog.watching("the storage prepared itself", options.limits.prepare),
                ObservedStream(stream, meter, watchdog, options, part) as chunks,
            ):
                self._endpoint.receive(request, chunks, part)
            meter.finish()
        return outcome.done


def _told(header: DiffHeader) -> str:
    since = f" since {header.base}" if header.base is not None else ""
    return f"{header.to}{since} ({header.size} bytes)"


def _lineage(volume: VolumeId, state: VolumeState | None, identity: DiffIdentity | None) -> Lineage:
    """The lineage that the volume is of, or is to be of."""
    if identity is not None:
        check_may_receive(volume, state, identity.lineage, identity.guid)
        return identity.lineage
    if state is None:
        return imported_lineage()
    mine = state.lineage
    if mine is None:
        raise NotAReplica(
            f"volume {volume} exists and was not made by an import",
            hint="import into a new volume: a diff from nothing first, then those from it on",
        )
    if mine.role is not Role.REPLICA:
        raise NotAReplica(
            f"volume {volume} is a primary (epoch {mine.epoch}): it is written to, and sent from",
            hint="import into a new volume",
        )
    if not is_imported(mine):
        raise NotAReplica(
            f"volume {volume} is a replica of lineage {mine.uuid}, and the diff does not say what it is of",
            hint="give the identity that `replicator export` wrote with the diff (--identity FILE), or import into a "
            "new volume",
        )
    return mine


def _base(
    volume: VolumeId, state: VolumeState | None, header: DiffHeader, identity: DiffIdentity | None
) -> Version | None:
    """What the diff applies to; it must be all that there is. Never only by its name where more is known."""
    live = [v for v in state.snapshots if not v.is_diverged] if state is not None else []
    newest = max(live, key=lambda v: v.position, default=None)
    if state is not None and state.head_changed:
        raise ConflictError(
            f"{volume} was written to since {newest.name if newest is not None else 'it was made'}",
            hint="what was written would be lost: import into a new volume",
            kind="diverged",
        )
    if header.base is None:
        if newest is not None:
            raise ConflictError(
                f"the diff is from nothing, and {volume} has snapshots already ({newest.name} is the newest)",
                hint=f"export with --from {newest.name}, or import into a new volume",
                kind="no_common_base",
            )
        return None
    guid = identity.base_guid if identity is not None else None
    base = next((v for v in live if (v.guid == guid if guid is not None else v.name == header.base)), None)
    if base is None:
        which = f"{header.base} (guid {guid})" if guid is not None else header.base
        what = f"{volume} has no snapshot {which}" if state is not None else f"there is no volume {volume}"
        raise NoSuchSnapshot(
            f"the diff is from snapshot {header.base}, and {what}", hint="import first what the diff is from"
        )
    if newest is not None and base != newest:
        raise ConflictError(
            f"the diff is from {base.name}, and {volume} has the newer snapshot {newest.name}",
            hint=f"export with --from {newest.name}, or import into a new volume",
            kind="diverged",
        )
    return base


def _check_name(state: VolumeState | None, to: Version) -> None:
    for other in state.versions if state is not None else ():
        if other.name == to.name:
            raise SnapshotExists(
                f"{state.id if state is not None else ''} has a snapshot {to.name} already (guid {other.guid})",
                hint="if it came from the same diff there is nothing to do; else rename or destroy it",
            )
