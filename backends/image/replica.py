"""The target side: receiving a stream into a new snapshot, or into a new live image."""

from __future__ import annotations

import contextlib
import os
import uuid
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from backends.image.catalog import DIGESTS, IMAGE, Catalog, Snapshot
from backends.image.context import Context
from backends.image.copying import clone_or_copy, write_digests
from backends.image.durable import FILE_MODE
from backends.image.kept_digests import DigestWriter
from backends.image.partial import Partial
from backends.image.reading import Image, snapshot_shrunk
from backends.image.receiving import ChunkWriter, Target, TouchedBlocks
from backends.image.records import Meta, Pending
from backends.image.source import kept_digests
from backends.requests import check_receive
from replicator.cancellation import Cancellation
from replicator.endpoint import ReceiveMode, ReceiveRequest
from replicator.errors import SnapshotExists, StaleResume, Unsupported, UsageError, VolumeBusy
from replicator.model import DIVERGED_PREFIX, Lineage, Role, StreamKind, Version, VolumeId, VolumeState, format_time
from replicator.roles import check_may_receive
from replicator.streams import Stream


def receive(context: Context, request: ReceiveRequest, stream: Stream, cancel: Cancellation) -> Version:
    """See :meth:`replicator.endpoint.Endpoint.receive`."""
    name = request.volume.name
    size = check_receive(request, stream, context.storage)
    if context.layout.is_device(name):
        raise Unsupported(
            f"{context.label(name)} is a block device, which the image storage only reads",
            hint="choose another volume name, or take it out of devices of the storage",
        )
    catalog = context.made_catalog(name)
    with catalog.writing(f"receiving {request.to.name}"):
        return _Receive(context, catalog, request, size).run(stream, cancel)


class _Receive:
    """One receive, under the volume's lock."""

    def __init__(self, context: Context, catalog: Catalog, request: ReceiveRequest, size: int) -> None:
        self._context = context
        self._catalog = catalog
        self._request = request
        self._size = size
        self._volume = request.volume.name
        self._partial = Partial(catalog)
        self._restoring = request.mode is ReceiveMode.RESTORE
        self._rebuilding = request.mode is ReceiveMode.REBUILD

    def run(self, stream: Stream, cancel: Cancellation) -> Version:
        if self._restoring:
            if self._restored():
                self._partial.discard()
                return replace(self._request.to, holds=())
            self._check_free()
        else:
            self._take_lineage()
            done = self._there_already()
            if done is not None:
                return done
        base = self._catalog.require(self._request.base) if self._request.base is not None else None
        self._check_name()
        start = self._resumed_at(base)
        try:
            with ExitStack() as opened:
                touched = self._write(stream, cancel, base, start)
                return self._commit(base, touched, opened, cancel)
        except BaseException:
            if self._rebuilding:  # nothing can continue it, see PartialState.resume
                with contextlib.suppress(OSError):
                    self._partial.discard()
            raise

    # -- may it?

    def _take_lineage(self) -> None:
        """Check the rules and note the sender's lineage and epoch, durably, before any data."""
        sender = self._request.lineage
        if sender is None:
            raise UsageError(f"no lineage is given for the replica {self._request.volume}", hint="")
        mine = self._catalog.lineage()
        versions = tuple(s.version for s in self._catalog.snapshots())
        live = self._context.layout.live(self._volume)
        if mine is not None or live is not None or any(not version.is_diverged for version in versions):
            volume = VolumeId(self._context.storage, self._volume)
            check_may_receive(volume, VolumeState(volume, None, versions, mine), sender)
        wanted = Lineage(sender.uuid, Role.REPLICA, sender.epoch)
        if mine != wanted:
            with self._catalog.changing("becoming a replica"):
                self._catalog.set_lineage(wanted)

    def _check_free(self) -> None:
        taken = (
            self._context.layout.live(self._volume) is not None
            or self._catalog.lineage() is not None
            or bool(self._catalog.snapshots())
        )
        if taken:
            raise VolumeBusy(
                f"{self._catalog.label} exists already, and a restore never writes over a volume",
                hint="restore under another name",
            )

    def _restored(self) -> bool:
        """Whether an earlier call published this very image and was cut off before it could say so."""
        state = self._partial.load()
        if state is None or state.pending.to_guid != self._request.to.guid or not self._partial.published:
            return False
        fd = self._context.layout.open_live(self._volume)
        if fd is None:
            return False
        try:
            return os.path.samestat(os.fstat(fd), self._partial.image.lstat())
        finally:
            os.close(fd)

    def _there_already(self) -> Version | None:
        """The version, if a confirmation was lost; nothing is read then."""
        found = self._catalog.find(self._request.to.ref)
        if found is None or self._rebuilding:
            return None
        if self._request.hold and self._request.hold not in found.version.holds:
            with self._catalog.changing("holding it"):
                self._catalog.hold(found.version.ref, self._request.hold)
        state = self._partial.load()
        if state is None or state.pending.to_guid == self._request.to.guid:
            self._partial.discard()
        return self._catalog.require(self._request.to.ref).version

    def _check_name(self) -> None:
        """Another version of that name is in the way, unless a rebuild is to replace it."""
        other = self._catalog.named(self._request.to.name)
        if self._restoring or other is None or other.version.guid == self._request.to.guid:
            return
        if not self._rebuilding or self._catalog.find(self._request.to.ref) is not None:
            raise SnapshotExists(
                f"{self._catalog.label} has another snapshot called {other.version.name} (guid {other.version.guid})",
                hint="rename or destroy it there, if it is not needed",
            )

    # -- where it starts

    def _resumed_at(self, base: Snapshot | None) -> int:
        """Prepare to continue the partial state, or discard it; the offset to start from."""
        state = self._partial.load()
        resume = self._request.resume
        if resume is None or self._rebuilding:
            self._partial.discard()
            return 0
        base_guid = base.version.guid if base is not None else None
        fits = (
            state is not None
            and not self._partial.published
            and resume.kind is StreamKind.BLOCKS
            and state.pending.mode is self._request.mode
            and (state.pending.to_guid, state.pending.base_guid) == (self._request.to.guid, base_guid)
            and state.pending.size == self._size
            and (resume.to_guid, resume.base_guid) == (self._request.to.guid, base_guid)
            and resume.offset <= state.offset
        )
        if not fits:
            raise StaleResume(
                f"the half-received {resume.to_name} of {self._catalog.label} is not what the stream continues",
                hint="the next run discards it and starts anew",
            )
        return resume.offset

    def _begin(self, base: Snapshot | None, cancel: Cancellation) -> None:
        def fill(fd: int) -> None:
            if base is not None:
                with self._context.open_image(self._volume, base) as image:
                    clone_or_copy(self._context.files, fd, image.fd, min(image.size, self._size), cancel)
            self._context.files.truncate(fd, self._size)

        need = base.meta.size if base is not None else None
        with self._context.errors(f"preparing to receive {self._request.to.name}", need):
            self._partial.begin(
                Pending(
                    self._request.to.guid,
                    self._request.to.name,
                    base.version.guid if base is not None else None,
                    self._size,
                    self._request.mode,
                ),
                fill,
            )

    # -- the data

    def _write(self, stream: Stream, cancel: Cancellation, base: Snapshot | None, start: int) -> TouchedBlocks | None:
        """Apply the stream; the blocks that are not the base's, None where that is not known."""
        resumed = self._partial.exists
        if not resumed:
            self._begin(base, cancel)
        fresh = not resumed and not self._rebuilding
        carries = fresh and base is not None and base.meta.digests and not self._context.reflink()
        touched = TouchedBlocks(self._size) if carries else None
        fd = os.open(self._partial.image, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._context.files.set_mode(fd, FILE_MODE)  # a commit that was cut off may have made it read-only
            target = Target(fd, self._size, base is None and not resumed, self._partial.progress, self._catalog.label)
            writer = ChunkWriter(
                target,
                self._context.files,
                self._context.checksums,
                bytes.fromhex(self._request.key),
                start=start,
                workers=self._context.workers,
                touched=touched,
            )
            with self._context.errors(f"receiving {self._request.to.name}", stream.estimate):
                writer.run(stream, cancel)
        finally:
            os.close(fd)
        return touched

    # -- the commit

    def _commit(
        self, base: Snapshot | None, touched: TouchedBlocks | None, opened: ExitStack, cancel: Cancellation
    ) -> Version:
        """Make what was received the new version.

        The snapshot is put together beside the partial state, with the image under a second name, and published by
        one rename. A power cut before that leaves the partial state, to be continued; one after it leaves the
        snapshot and a partial state of an identity that exists, which the next receive discards without writing to it.
        """
        with self._context.errors(f"committing {self._request.to.name}"):
            if self._restoring:
                return self._publish_live()
            folder = self._catalog.new_folder()
            try:
                self._link_image(folder)
                meta = self._digest(folder / DIGESTS, base, touched, opened, cancel)
                with self._catalog.changing(f"publishing {self._request.to.name}"):
                    self._publish(folder, meta)
            except BaseException:
                with contextlib.suppress(OSError):
                    self._context.files.remove_tree(folder)
                raise
            self._partial.discard()
        return self._catalog.require(self._request.to.ref).version

    def _link_image(self, folder: Path) -> None:
        self._context.files.link_path(self._partial.image, folder / IMAGE)
        self._catalog.seal_image(folder, self._size)

    def _digest(
        self, path: Path, base: Snapshot | None, touched: TouchedBlocks | None, opened: ExitStack, cancel: Cancellation
    ) -> Meta:
        """Keep digests of the new image where copies are not shared; its record, but for its position."""
        keeps = not self._context.reflink()
        meta = Meta.of(self._request.to, position=0, size=self._size, digests=keeps)
        if not keeps:
            return meta
        with self._catalog.changing("making its key"):
            key = self._catalog.key()
        carried = None
        if base is not None and touched is not None:
            kept = opened.enter_context(kept_digests(self._context, self._catalog, base, cancel))
            if base.meta.size != self._size:  # the last block of the shorter one is not the same block in the other
                touched.add(min(base.meta.size, self._size), 1)
            carried = (kept, touched)
        fd = os.open(path.parent / IMAGE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            image = Image(fd, self._size, self._catalog.label, snapshot_shrunk)
            with DigestWriter.new(self._context.files, path, self._context.checksums, key, meta) as writer:
                write_digests(image, self._context.digester(key), writer, cancel, carried)
        finally:
            os.close(fd)
        return meta

    def _publish(self, folder: Path, meta: Meta) -> None:
        catalog, to = self._catalog, self._request.to
        same = catalog.find(to.ref)
        replaced = same or catalog.named(to.name)
        holds = {self._request.hold} - {""} | set(same.version.holds if same is not None else ())
        position = same.meta.position if same is not None else catalog.next_position()
        catalog.seal(folder, replace(meta, position=position), tuple(sorted(holds)))
        if replaced is None:
            catalog.publish(folder, to.name)
            return
        aside = self._request.aside or DIVERGED_PREFIX + format_time(self._context.clock())
        catalog.replace(folder, replaced, aside, uuid.uuid4().hex if same is not None else replaced.meta.guid)
        if replaced.version.name != to.name and catalog.named(to.name) is None:
            catalog.rename(replaced, to.name)

    def _publish_live(self) -> Version:
        """Give the image its name as a live image. The one step that counts is the link: it fails if there is one."""
        try:
            self._context.layout.publish_live(self._volume, self._synced_image())
        except FileExistsError:
            self._check_free()
            raise
        self._partial.discard()
        return replace(self._request.to, holds=())

    def _synced_image(self) -> Path:
        fd = os.open(self._partial.image, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._context.files.sync(fd)
        finally:
            os.close(fd)
        return self._partial.image
