"""The ZFS backend: what a storage of kind ``zfs`` answers."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

from backends.base import Backend, OneByOne, not_removable
from backends.zfs import (
    aside,
    clones,
    cursors,
    destroying,
    many,
    placeholders,
    privileges,
    properties,
    reading,
    renaming,
    replica,
    roles,
    scrubbing,
    sending,
    snapshotting,
    taking_over,
)
from backends.zfs.binding import LibraryChoice, installed
from backends.zfs.commands import LIST_DEADLINE, Runner, SystemRunner
from backends.zfs.context import Context
from backends.zfs.failures import Operation, failure
from backends.zfs.listing import Dataset, Listing
from backends.zfs.naming import DatasetNames
from backends.zfs.pool_state import PoolState
from backends.zfs.taking_over import Terms
from backends.zfs.workers import Workers
from replicator import names
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
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
from replicator.errors import (
    NotReadable,
    ReplicatorError,
    SnapshotHeld,
    StorageUnavailable,
    Unsupported,
    VolumeBusy,
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
from replicator.streams import Stream

CAPABILITIES = (
    Capability.SEND
    | Capability.RECEIVE
    | Capability.BOOKMARKS
    | Capability.NATIVE_INTERMEDIATES
    | Capability.ATOMIC_GROUP
    | Capability.ATOMIC_SNAPSHOT
    | Capability.CLONE
    | Capability.RENAME
    | Capability.ORIGINS
    | Capability.PROPERTIES
    | Capability.DIGESTS
)
INFO_AGE = 5.0
"""Seconds for which ``info`` may repeat itself: each plan asks for it."""
WARNINGS_AGE = 60.0
"""Seconds for which it may repeat what it found wrong with datasets."""
_MAX_WARNINGS = 20


class ZfsBackend(OneByOne):
    """The datasets and zvols below one dataset; see :mod:`backends.zfs`. Thread-safe.

    :param root: the dataset that holds the volumes; it must exist, and its pool may come and go
    :param terms: on which terms replicas are taken
    :param checksums: for digests
    :param runner: what runs zfs and zpool; tests give one that answers from a record
    :param choice: of what changes snapshots, holds and bookmarks; libzfs_core where it can be used, if none is given
    """

    kind = "zfs"
    stream = StreamKind.NATIVE
    capabilities = CAPABILITIES

    def __init__(
        self,
        name: str,
        root: str,
        *,
        terms: Terms | None = None,
        checksums: Checksums,
        runner: Runner | None = None,
        choice: LibraryChoice | None = None,
        info_age: float = INFO_AGE,
        warnings_age: float = WARNINGS_AGE,
    ) -> None:
        self.name = names.check_word("storage name", name)
        dataset_names = DatasetNames(name, root)
        pool = PoolState(dataset_names.pool)
        runner = runner or SystemRunner(pool.check)
        self._choice = choice or LibraryChoice(name, root, runner, Workers(pool), installed)
        self._context = Context(dataset_names, runner, Listing(dataset_names, runner), self._choice.library)
        self._terms = terms or Terms()
        self._checksums = checksums
        self._not_taken_over: dict[str, tuple[str, ...]] = {}
        self._info_age = info_age
        self._info_lock = threading.Lock()
        self._info: tuple[float, StorageInfo] | None = None
        self._warnings_age = warnings_age
        self._problems: tuple[float, tuple[str, ...]] | None = None

    # -- the storage

    def info(self) -> StorageInfo:
        """See :class:`~backends.base.Backend`."""
        with self._info_lock:
            now = time.monotonic()
            if self._info is None or now - self._info[0] >= self._info_age:
                self._info = (now, self._look())
            return self._info[1]

    def _look(self) -> StorageInfo:
        context = self._context
        root, pool = context.names.root, context.names.pool
        done = context.attempt("zfs", "list", "-H", "-p", "-o", "used,available", root, deadline=LIST_DEADLINE)
        if done.status != 0:
            context.require_root()
            raise failure(done, Operation(self.name, root, "looking at"))
        used, _, free = done.output.strip().partition("\t")
        health, version = self._health(pool)
        warnings = []
        if health != "ONLINE":
            warnings.append(f"pool {pool} is {health}: see `zpool status {pool}`")
        if unused := context.library.warning():
            warnings.append(unused)
        warnings += self._found_problems()
        warnings += [told for volume in sorted(self._not_taken_over) for told in self._not_taken_over[volume]]
        if len(warnings) > _MAX_WARNINGS:
            warnings[_MAX_WARNINGS:] = [f"and {len(warnings) - _MAX_WARNINGS} more warnings"]
        return StorageInfo(
            self.name,
            self.kind,
            self.stream,
            self.capabilities,
            int(used) + int(free),
            int(free),
            f"{version}, dataset {root}, through {context.library.describe()}",
            tuple(warnings),
        )

    def _found_problems(self) -> tuple[str, ...]:
        """What is wrong with datasets. It takes listing them all, so it is used again for a while."""
        now = time.monotonic()
        if self._problems is None or now - self._problems[0] >= self._warnings_age:
            self._problems = (now, tuple(self._context.listing.all()[1]))
        return self._problems[1]

    def _health(self, pool: str) -> tuple[str, str]:
        """The pool's state and what OpenZFS this is."""
        context = self._context
        listed = context.change(
            "zpool", "list", "-H", "-p", "-o", "health", pool, dataset=pool, doing="looking at", deadline=LIST_DEADLINE
        )
        version = context.attempt("zfs", "version", deadline=LIST_DEADLINE)
        lines = version.output.split("\n")
        said = lines[-1] if version.status == 0 and lines[-1] else lines[0]
        kernel = next((line for line in lines if line.startswith("zfs-kmod-")), said)
        return listed.output.strip(), f"OpenZFS {kernel.removeprefix('zfs-kmod-').removeprefix('zfs-')}"

    def lacking(self, uses: Capability) -> tuple[Lack, ...]:
        """See :class:`~backends.base.Backend`."""
        self._context.require_root()
        lacking = list(privileges.lacking(self._context, uses, self._terms))
        if unused := self._choice.probe():
            lacking.append(Lack(unused, "apt install --reinstall python3-pyzfs python3-cffi", needed=False))
        return tuple(lacking)

    # -- listings

    def volumes(self) -> tuple[VolumeInfo, ...]:
        """See :class:`~backends.base.Backend`."""
        found, _ = self._context.listing.all()
        return tuple(
            VolumeInfo(
                VolumeId(self.name, volume), dataset.volsize, dataset.lineage, many.origin_of(self._context, dataset)
            )
            for volume, dataset in found
            if not (aside.is_passage(volume) or placeholders.is_arrival(volume) or clones.is_temporary(volume))
        )

    def state(self, volume: str) -> VolumeState | None:
        """See :class:`~backends.base.Backend`."""
        return many.state_of(self._context, volume, aside.look(self._context, volume))

    def brief(self, volume: str) -> VolumeInfo | None:
        """See :class:`~backends.base.Backend`."""
        dataset = self._context.glance(volume, ())
        if dataset is not None and dataset.is_placeholder:  # what it stands for may be arriving
            dataset = aside.look(self._context, volume)
        if dataset is None or dataset.is_placeholder:
            return None
        origin = many.origin_of(self._context, dataset)
        return VolumeInfo(VolumeId(self.name, volume), dataset.volsize, dataset.lineage, origin)

    def states(self, volumes: Sequence[str]) -> tuple[VolumeListing, ...]:
        """See :class:`~backends.base.Backend`."""
        try:
            found = many.states(self._context, volumes)
        except StorageUnavailable as error:
            return tuple(VolumeListing(VolumeId(self.name, volume), None, error) for volume in volumes)
        except ReplicatorError:  # of one of them: it must not keep us from the others
            found = {}
        alone = {listing.volume.name: listing for listing in super().states([v for v in volumes if v not in found])}
        return tuple(
            alone.get(volume) or VolumeListing(VolumeId(self.name, volume), found[volume]) for volume in volumes
        )

    def heads(self, volumes: Sequence[str]) -> tuple[Head, ...]:
        """See :class:`~backends.base.Backend`."""
        return many.heads(self._context, volumes)

    def set_lineage(self, volume: str, lineage: Lineage) -> None:
        """See :class:`~backends.base.Backend`. The form of its streams is pinned with it."""
        dataset = self._context.require(volume)
        replica_too = aside.REPLICA_PROPERTIES if lineage.role is Role.REPLICA else ()
        roles.mark(self._context, dataset, lineage, doing="marking", first=replica_too)

    def promote(self, volume: str, lineage: Lineage, at: VersionRef) -> None:
        """See :class:`~backends.base.Backend`. It stays unmounted: that is for whoever uses it."""
        roles.promote(self._context, volume, lineage, at)

    def demote(self, volume: str, lineage: Lineage, at: VersionRef | None) -> None:
        """See :class:`~backends.base.Backend`."""
        roles.demote(self._context, volume, lineage, at)

    # -- versions

    def snapshot(self, volumes: tuple[str, ...], name: str) -> tuple[Version, ...]:
        """See :class:`~backends.base.Backend`. All that can be, in one transaction."""
        return tuple(taken.get() for taken in snapshotting.take_each([(self._context, volumes)], name))

    @property
    def pool(self) -> str:
        """See :class:`~backends.base.Backend`."""
        return f"zfs {self._context.names.pool}"

    def snapshot_each(self, parts: Sequence[tuple[Backend, tuple[str, ...]]], name: str) -> tuple[Taken, ...]:
        """See :class:`~backends.base.Backend`. One transaction for all storages of the pool."""
        contexts = [(part._context, volumes) for part, volumes in parts if isinstance(part, ZfsBackend)]
        return snapshotting.take_each(contexts, name)

    def destroy(self, volume: str, version: VersionRef) -> None:
        """See :class:`~backends.base.Backend`."""
        found = self._find(volume, version, version.kind)
        if found is None:
            return
        dataset, there = found
        name = self._context.full_name(dataset.name, there)
        error = self._context.library.destroy([name]).get(name)
        if error is None:
            return
        perhaps_held = isinstance(error, (VolumeBusy, SnapshotHeld)) and there.kind is VersionKind.SNAPSHOT
        held = self._context.look(volume) if perhaps_held else None
        tags = held.find(there.guid) if held is not None else None
        if tags is not None and tags.holds:
            raise destroying.held(self._context.names.label(volume), tags)
        raise error

    def destroy_all(self, volume: str, versions: Sequence[VersionRef]) -> dict[VersionRef, ReplicatorError]:
        """See :class:`~backends.base.Backend`."""
        dataset = self._context.glance(volume, versions, holds=True)
        return destroying.destroy_all(self._context, volume, dataset, versions) if dataset is not None else {}

    def _find(self, volume: str, ref: VersionRef, kind: VersionKind) -> tuple[Dataset, Version] | None:
        dataset = self._context.glance(volume, (ref,))
        found = dataset.find(ref.guid, kind) if dataset is not None else None
        return (dataset, found) if dataset is not None and found is not None else None

    def hold(self, volume: str, version: VersionRef, tag: str) -> None:
        """See :class:`~backends.base.Backend`."""
        names.check_tag(tag)
        dataset = self._context.glance(volume, (version,))
        found = dataset.find(version.guid) if dataset is not None else None
        if dataset is None or found is None:
            raise self._context.no_such(volume, version)
        replica.hold(self._context, dataset.name, found, tag)
        if dataset.lineage is not None and dataset.lineage.role is Role.PRIMARY:
            cursors.make(self._context, dataset, found, tag)

    def release(self, volume: str, version: VersionRef, tag: str) -> None:
        """See :class:`~backends.base.Backend`."""
        names.check_tag(tag)
        dataset = self._context.glance(volume, (version,))
        if dataset is None:
            return
        cursors.remove(self._context, dataset, version.guid, tag)
        found = dataset.find(version.guid)
        if found is None:
            return
        self._context.library.release(self._context.full_name(dataset.name, found), tag)

    # -- data

    def estimate(
        self, volume: str, base: VersionRef | None, to: VersionRef, *, intermediates: bool = False
    ) -> int | None:
        """See :class:`~backends.base.Backend`."""
        return sending.estimate(self._context, volume, base, to, intermediates=intermediates)

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        """See :class:`~backends.base.Backend`."""
        return sending.open_stream(self._context, request, cancel)

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        """See :class:`~backends.base.Backend`."""
        version, told = replica.receive(self._context, request, stream, cancel, self._terms)
        if told:
            self._not_taken_over[request.volume.name] = told
        else:
            self._not_taken_over.pop(request.volume.name, None)
        return version

    def abort_receive(self, volume: str) -> None:
        """See :class:`~backends.base.Backend`."""
        found = aside.look(self._context, volume)
        if found is not None:
            replica.abort(self._context, found)

    def digests(self, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
        """See :class:`~backends.base.Backend`. Of a zvol."""
        return reading.digests(self._context, request, self._checksums, cancel)

    def is_sealed(self, volume: str) -> bool:
        """See :class:`~backends.base.Backend`. By the form of its streams."""
        dataset = self._context.require(volume)
        return dataset.encrypted and dataset.default_form is properties.StreamForm.RAW

    def manifest(self, request: ManifestRequest, cancel: Cancellation) -> Stream:
        """See :class:`~backends.base.Inspectable`. Of a filesystem."""
        return reading.open_manifest(self._context, request, self._checksums, cancel)

    def scrub(self, request: ScrubRequest) -> Scrub:
        """See :class:`~backends.base.Inspectable`."""
        return scrubbing.look(self._context, request)

    def set_aside(self, volume: str, name: str) -> VersionRef | None:
        """See :class:`~backends.base.Backend`. The snapshot stays where it is until the next receive, which puts the
        replica back to its base and keeps what is newer as a dataset of its own."""
        context = self._context
        snapshot = context.names.snapshot(volume, name)
        dataset = aside.look(context, volume)
        if dataset is None or dataset.is_placeholder:
            return None
        lineage = dataset.lineage
        own = lineage is None or lineage.role is Role.PRIMARY or dataset.head_changed
        kept = None
        if own and (dataset.written > 0 or not dataset.snapshots):
            context.library.snapshot([snapshot])
            kept = snapshotting.named(context, [snapshot])[snapshot].ref
        if lineage is not None and lineage.role is Role.PRIMARY:
            self.set_lineage(volume, Lineage(lineage.uuid, Role.REPLICA, lineage.epoch))
        return kept

    def rename(self, volume: str, new: str) -> None:
        """See :class:`~backends.base.Backend`."""
        renaming.rename(self._context, volume, new)

    def remove(self, volume: str) -> None:
        """See :class:`~backends.base.Backend`. Without ``-r``: ZFS refuses where there is anything below it."""
        found = aside.look(self._context, volume)
        if found is None or found.is_placeholder:
            return
        if found.snapshots or found.lineage is None or found.lineage.role is not Role.REPLICA:
            raise not_removable(self._context.names.label(volume), found.lineage)
        replica.abort(self._context, found)
        self._context.change_if_there("zfs", "destroy", found.name, dataset=found.name, doing="removing the replica")

    def properties(self, volume: str) -> tuple[Property, ...]:
        """See :class:`~backends.base.Backend`."""
        return taking_over.offered(self._context, self._context.names.dataset(volume))

    def clone(self, volume: str, version: VersionRef, new: str) -> VolumeInfo:
        """See :class:`~backends.base.Backend`. A filesystem is not mounted by that."""
        context = self._context
        target = context.names.dataset(new)
        dataset = context.require(volume)
        source = context.snapshot(volume, dataset, version)
        if context.look(new) is not None:
            raise VolumeBusy(f"volume {self.name}:{new} exists already", hint="choose another name for the new one")
        placeholders.make_parents(context, target)
        settings = () if dataset.is_zvol else aside.FILESYSTEM_PROPERTIES
        name = context.full_name(dataset.name, source)
        try:
            reading.check_usable(context, name)
        except NotReadable as error:
            raise Unsupported(str(error), hint="it is sent instead") from error
        context.change("zfs", "clone", *aside.options(settings), name, target, dataset=name, doing="cloning")
        return VolumeInfo(VolumeId(self.name, new), source.size, None)

    def close(self) -> None:
        """See :class:`~backends.base.Backend`."""
        self._choice.close()
