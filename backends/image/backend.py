"""The image backend: what a storage of kind ``image`` answers."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from backends.base import OneByOne, not_removable
from backends.image import probe, replica, roles, snapshotting, source
from backends.image.catalog import Catalog
from backends.image.context import Context
from backends.image.durable import Files
from backends.image.layout import Layout
from backends.image.partial import Partial
from replicator import names
from replicator.cancellation import Cancellation
from replicator.checksums import Checksums
from replicator.endpoint import DigestBatch, DigestRequest, ReceiveRequest, SendRequest
from replicator.errors import NoSuchVolume, ReplicatorError, Unsupported, VolumeBusy
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

_NO_DEVICES: Mapping[str, Path] = MappingProxyType({})
DEFAULT_WORKERS = 4
_MAX_WARNINGS = 20
WARNINGS_AGE = 60.0
"""Seconds."""


def _utc_now() -> datetime:
    return datetime.now(UTC)


class ImageBackend(OneByOne):
    """Raw disk images in a directory; see :mod:`backends.image` for what is where. Thread-safe.

    :param path: the storage's directory; it must exist, and may come and go
    :param checksums: the checksum path (``transport.checksum``)
    :param devices: block devices that are volumes to be replicated from here, by volume name
    :param mount_point: the directory is there only while a file system is mounted on it
    :param workers: threads that verify and write one received stream
    :param warnings_age: seconds for which ``info`` may repeat what it found wrong with volumes and snapshots
    :param files: what changes the file system; tests give one that fails
    """

    kind = "image"
    stream = StreamKind.BLOCKS

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        checksums: Checksums,
        devices: Mapping[str, Path] = _NO_DEVICES,
        mount_point: bool = False,
        workers: int = DEFAULT_WORKERS,
        files: Files | None = None,
        warnings_age: float = WARNINGS_AGE,
    ) -> None:
        self.name = names.check_word("storage name", name)
        files = files or Files()
        self._warnings_age = warnings_age
        self._warnings_lock = threading.Lock()
        self._warnings: tuple[float, tuple[str, ...]] | None = None
        self._layout = Layout(name, path, devices, files, mount_point=mount_point)
        self._probe = probe.Probe(path)
        self._context = Context(name, self._layout, files, checksums, workers, _utc_now, self._probe.reflink)

    @property
    def capabilities(self) -> Capability:
        """What this storage can do; some of it only where blocks can be shared."""
        found = Capability.SEND | Capability.RECEIVE | Capability.DIGESTS | Capability.ROLES
        try:
            shares = self._probe.reflink()
        except OSError:  # not there now; `info` says so
            shares = False
        return found | Capability.ATOMIC_SNAPSHOT | Capability.CLONE if shares else found

    def info(self) -> StorageInfo:
        """See :class:`~backends.base.Backend`."""
        self._layout.require()
        with self._context.errors("looking at the storage"):
            status = os.statvfs(self._layout.root)
            detail, remarks = self._probe.describe()
            warnings = [*remarks, *self._found_warnings()]
        if len(warnings) > _MAX_WARNINGS:
            warnings[_MAX_WARNINGS:] = [f"and {len(warnings) - _MAX_WARNINGS} more warnings"]
        return StorageInfo(
            self.name,
            self.kind,
            self.stream,
            self.capabilities,
            status.f_blocks * status.f_frsize,
            status.f_bavail * status.f_frsize,
            detail,
            tuple(warnings),
        )

    def _found_warnings(self) -> tuple[str, ...]:
        """What is wrong with volumes and snapshots. It takes reading every record of the storage, and each run asks for
        ``info``: so what was found is used again for a while."""
        with self._warnings_lock:
            now = time.monotonic()
            if self._warnings is None or now - self._warnings[0] >= self._warnings_age:
                self._warnings = (now, tuple(self._look_for_warnings()))
            return self._warnings[1]

    def _look_for_warnings(self) -> list[str]:
        found: list[str] = []
        for volume in self._layout.listing(found):
            try:
                catalog = self._context.catalog(volume)
                catalog.snapshots(found)
                catalog.lineage()
            except (ReplicatorError, OSError) as error:
                found.append(f"{self.name}:{volume}: {error}")
        return found

    # -- listings

    def lacking(self, _uses: Capability) -> tuple[Lack, ...]:
        """See :class:`~backends.base.Backend`. A directory that cannot be written to shows in ``info``."""
        return ()

    def volumes(self) -> tuple[VolumeInfo, ...]:
        """See :class:`~backends.base.Backend`."""
        self._layout.require()
        found = []
        with self._context.errors("listing the volumes"):
            names_found = self._layout.listing([])
        for volume in names_found:
            try:
                state = self.state(volume)
            except ReplicatorError:  # one that is damaged hides no other; whoever asks for it is told
                found.append(VolumeInfo(VolumeId(self.name, volume), None, None))
                continue
            if state is not None:
                found.append(VolumeInfo(state.id, state.size, state.lineage))
        return tuple(found)

    def state(self, volume: str) -> VolumeState | None:
        """See :class:`~backends.base.Backend`."""
        self._layout.require()
        with self._context.errors(f"listing {volume}"):
            return self._state(volume)

    def _state(self, volume: str) -> VolumeState | None:
        live = self._layout.live(volume)
        catalog = self._context.catalog(volume)
        snapshots = catalog.snapshots()
        lineage = catalog.lineage()
        partial = Partial(catalog).load()
        if live is None and not snapshots and lineage is None and partial is None:
            return None
        versions = tuple(snapshot.version for snapshot in snapshots)
        resume = partial.resume if partial is not None else None
        if resume is not None and any(version.guid == resume.to_guid for version in versions):
            resume = None  # a power cut after the snapshot was published; the next receive discards it
        size = live.size if live is not None else None
        if size is None and snapshots:
            size = snapshots[-1].meta.size
        is_replica = lineage is not None and lineage.role is Role.REPLICA
        return VolumeState(
            VolumeId(self.name, volume), size, versions, lineage, resume, head_changed=is_replica and live is not None
        )

    def _existing(self, volume: str) -> Catalog:
        """A volume's private directory, for a volume that exists."""
        if self.state(volume) is None:
            raise NoSuchVolume(f"there is no volume {self.name}:{volume}", hint="correct the volume's name")
        return self._context.made_catalog(volume)

    # -- small changes

    def set_lineage(self, volume: str, lineage: Lineage) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"writing the lineage of {volume}"):
            catalog = self._existing(volume)
            with catalog.changing("writing its lineage"):
                catalog.set_lineage(lineage)

    def promote(self, volume: str, lineage: Lineage, at: VersionRef) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"promoting {volume}"):
            roles.promote(self._context, volume, lineage, at)

    def demote(self, volume: str, lineage: Lineage, at: VersionRef | None) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"demoting {volume}"):
            roles.demote(self._context, volume, lineage, at)

    def hold(self, volume: str, version: VersionRef, tag: str) -> None:
        """See :class:`~backends.base.Backend`."""
        names.check_tag(tag)
        with self._context.errors(f"holding {version.name}"):
            catalog = self._context.catalog(volume)
            catalog.require(version)
            with catalog.changing(f"holding {version.name}"):
                catalog.hold(version, tag)

    def release(self, volume: str, version: VersionRef, tag: str) -> None:
        """See :class:`~backends.base.Backend`."""
        names.check_tag(tag)
        with self._context.errors(f"releasing {version.name}"):
            catalog = self._context.catalog(volume)
            if catalog.find(version) is not None:
                with catalog.changing(f"releasing {version.name}"):
                    catalog.release(version, tag)

    def destroy(self, volume: str, version: VersionRef) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"destroying {version.name}"):
            catalog = self._context.catalog(volume)
            if catalog.find(version) is None:
                return
            with catalog.changing(f"destroying {version.name}"):
                gone = catalog.destroy(version)
            if gone is not None:
                self._context.files.remove_tree(gone)

    def abort_receive(self, volume: str) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"discarding partial state of {volume}"):
            catalog = self._context.catalog(volume)
            if Partial(catalog).exists:
                with catalog.writing("discarding partial state"):
                    Partial(catalog).discard()

    # -- data

    def snapshot(self, volumes: tuple[str, ...], name: str) -> tuple[Version, ...]:
        """See :class:`~backends.base.Backend`."""
        self._layout.require()
        names.check_snapshot(name)
        taken = []
        for volume in volumes:
            with self._context.errors(f"taking snapshot {name} of {volume}"):
                taken.append(snapshotting.take_snapshot(self._context, volume, name))
        return tuple(taken)

    def estimate(
        self,
        volume: str,
        base: VersionRef | None,
        to: VersionRef,
        *,
        intermediates: bool = False,  # noqa: ARG002
    ) -> int | None:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"estimating {to.name}"):
            return source.estimate(self._context, volume, base, to)

    def send(self, request: SendRequest, cancel: Cancellation) -> Stream:
        """See :class:`~backends.base.Backend`."""
        self._layout.require()
        with self._context.errors(f"sending {request.to.name}"):
            return source.open_stream(self._context, request, cancel)

    def receive(self, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
        """See :class:`~backends.base.Backend`."""
        self._layout.require()
        with self._context.errors(f"receiving {request.to.name}", request.to.size):
            return replica.receive(self._context, request, stream, cancel)

    def digests(self, request: DigestRequest, cancel: Cancellation) -> Iterator[DigestBatch]:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"digesting {request.version.name}"):
            return source.digest_blocks(self._context, request, cancel)

    def set_aside(self, volume: str, name: str) -> VersionRef | None:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"keeping {volume} aside"):
            return snapshotting.set_aside(self._context, volume, names.check_snapshot(name))

    def rename(self, volume: str, _new: str) -> None:
        """Not declared, so not asked for."""
        raise Unsupported(f"image {volume} cannot be renamed", hint="rename it by hand while nothing uses it")

    def remove(self, volume: str) -> None:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"removing {volume}"):
            if self.state(volume) is None:
                return
            catalog, label = self._context.made_catalog(volume), self._context.label(volume)
            with catalog.writing("removing it"), catalog.changing("removing it"):
                state = self._state(volume)
                if state is None:
                    return
                if state.versions or state.lineage is None or state.lineage.role is not Role.REPLICA:
                    raise not_removable(label, state.lineage)
                if state.head_changed:
                    raise VolumeBusy(
                        f"{label} has an image of its own beside the replica, so the replica is not removed",
                        hint="move that image away if it is not needed",
                    )
                Partial(catalog).discard()
                catalog.remove()

    def properties(self, _volume: str) -> tuple[Property, ...]:
        """None: an image is its bytes."""
        return ()

    def clone(self, volume: str, version: VersionRef, new: str) -> VolumeInfo:
        """See :class:`~backends.base.Backend`."""
        with self._context.errors(f"cloning {version.name}"):
            size = snapshotting.clone_snapshot(self._context, volume, version, new)
        return VolumeInfo(VolumeId(self.name, new), size, None)

    def close(self) -> None:
        """Nothing is kept open between calls."""
