"""Writes a snapshot, or the difference between two, as a diff of ``rbd export-diff``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from replicator.cancellation import Cancellation
from replicator.config import Config
from replicator.diff_format import DiffHeader, Piece, encode
from replicator.diff_identity import DiffIdentity, Digester
from replicator.errors import NoSuchSnapshot, NoSuchVolume, Unsupported, UsageError
from replicator.export_holds import ExportHolds
from replicator.local import LocalEndpoint
from replicator.model import (
    StreamKind,
    Version,
    VersionKind,
    VolumeId,
    VolumeInfo,
    VolumeState,
    hold_tag,
    replica_volume,
)
from replicator.replication import Limits, Meter, Observer, Outcome
from replicator.selection import select
from replicator.setting_types import Target
from replicator.streams import Buffer
from replicator.watchdog import Watchdog

Write = Callable[[Buffer], None]


@dataclass(frozen=True, slots=True)
class Way:
    """What is moved, and where to, as progress shows it."""

    source_volume: VolumeId
    target_text: str


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    :ivar base: name of the snapshot that it is from; None: from nothing
    :ivar size: bytes of the volume at that snapshot
    :ivar length: bytes of the diff
    """

    volume: str
    base: str | None
    snapshot: str
    size: int
    length: int


@dataclass(frozen=True, slots=True)
class Seed:
    """A replica that is to begin with what is exported.

    :ivar tag: the hold of its job and target: the snapshot is kept until the target has it
    """

    node: str
    replica: VolumeId
    tag: str


class Export:
    """One export: its snapshots are found when this is made.

    :param base, to: names or identities of snapshots; None: from nothing
    :raises NoSuchVolume, NoSuchSnapshot:
    :raises UsageError: ``base`` is not the older one
    """

    def __init__(self, endpoint: LocalEndpoint, volume: VolumeId, base: str | None, to: str) -> None:
        self._endpoint = endpoint
        state = endpoint.state(volume)
        if state is None:
            raise NoSuchVolume(f"node {endpoint.node} has no volume {volume}", hint="correct the name")
        self.volume = volume
        self.to = _find(state, to)
        self.base = _find(state, base) if base is not None else None
        if self.base is not None and self.base.position >= self.to.position:
            raise UsageError(
                f"{self.base.name} is not older than {self.to.name}",
                hint=f"`replicator snapshots {volume}` lists them, oldest first",
            )
        if self.to.size is None or endpoint.storage(volume.storage).stream is not StreamKind.BLOCKS:
            raise Unsupported(
                f"{volume} is in a storage of streams of its own, which are no diffs",
                hint="of ZFS, `zfs send` writes its snapshots into a file, and `zfs receive` reads it",
            )
        self.header = DiffHeader(self.base.name if self.base is not None else None, self.to.name, self.to.size)

    def run(
        self, write: Write, flush: Callable[[], None], holds: ExportHolds, *, observer: Observer, cancel: Cancellation
    ) -> Digester:
        """Write all of it; the digests of what was written. What it reads is held meanwhile."""
        digester = Digester()
        versions = [v.ref for v in (self.base, self.to) if v is not None]
        base = self.base.ref if self.base is not None else None
        with holds.held(self.volume, versions), cancel.child() as part:
            total = self._endpoint.estimate(self.volume, base, self.to.ref)
            way = Way(self.volume, "diff")
            meter = Meter(way, f"exporting {self.to.name}", total=total, observer=observer, outcome=Outcome())
            watchdog = Watchdog(part)
            with (
                watchdog.watching("the difference was looked for", Limits().prepare),
                self._endpoint.diff(self.volume, base, self.to.ref, part) as pieces,
            ):
                for data in encode(self.header, _counted(pieces, meter, part)):
                    part.check()
                    # Whoever reads a pipe has his own patience: see `byte_channels`.
                    watchdog.phase("the diff was written", 2 * Limits().prepare)
                    write(data)
                    digester.add(data)
                    watchdog.phase("the source was read", Limits().prepare)
                flush()
            meter.finish()
        return digester

    def identity(self, digester: Digester) -> DiffIdentity:
        """What goes with the diff. A volume that was never replicated gets its lineage now, as the first run of a job
        would give it."""
        state = self._endpoint.state(self.volume)
        lineage = state.lineage if state is not None else None
        return DiffIdentity(
            lineage or self._endpoint.ensure_primary(self.volume),
            self.header,
            self.base.guid if self.base is not None else None,
            self.to.guid,
            self.to.created,
            digester.length,
            digester.finish(),
        )

    def result(self, digester: Digester) -> Exported:
        """What was written."""
        header = self.header
        return Exported(str(self.volume), header.base, header.to, header.size, digester.length)

    @contextmanager
    def kept_for(self, seed: Seed) -> Iterator[None]:
        """Keep the snapshot until the seed's target has it; not where the block fails."""
        held = seed.tag in self.to.holds
        self._endpoint.hold(self.volume, self.to.ref, seed.tag)
        try:
            yield
        except BaseException:
            if not held:
                self._endpoint.release(self.volume, self.to.ref, seed.tag)
            raise


def _find(state: VolumeState, name: str) -> Version:
    found = state.find(name)
    if found is None or found.kind is not VersionKind.SNAPSHOT:
        raise NoSuchSnapshot(
            f"{state.id} has no snapshot {name}", hint=f"`replicator snapshots {state.id}` lists what there is"
        )
    return found


def _counted(pieces: Iterator[Piece], meter: Meter, cancel: Cancellation) -> Iterator[Piece]:
    for piece in pieces:
        cancel.check()
        yield piece
        meter.add(piece.record.length if piece.record.zero else len(piece.data), 0)


def seed_for(config: Config, volume: VolumeInfo, target: str) -> Seed:
    """The replica that a job is to have of a volume on a target.

    :raises UsageError: no job, or more than one, replicates it there
    """
    wanted = Target.parse(target, config.node.name)
    found = [
        Seed(
            wanted.node,
            replica_volume(config.node.name, volume.id, wanted.storage, same_path=job.replica_path == "same"),
            hold_tag(job.name, wanted.node, wanted.storage),
        )
        for job in config.jobs.values()
        if config.is_local(job.source.node) and wanted in job.targets and select(job.source.volumes, (volume,))
    ]
    if len(found) != 1:
        raise UsageError(
            f"{len(found) or 'no'} jobs replicate {volume.id} to {wanted}",
            hint="--for names a target of the one job that is to go on from what is exported",
        )
    return found[0]
